"""The learner: groups with advantages become a better adapter. Knows nothing of Ray.

Siblings go through the transformer in the very batch shape in which they were sampled, a whole group or the parts that
``sampling.micro_batch`` makes of it, so that on the CPU in float32 the ratio before the first update is bit-exactly 1.

There are three adapters: θ, which is trained; θ_old, which samples the rollouts (θ itself, unless the objective
lets it follow more slowly); and an average of θ over the training steps, which is evaluated, shown and exported. Only those
that differ from θ are kept. Under full fine-tuning they are not adapters but whole sets of weights (``weights.py``).

Several learners (``Ranks``) share out the groups of every update and sum their gradients. The loss is divided by the
weight of all groups, whoever computes them, so that uneven shares and masked siblings count as with one learner.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from grpo_flex.config import RunConfig
from grpo_flex.dynamics import Dynamics, Step, step
from grpo_flex.objectives.renoise import renoised
from grpo_flex.prompts import seed_for
from grpo_flex.ranks import Ranks
from grpo_flex.types import Adapter, Role, RolloutGroup, Trajectories, UpdateResult
from grpo_flex.weights import Weights, Whole, follow, warmed_up, without_adapter

if TYPE_CHECKING:
    from torch import Tensor

    from grpo_flex.generators.base import Conditioning, Model
    from grpo_flex.objectives.base import Term

    Groups = Sequence[RolloutGroup] | Mapping[int, RolloutGroup]
    Figures = defaultdict[str, list[tuple[int, float]]]


class Share(NamedTuple):
    """Indices of the groups that one rank computes for one optimiser step."""

    own: list[int]
    filling: list[int]
    """Somebody else's, which count for nothing: all ranks put sharded weights together equally often."""


class BoundPolicy:
    """The current weights on one group's prompt (see ``objectives.base.Policy``)."""

    def __init__(
        self,
        model: Model,
        conditioning: Conditioning,
        dynamics: Dynamics,
        weights: Weights | None = None,
        old: Sequence[Tensor] | None = (),
    ) -> None:
        """
        Args:
            weights: what is trained of the model; None: an adapter that is attached to it.
            old: θ_old in the order of the parameters; empty while θ equals it, None where it is not kept.
        """
        self.model, self.conditioning, self.dynamics = model, conditioning, dynamics
        self.weights, self.old = weights, old
        self._last: tuple[Tensor, float, Tensor] | None = None

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        v = self.model.velocity(x, sigma, self.conditioning)
        self._last = (x, sigma, v.detach())
        return v

    def old_velocity(self, x: Tensor, sigma: float) -> Tensor:
        import torch

        if self.old is None:
            raise ValueError("the objective asks for old_velocity; it has to say so: needs_old: ClassVar[bool] = True")
        if not self.old and self._last and self._last[0] is x and self._last[1] == sigma:
            return self._last[2]  # the same weights at the same place: a forward pass saved
        with torch.no_grad(), self.weights.lent(self.old) if self.weights and self.old else nullcontext():
            return self.model.velocity(x, sigma, self.conditioning)

    def reference_velocity(self, x: Tensor, sigma: float) -> Tensor:
        import torch

        base = self.weights.base() if self.weights else without_adapter(self.model.transformer)
        with torch.no_grad(), base:
            return self.model.velocity(x, sigma, self.conditioning)

    def rescore(self, trajectories: Trajectories, k: int) -> Step:
        if k >= len(trajectories.steps_K):
            raise ValueError(
                f"the objective rescores step {k} of {len(trajectories.steps_K)} that are stored; one that learns from their "
                "density has to say so: needs_noise: ClassVar[bool] = True"
            )
        i, x = trajectories.steps_K[k], trajectories.latents_GKNC[:, k].to(self.model.device)
        sigma, sigma_next = trajectories.sigmas[i], trajectories.sigmas[i + 1]
        taken = trajectories.next_latents_GKNC[:, k].to(self.model.device)
        return step(self.dynamics, x, self.velocity(x, sigma), sigma, sigma_next, next_sample=taken)


