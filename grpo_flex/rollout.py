"""The rollout worker: a prompt becomes a group of siblings, with the steps that will be trained.

Knows nothing of Ray: ``cluster.py`` makes an actor of it. What it samples depends on (run seed, step, prompt,
sibling) and the adapter alone, not on which worker does it or what it did before.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from grpo_flex.config import RunConfig
from grpo_flex.dynamics import Past, Step, step
from grpo_flex.pictures import MOTION
from grpo_flex.prompts import seed_for
from grpo_flex.types import Adapter, Prompt, RolloutGroup, Sample, Trajectories
from grpo_flex.weights import attach_adapter, write_adapter

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from grpo_flex.generators.base import Conditioning, Model


HELDOUT_BATCH = 16
"""Held-out prompts in one batch. A constant: pictures must not depend on the number of workers."""


class RolloutWorker:
    """Holds the generator with an adapter, and samples groups and held-out pictures.

    Args:
        model: a loaded one with an adapter, where it is shared with a learner.
    """

    def __init__(
        self, config: RunConfig, device: str = "cpu", name: str = "rollout-0", model: Model | None = None
    ) -> None:
        import torch

        torch.set_num_threads(config.placement.threads_per_worker)
        self.config, self.name = config, name
        self.model = model or config.generator.load(device)
        if model is None:
            attach_adapter(self.model, config.adapter, config.seed)
        self.loaded = (-1, "")
        """(version, role) of the adapter that the model holds."""

    def generate(self, step_index: int, prompt: Prompt, adapter: Adapter) -> RolloutGroup:
        """Sample the G siblings of one prompt with the given adapter."""
        import torch

        began = time.perf_counter()
        self.use(adapter)
        config = self.config.sampling
        seed = seed_for(self.config.seed, "rollout", step_index, prompt.id)
        seeds = tuple(seed_for(seed, sibling) for sibling in range(config.group_size))
        conditioning = self.model.encode([prompt])[0]
        with torch.no_grad():
            trajectories, final = self._sample(conditioning, step_index, seed, seeds)
        media = self.model.decode(final)
        pixels = torch.from_numpy(np.stack(media)).float() / 255
        return RolloutGroup(
            step=step_index,
            prompt=prompt,
            conditioning=conditioning,
            media_G=tuple(media),
            diversity={"latent": mean_distance(final), "pixel": mean_distance(pixels)},
            trajectories=trajectories,
            seeds_G=seeds,
            policy_version=adapter.version,
            worker=self.name,
            seconds=time.perf_counter() - began,
        )

    def evaluate(self, prompts: Sequence[Prompt], adapter: Adapter) -> list[Sample]:
        """Held-out samples: plain ODE from noise that is fixed for the whole run, scored. One batch."""
        import torch

        self.use(adapter)
        config, seed = self.config.evaluation, self.config.seed
        copies = [prompt for prompt in prompts for _ in range(config.samples_per_prompt)]
        seeds = [seed_for(seed, "heldout", p.id, i) for p in prompts for i in range(config.samples_per_prompt)]
        with torch.no_grad():
            conditioning = _together(self.model.encode(copies))
            media = self.model.decode(self.sample_ode(conditioning, seeds, self.config.sampling.eval_steps))
        return [
            Sample(prompt=p, media=m, scores={**(config.scorer(m, p) if config.scorer else {}), **motion(m)})
            for p, m in zip(copies, media, strict=True)
        ]

    def use(self, adapter: Adapter) -> None:
        """Load the adapter unless it is loaded already."""
        if (adapter.version, adapter.role) != self.loaded:
            self.loaded = (-1, "")  # a write that fails half way leaves no adapter that could be used
            write_adapter(self.model.transformer, adapter.tensors)
            self.loaded = (adapter.version, adapter.role)

    def sample_ode(self, conditioning: Conditioning, seeds: Sequence[int], steps: int) -> Tensor:
        """Clean latents [len(seeds), N, C] by the held-out samples' solver."""
        x, past = self._noise(seeds), None
        for sigma, sigma_next in pairwise(self.model.sigmas(steps)):
            v = self.model.velocity(x, sigma, conditioning)
            x, past = self.config.sampling.eval_solver.advance(x, v, sigma, sigma_next, past), Past(v, sigma)
        return x

    def _sample(
        self, conditioning: Conditioning, iteration: int, seed: int, seeds: Sequence[int]
    ) -> tuple[Trajectories, Tensor]:
        """The trained steps of a group, and its clean latents [G, N, C]."""
        config, objective = self.config.sampling, self.config.objective
        selection = config.window.select(config.steps, iteration, seed)
        sigmas = selection.schedule(self.model.sigmas(config.steps))
        stochastic = selection.stochastic if config.dynamics.stochastic else frozenset()
        trained = selection.trained if objective.needs_noise else ()
        # From the same noise siblings are one until the first step with noise: that prefix is computed once.
        x = self._noise([seed] if config.same_noise else seeds)
        generators = [_generator(seed_for(s, "sde")) for s in seeds]
        before: list[Tensor] = []
        taken: list[Step] = []
        past: Past | None = None
        for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            x = _branched(x, len(seeds)) if i in stochastic else x
            v = self.model.velocity(x, sigma, conditioning)
            if i not in stochastic:
                x, past = config.solver.advance(x, v, sigma, sigma_next, past), Past(v, sigma)
                continue
            now = self._noisy_step(x, v, sigma, sigma_next, generators)
            if i in trained:
                before.append(x)
                taken.append(now)
            x, past = now.next_sample, None  # the path that a solver extrapolates ends where noise comes in
        return _record(trained, sigmas, before, taken, objective.keeps_means, x, objective.keeps_final), x

    def _noisy_step(
        self, x: Tensor, v: Tensor, sigma: float, sigma_next: float, generators: list[torch.Generator]
    ) -> Step:
        noise = _normal(self.model.latent_shape, generators).to(x.device)
        return step(self.config.sampling.dynamics, x, v, sigma, sigma_next, noise=noise)

    def _noise(self, seeds: Sequence[int]) -> Tensor:
        """Initial noise, one draw a seed, made on the CPU so that every device gets the same numbers."""
        return _normal(self.model.latent_shape, [_generator(seed_for(s, "start")) for s in seeds]).to(self.model.device)


