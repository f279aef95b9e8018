"""The learner: groups with advantages become a better adapter. Knows nothing of Ray.

One group is one micro-batch: its siblings go through the transformer in the very batch shape in which they were
sampled, so that on the CPU in float32 the ratio before the first update is bit-exactly 1.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo_flex.config import RunConfig
from grpo_flex.dynamics import Dynamics, Step, step
from grpo_flex.prompts import seed_for
from grpo_flex.types import Adapter, RolloutGroup, Trajectories, UpdateResult
from grpo_flex.weights import attach_adapter, read_adapter, write_adapter

if TYPE_CHECKING:
    from torch import Tensor

    from grpo_flex.generators.base import Conditioning, Model


class BoundPolicy:
    """The current weights on one group's prompt (see ``objectives.base.Policy``)."""

    def __init__(self, model: Model, conditioning: Conditioning, dynamics: Dynamics) -> None:
        self.model, self.conditioning, self.dynamics = model, conditioning, dynamics

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        return self.model.velocity(x, sigma, self.conditioning)

    def reference_velocity(self, x: Tensor, sigma: float) -> Tensor:
        import torch

        transformer: Any = self.model.transformer
        transformer.disable_adapters()
        try:
            with torch.no_grad():
                return self.velocity(x, sigma)
        finally:
            transformer.enable_adapters()

    def rescore(self, trajectories: Trajectories, k: int) -> Step:
        i, x = trajectories.steps_K[k], trajectories.latents_GKNC[:, k].to(self.model.device)
        sigma, sigma_next = trajectories.sigmas[i], trajectories.sigmas[i + 1]
        taken = trajectories.next_latents_GKNC[:, k].to(self.model.device)
        return step(self.dynamics, x, self.velocity(x, sigma), sigma, sigma_next, next_sample=taken)


class Learner:
    """Adapter, optimiser, and ``update``."""

    def __init__(self, config: RunConfig, device: str = "cpu") -> None:
        import torch

        torch.set_num_threads(config.placement.learner_threads)
        self.config, self.version = config, 0
        self.model = config.generator.load(device)
        self.parameters = attach_adapter(self.model, config.adapter, config.seed)
        for p in self.parameters:
            p.grad = torch.zeros_like(p)  # an update without any gradient is then like any other
        o = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay
        )

    def update(self, groups: Sequence[RolloutGroup], advantages: Sequence[np.ndarray], step_index: int) -> UpdateResult:
        """One rollout's updates: the groups are dealt out among ``updates_per_rollout`` optimiser steps.

        Args:
            groups: complete groups.
            advantages: float64 [G] for each group; NaN members are masked.
        """
        totals: defaultdict[str, list[float]] = defaultdict(list)
        parts = min(self.config.optimizer.updates_per_rollout, len(groups))
        for part in range(parts):
            self._optimise(groups[part::parts], advantages[part::parts], step_index, totals)
            if part == 0:  # before any update: what rollout and learner disagree by
                totals["first_log_ratio_abs"] = list(totals["log_ratio_abs"])
        self.version += 1
        stale = [float(self.version - 1 - g.policy_version) for g in groups]
        metrics = {f"policy/{name}": float(np.mean(values)) for name, values in totals.items() if values}
        return UpdateResult(policy_version=self.version, metrics=metrics | {"policy/staleness": max(stale)})

    def _optimise(
        self,
        groups: Sequence[RolloutGroup],
        advantages: Sequence[np.ndarray],
        step_index: int,
        totals: dict[str, list[float]],
    ) -> None:
        """One optimiser step on the mean loss over all unmasked siblings and passes of these groups."""
        from torch.nn.utils import clip_grad_norm_

        self.optimizer.zero_grad(set_to_none=False)
        weight = sum(self._weight(g, a) for g, a in zip(groups, advantages, strict=True))
        for group, advantage in zip(groups, advantages, strict=True):
            if self._weight(group, advantage) and self._matters(advantage):
                self._backward(group, advantage, weight, step_index, totals)
        norm = float(clip_grad_norm_(self.parameters, self.config.optimizer.max_grad_norm))
        totals["grad_norm"].append(norm)
        totals["lr"].append(self._warm_up(step_index))
        if math.isfinite(norm):
            self.optimizer.step()
        totals["skipped_updates"].append(float(not math.isfinite(norm)))

    def _weight(self, group: RolloutGroup, advantage: np.ndarray) -> int:
        return int(np.isfinite(advantage).sum()) * self.config.objective.passes(group.trajectories)

    def _matters(self, advantage: np.ndarray) -> bool:
        """Without a pull to the base, a group of zero advantages has zero gradient: no need to compute it."""
        return bool(np.nan_to_num(advantage).any()) or getattr(self.config.objective, "kl_beta", 0.0) > 0

    def _backward(
        self, group: RolloutGroup, advantage: np.ndarray, weight: int, step_index: int, totals: dict[str, list[float]]
    ) -> None:
        import torch

        keep = torch.from_numpy(np.isfinite(advantage)).to(self.model.device)
        advantages_G = torch.from_numpy(np.nan_to_num(advantage)).float().to(self.model.device)
        policy = BoundPolicy(self.model, group.conditioning, self.config.sampling.dynamics)
        seed = seed_for(self.config.seed, "update", step_index, group.prompt.id)
        for term in self.config.objective.terms(policy, group.trajectories, advantages_G, seed):
            loss = torch.where(keep, term.loss_G, 0.0).sum() / weight
            loss.backward()
            totals["loss"].append(float(loss.detach()) * weight / float(keep.sum()))
            for name, values in term.metrics.items():
                totals[name].append(float(values[keep].mean()))

    def _warm_up(self, step_index: int) -> float:
        """Linear warm-up, constant after; returns the learning rate of this step."""
        o = self.config.optimizer
        lr = o.lr * min(1.0, (step_index + 1) / (o.warmup_steps + 1))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def adapter(self) -> Adapter:
        """A copy of the current adapter, to publish."""
        return read_adapter(self.model.transformer, self.version)

    def state(self) -> dict[str, Any]:
        """Everything that a resume needs, on the CPU."""
        return {
            "version": self.version,
            "adapter": dict(self.adapter().tensors),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of ``state``.

        Raises:
            ValueError: a state of another model or adapter.
        """
        write_adapter(self.model.transformer, state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.version = state["version"]
        o = self.config.optimizer  # what the configuration says now, not what the checkpoint was written with
        for group in self.optimizer.param_groups:
            group.update(betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)

    def save_adapter(self, folder: Path) -> Path:
        """Write adapter/pytorch_lora_weights.safetensors for the stock pipeline."""
        config = self.config.adapter
        return self.model.save_adapter(folder, self.adapter().tensors, config.rank, config.alpha)