class Learner:
    """What is trained, its optimiser, and ``update``.

    Args:
        ranks: the place among several learners, all of which have to make the same calls. Where weights are split,
            rank 0 alone gets tensors from those that read them.

    Raises:
        ValueError: a model that cannot be loaded or trained as the configuration says.
    """

    def __init__(self, config: RunConfig, device: str = "cpu", ranks: Ranks | None = None) -> None:
        import torch

        torch.set_num_threads(config.placement.learner_threads)
        self.config, self.version, self.ranks = config, 0, ranks or Ranks()
        self.model = config.generator.load(device)
        self.weights = config.adapter.attach(self.model, config.seed)
        self.sharded = config.placement.shard_base and self.ranks.size > 1
        if self.sharded:
            _check_turns(config, self.model)
        self.parameters = self.weights.train(self.ranks, self.sharded)
        for p in self.parameters:
            p.grad = torch.zeros_like(p)  # an update without any gradient is then like any other
        self._old = self.weights.copies(config.objective.needs_old)
        self._average = self.weights.copies(config.optimizer.ema > 0)
        self._moved = False
        """Whether θ may differ from θ_old."""
        self.kl_beta = config.objective.first_beta
        self._begun = 0
        """So many of this rank's groups of an optimiser step are in the gradient."""
        self._seen: Figures = defaultdict(list)
        o = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay
        )

    @property
    def apart(self) -> list[Tensor]:
        """Tensors that are kept beside θ: copies of the base, of θ_old and of the average."""
        return [
            *self.weights.kept,
            *(t for v in (self._old, self._average) if v[0] is not self.parameters[0] for t in v),
        ]

    def shares(self, groups: int) -> list[Share]:
        """This rank's part in each optimiser step of an update with so many groups."""
        parts, rank, size = self.config.optimizer.updates(groups), self.ranks.rank, self.ranks.size
        shares = []
        for part in range(parts):
            dealt = list(range(part, groups, parts))
            own = dealt[rank::size]
            missing = math.ceil(len(dealt) / size) - len(own) if self.sharded else 0
            shares.append(Share(own, dealt[:missing]))
        return shares

    def begin(self, groups: Groups, advantages: Sequence[np.ndarray], of: int, step_index: int) -> None:
        """A head start on ``update``: the gradients of groups that are complete while others are not.

        It may be called again as more are complete. ``update`` goes on from there, with the same bits as without it,
        because gradients are summed in the order of the groups in any case. Only groups of the first optimiser step
        are begun, and those that all ranks have one of: sharded ranks compute together.

        Args:
            advantages: of the first groups of the step; ``groups`` as in ``update``.
            of: how many groups the update will have.
        """
        new = self.to_begin(len(advantages), of)
        self._add_up(groups, masked(advantages, finite_members(groups, new)), new, step_index)

    def to_begin(self, given: int, of: int) -> list[int]:
        """Those of this rank's groups that ``begin`` will look at, if it is given so many of the step's ``of``."""
        dealt = range(0, given, self.config.optimizer.updates(of))
        return self.shares(of)[0].own[self._begun : len(dealt) // self.ranks.size]

    def update(self, groups: Groups, advantages: Sequence[np.ndarray], step_index: int) -> UpdateResult:
        """One rollout's updates: the groups are dealt out among ``updates_per_rollout`` optimiser steps.

        Args:
            groups: complete groups by their index; only those of this rank's ``shares`` are looked at.
            advantages: float64 [G] for each group; NaN members are masked, and so are those whose trajectory is not finite.

        Returns:
            Metrics over all groups, the same on every rank.
        """
        seen, shares = self._seen, self.shares(len(advantages))
        finite = finite_members(groups, [i for share in shares for i in share.own])
        advantages = masked(advantages, finite)
        for i, there in finite.items():
            seen["nonfinite_share"].append((i, float(1 - there.mean())))
            seen["staleness"].append((i, float(self.version - groups[i].policy_version)))
            for name, value in groups[i].diversity.items():
                seen[f"diversity_{name}"].append((i, value))
        for part, share in enumerate(shares):
            self._optimise(groups, advantages, share, step_index)
            if part == 0:  # before any update: what rollout and learner disagree by
                seen["first_log_ratio_abs"] = list(seen["log_ratio_abs"])
        self._watch_base(groups, shares[0], step_index)
        totals, self._seen = in_order(self.ranks.gather(dict(seen))), defaultdict(list)
        stale = max(totals.pop("staleness"))
        self._close(totals)
        metrics = {_key(name): float(np.mean(values)) for name, values in totals.items()}
        return UpdateResult(policy_version=self.version, metrics=metrics | {"policy/staleness": stale})

    def _watch_base(self, groups: Groups, share: Share, step_index: int) -> None:
        """Rank 0's first group is the update's first, so the figure does not depend on how many ranks there are."""
        if self.weights.has_base and (self.ranks.rank == 0 or self.sharded):
            first = [*share.own, *share.filling][0]
            distance = self._base_distance(groups[first], step_index)
            self._note(base_distance=distance)

    def _note(self, **figures: float) -> None:
        """Figures that all ranks have in common: one of them keeps them."""
        if self.ranks.rank == 0:
            for name, value in figures.items():
                self._seen[name].append((0, value))

    def _base_distance(self, group: RolloutGroup, step_index: int) -> float:
        """‖v − v_base‖², mean over one group at one noise level that changes from step to step.

        It is watched with and without a KL in the loss, for two forward passes of one group.
        """
        import torch

        policy = BoundPolicy(self.model, group.conditioning, self.config.sampling.dynamics, self.weights)
        kept, device = group.trajectories, torch.device(self.model.device)
        if kept.steps_K:
            k = step_index % len(kept.steps_K)
            x, sigma = kept.latents_GKNC[:, k].to(device), kept.sigmas[kept.steps_K[k]]
        elif kept.final_GNC is not None:
            x, sigma, *_ = next(renoised(kept, 1, seed_for(self.config.seed, "base", step_index), device))
        else:
            return math.nan
        total = 0.0
        with torch.no_grad():
            for part in self.config.sampling.micro_batches(len(x)):
                moved = policy.velocity(x[part], sigma) - policy.reference_velocity(x[part], sigma)
                total += float(moved.square().mean()) * len(moved)
        return total / len(x)

    def _close(self, totals: dict[str, list[float]]) -> None:
        """What follows the updates of one rollout: the other two adapters, and β."""
        decay = self.config.objective.old_decay(self.version)
        follow(self._old, self.parameters, decay)
        self._moved = self._moved and decay > 0
        follow(self._average, self.parameters, warmed_up(self.config.optimizer.ema, self.version))
        if totals.get("kl"):
            totals["kl_beta"] = [self.kl_beta]
            self.kl_beta = self.config.objective.next_beta(self.kl_beta, float(np.mean(totals["kl"])))
        self.version += 1

    def _optimise(self, groups: Groups, advantages: Sequence[np.ndarray], share: Share, step_index: int) -> None:
        """One optimiser step on the mean loss over all unmasked siblings and passes of its groups, on all ranks."""
        self._add_up(groups, advantages, share.own[self._begun :], step_index)
        self._begun = 0
        for i in share.filling:
            self._backward(i, groups[i], np.full_like(advantages[i], np.nan), step_index)
        if not self.weights.split:
            self.ranks.sum_gradients(self.parameters)
        weight, learns = self._count(groups, advantages, share)
        for p in self.parameters:
            if p.grad is not None:
                p.grad /= max(weight, 1)
        norm = self.ranks.clip(self.parameters, self.config.optimizer.max_grad_norm, self.weights.split)
        # Where nobody got a reward, or all siblings the same one, momentum alone must not move weights.
        sound = learns and math.isfinite(norm)
        self._note(grad_norm=norm, lr=self._schedule(step_index), skipped_updates=float(not sound))
        if sound:
            self.optimizer.step()
            self.weights.sync()
            self._moved = True

    def _add_up(self, groups: Groups, advantages: Sequence[np.ndarray], new: Sequence[int], step_index: int) -> None:
        """Add the gradients of those of this rank's groups that are next, in their order."""
        if not self._begun:
            self.optimizer.zero_grad(set_to_none=False)
        for i in new:
            if self.sharded or (self._weight(groups[i], advantages[i]) and self._matters(advantages[i])):
                self._backward(i, groups[i], advantages[i], step_index)
        self._begun += len(new)

    def _weight(self, group: RolloutGroup, advantage: np.ndarray) -> int:
        return int(np.isfinite(advantage).sum()) * self.config.objective.passes(group.trajectories)

    def _count(self, groups: Groups, advantages: Sequence[np.ndarray], share: Share) -> tuple[int, bool]:
        """The weight of all ranks' groups in this optimiser step, and whether any of them has something to teach."""
        own = [(self._weight(groups[i], advantages[i]), self._matters(advantages[i])) for i in share.own]
        every = [entry for rank in self.ranks.gather(own) for entry in rank]
        return sum(weight for weight, _ in every), any(weight and matters for weight, matters in every)

    def _matters(self, advantage: np.ndarray) -> bool:
        """A group of zero advantages with no gradient need not be computed."""
        still = self.config.objective.still_at_zero and self.kl_beta == 0
        return not still or bool(np.nan_to_num(advantage).any())

    def _backward(self, index: int, group: RolloutGroup, advantage: np.ndarray, step_index: int) -> None:
        """Add a group's part to the gradient; one that is wholly masked adds 0 and shows in no figure."""
        import torch

        judged = torch.from_numpy(np.isfinite(advantage))
        # On its way back the zero of a masked loss may meet what is infinite, and their product is NaN in every weight.
        trajectories = group.trajectories.blanked(~judged)
        keep = judged.to(self.model.device)
        middle = float(advantage[np.isfinite(advantage)].mean()) if keep.any() else 0.0
        advantages_G = torch.from_numpy(np.nan_to_num(advantage, nan=middle)).float().to(self.model.device)
        dynamics = self.config.sampling.dynamics
        old = (self._old if self._moved else ()) if self.config.objective.needs_old else None
        policy = BoundPolicy(self.model, group.conditioning, dynamics, self.weights, old)
        seed = seed_for(self.config.seed, "update", step_index, group.prompt.id)
        # By pass and name, sibling after sibling.
        figures: defaultdict[tuple[int, str], list[Tensor]] = defaultdict(list)
        for part in self._parts_of(len(keep)):
            terms = self.config.objective.terms(policy, trajectories.part(part), advantages_G[part], seed)
            passes = 0
            for k, term in enumerate(terms):
                passes += 1
                for name, values in self._descend(term, keep[part]).items():
                    figures[k, name].append(values.detach())
            if passes != (told := self.config.objective.passes(trajectories)):
                raise ValueError(
                    f"{type(self.config.objective).__name__}.passes says {told} and its terms are {passes}: the loss would be "
                    "divided by the wrong number"
                )
        for (_, name), values in figures.items():
            self._seen[name] += [(index, value) for value in torch.cat(values)[keep].tolist()]

    def _descend(self, term: Term, keep: Tensor) -> dict[str, Tensor]:
        """Add one pass's gradient; its figures, of each sibling."""
        import torch

        pull = {} if term.kl_G is None else {"kl": term.kl_G}
        for name, values in {"loss_G": term.loss_G, **term.metrics, **pull}.items():
            if values.shape != keep.shape:
                raise ValueError(
                    f"{type(self.config.objective).__name__} gives {name} of shape {tuple(values.shape)}; it needs one number "
                    f"for each sibling, {tuple(keep.shape)}"
                )
        loss_G = term.loss_G if term.kl_G is None else term.loss_G + self.kl_beta * term.kl_G
        loss_G = torch.where(keep, loss_G, 0.0)
        loss_G.sum().backward()
        return {"loss": loss_G, **term.metrics, **pull}

    def _parts_of(self, siblings: int) -> list[slice]:
        """What goes through the model together in one pass of a group."""
        whole = self.config.objective.whole_groups
        return [slice(0, siblings)] if whole else self.config.sampling.micro_batches(siblings)

    def _schedule(self, step_index: int) -> float:
        """Linear warm-up times a line from 1 to ``lr_end``; sets and returns the learning rate of this step."""
        o, last = self.config.optimizer, max(1, self.config.steps - 1)
        falling = 1 - (1 - o.lr_end) * min(1.0, step_index / last)
        lr = o.lr * falling * min(1.0, (step_index + 1) / (o.warmup_steps + 1))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def adapter(self) -> Adapter:
        """A copy of what rollouts sample with, to publish: θ_old."""
        return self._published("sampling", self.weights.read(self._old))

    def evaluation_adapter(self) -> Adapter:
        """A copy of the average of θ, which is θ itself while ``optimizer.ema`` is 0."""
        return self._published("evaluation", self.weights.read(self._average))

    def base_adapter(self) -> Adapter:
        """What leaves the base model as it is."""
        return self._published("base", self.weights.read_base())

    def each(self, role: Role) -> Iterator[tuple[str, Tensor]]:
        """What a published adapter of that role holds, one tensor after the other (full fine-tuning; ``Whole.each``)."""
        weights = self.whole
        return weights.each({"sampling": self._old, "evaluation": self._average, "base": weights.kept}[role])

    @property
    def whole(self) -> Whole:
        assert isinstance(self.weights, Whole), "a validated configuration broadcasts no LoRA adapter"
        return self.weights

    def _published(self, role: Role, tensors: Mapping[str, Tensor]) -> Adapter:
        return Adapter(version=self.version, tensors=tensors, role=role)

    def lending(self, role: Role) -> AbstractContextManager[None]:
        """The model computes with the adapter of that role while the block lasts."""
        if role == "base":
            return self.weights.base()
        return self.weights.lent(self._old if role == "sampling" else self._average)

    def state(self) -> dict[str, Any]:
        """Everything that a resume needs, on the CPU."""
        own = self.weights.read(self.parameters, exact=True)
        apart = {name: values for name, values in (("old", self._old), ("average", self._average))}
        others = {
            name: own if values[0] is self.parameters[0] else _shared(self.weights.read(values, exact=True), own)
            for name, values in apart.items()
        }
        reads = not self.weights.split or self.ranks.rank == 0
        optimizer = self._moments(self.optimizer.state_dict(), self.weights.whole, reads)
        beta = (self.config.objective.first_beta, self.kl_beta)
        return {"version": self.version, "adapter": own, "optimizer": optimizer, "kl_beta": beta, **others}

    def _moments(
        self, state: dict[str, Any], to: Callable[[int, Tensor], Tensor], reads: bool = True
    ) -> dict[str, Any]:
        """A copy of an optimiser's state on the CPU, with every tensor that has its parameter's shape made whole, or cut
        to this rank's part.

        One tensor after the other: the device has no room for all of them whole.

        Args:
            reads: whether to keep them; all ranks take part in making them whole.
        """
        copied: dict[int, dict[str, Any]] = {}
        for i, of in state["state"].items():
            copied[i] = {}
            for name, t in of.items():
                t = to(i, t) if t.ndim else t  # the number of its steps has none
                if reads:
                    copied[i][name] = t.detach().to("cpu", copy=True)
        return {**state, "state": copied}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of ``state``.

        Raises:
            ValueError: a state of another model or adapter.
        """
        for name, follower in (("old", self._old), ("average", self._average)):
            # Checkpoints of earlier versions hold neither: both were θ.
            self.weights.write(state.get(name, state["adapter"]))
            follow(follower, self.parameters, 0.0)
        self.weights.write(state["adapter"])
        self._moved = not _same(state.get("old", state["adapter"]), state["adapter"])
        # Copies: the optimiser would go on in the tensors that it is given, and others read those in the object store.
        self.optimizer.load_state_dict(self._moments(state["optimizer"], self.weights.part))
        self.version = state["version"]
        o = self.config.optimizer  # what the configuration says now, not what the checkpoint was written with
        for group in self.optimizer.param_groups:
            group.update(betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
        first, adapted = state.get("kl_beta", (None, None))
        if first == self.config.objective.first_beta:  # else the configuration asks for a new beginning
            self.kl_beta = adapted

    def save_adapter(self, folder: Path) -> Path:
        """Write the result for the stock pipeline: a LoRA file, or a folder of the transformer's."""
        tensors = self.evaluation_adapter().tensors
        return self.weights.save(folder, tensors) if tensors else folder


def _shared(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values, by the same objects where they equal ``own``'s: a file then holds them once."""
    import torch

    return {name: own[name] if torch.equal(tensor, own[name]) else tensor for name, tensor in tensors.items()}


def _same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    import torch

    return all(one[name] is two[name] or torch.equal(one[name], two[name]) for name in one)


def _check_turns(config: RunConfig, model: Model) -> None:
    """Of sharded experts, all learners have to call the same one at a time.

    Raises:
        ValueError: groups of one training step are trained at noise levels of their own.
    """
    from torch import nn

    window, steps = config.sampling.window, config.sampling.steps
    alike = len({window.select(steps, 0, seed).trained for seed in range(16)}) == 1 and config.objective.needs_noise
    if isinstance(model.transformer, nn.ModuleDict) and not alike:
        raise ValueError(
            "placement.shard_base is true with a model of two experts, and groups of one step are trained at noise levels "
            "of their own, so learners would put different experts together at a time; set sampling.window.shared=true "
            "(and an objective that trains recorded steps), or shard_base=false"
        )


def finite_members(groups: Groups, own: Sequence[int]) -> dict[int, np.ndarray]:
    """bool [G] of each of those groups: whose trajectory is finite."""
    return {i: groups[i].trajectories.finite().numpy() for i in own}


def masked(advantages: Sequence[np.ndarray], finite: Mapping[int, np.ndarray]) -> list[np.ndarray]:
    """The advantages, NaN also for members whose trajectory is not finite."""
    return [np.where(finite.get(i, True), a, np.nan) for i, a in enumerate(advantages)]


def in_order(seen: Sequence[Mapping[str, list[tuple[int, float]]]]) -> dict[str, list[float]]:
    """All ranks' figures in the order of the groups: their means do not depend on how many ranks there are."""
    together = {name: [entry for rank in seen for entry in rank.get(name, [])] for rank in seen for name in rank}
    return {
        name: [value for _, value in sorted(found, key=lambda e: e[0])] for name, found in together.items() if found
    }


def _key(name: str) -> str:
    """A metric's full key: a name that brings its section keeps it."""
    return name if "/" in name else f"policy/{name}"