def _together(conditionings: Sequence[Conditioning]) -> Conditioning:
    """Conditionings of different prompts as one batch, padded with zeros to the longest (a mask belongs to those that differ)."""
    import torch
    from torch.nn.functional import pad

    def joined(name: str) -> Tensor:
        tensors = [c[name] for c in conditionings]
        if tensors[0].ndim > 1:
            longest = max(t.shape[1] for t in tensors)
            tensors = [pad(t, [0, 0] * (t.ndim - 2) + [0, longest - t.shape[1]]) for t in tensors]
        return torch.cat(tensors)

    return {name: joined(name) for name in conditionings[0]}


def _branched(x: Tensor, siblings: int) -> Tensor:
    """[siblings, N, C]: one path becomes one for each sibling."""
    return x if x.shape[0] == siblings else x.expand(siblings, -1, -1).contiguous()


def mean_distance(points: Tensor) -> float:
    """Mean over all pairs of siblings of the root mean square difference of their elements.

    Args:
        points: [G, …], G > 1.
    """
    import torch

    flat = points.flatten(1).float()
    return float(torch.pdist(flat).mean() / flat.shape[1] ** 0.5)


def motion(media: np.ndarray) -> dict[str, float]:
    """{"motion": mean change of a pixel from frame to frame, white − black = 1}; nothing of a picture.

    Rewards that ignore motion are known to freeze videos: this is what would fall.

    Args:
        media: uint8 [F, H, W, 3].
    """
    if len(media) < 2:
        return {}
    return {MOTION: float(np.abs(np.diff(media.astype(np.float32), axis=0)).mean() / 255)}


def _generator(seed: int) -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(seed)


def _normal(shape: tuple[int, int], generators: Sequence[torch.Generator]) -> Tensor:
    """One standard normal draw from each generator, [len(generators), *shape]: siblings never share a stream."""
    import torch

    return torch.stack([torch.randn(shape, generator=g) for g in generators])


def _record(
    steps_K: tuple[int, ...],
    sigmas: tuple[float, ...],
    before: list[Tensor],
    taken: list[Step],
    keep_means: bool,
    final: Tensor,
    keep_final: bool,
) -> Trajectories:
    import torch

    def stack(tensors: list[Tensor], empty: Tensor) -> Tensor:
        """[G, K, …] on the CPU, where any process can receive it, also for K = 0 (an objective that looks at x_0 alone)."""
        return torch.stack([empty, *tensors], dim=1)[:, 1:].cpu()

    return Trajectories(
        latents_GKNC=stack(before, final),
        next_latents_GKNC=stack([s.next_sample for s in taken], final),
        steps_K=steps_K,
        sigmas=sigmas,
        logprobs_GK=stack([s.logprob for s in taken], final.new_zeros(final.shape[0])),
        means_GKNC=stack([s.mean for s in taken], final) if keep_means else None,
        final_GNC=final.cpu() if keep_final else None,
    )
