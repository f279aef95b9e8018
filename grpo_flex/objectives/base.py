"""What the learner asks of an objective, and what it offers to one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from grpo_flex.dynamics import Dynamics, Step
    from grpo_flex.types import Trajectories


class Policy(Protocol):
    """The current weights as an objective sees them, bound to one group's prompt."""

    dynamics: Dynamics

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        """v of the adapted model, with gradient; [G, N, C]."""
        ...

    def old_velocity(self, x: Tensor, sigma: float) -> Tensor:
        """v of θ_old, without gradient; [G, N, C].

        θ_old is what the newest rollouts are sampled with. It sampled this group too, unless ``sampling.lookahead`` is
        above 0: the group's weights then are up to so many updates older, and the learner no longer has them.
        """
        ...

    def reference_velocity(self, x: Tensor, sigma: float) -> Tensor:
        """v of the frozen base (adapter disabled), without gradient; [G, N, C]."""
        ...

    def rescore(self, trajectories: Trajectories, k: int) -> Step:
        """The k-th trained step under the current weights: its log-probability, mean and std."""
        ...


class Term(NamedTuple):
    """One backward pass: a loss for each sibling, and numbers to report."""

    loss_G: Tensor
    metrics: Mapping[str, Tensor]
    """Each [G]; averaged over the unmasked siblings and logged as policy/<name>, or under the whole of a name
    that has a section of its own ("steps/log_ratio_03")."""
    kl_G: Tensor | None = None
    """Distance to the frozen base. The learner adds β times it to the loss; β may be adapted as training goes on."""


class Objective(Protocol):
    """A frozen dataclass. ``terms`` yields one Term for each forward-backward pass of a group.

    Those that subclass this class inherit its defaults: on-policy, no noise needed, no pull to the base.
    """

    needs_noise: ClassVar[bool] = False
    """Whether it learns from the density of stochastic steps; without, no step is stored."""
    needs_diffusion: ClassVar[bool] = False
    """Whether it presumes that a step's mean moves with the velocity by about Δ (``Dynamics.diffuses``)."""
    keeps_means: ClassVar[bool] = False
    """Whether rollouts have to store μ_old."""
    keeps_final: ClassVar[bool] = False
    """Whether rollouts have to store x_0."""
    needs_old: ClassVar[bool] = False
    """Whether it asks for ``Policy.old_velocity``, or samples with a slower copy (``old_decay``)."""
    old_sampled: ClassVar[bool] = False
    """Whether θ_old has to be what sampled the group, so that ``sampling.lookahead`` needs to be 0."""
    needs_base: ClassVar[bool] = False
    """Whether it asks for ``Policy.reference_velocity`` whatever β is."""
    whole_groups: ClassVar[bool] = False
    """Whether a sibling's loss depends on the others, so that ``terms`` has to be given whole groups whatever
    ``sampling.micro_batch`` says. Without it, a group may come in parts."""
    still_at_zero: ClassVar[bool] = True
    """Whether zero advantages have no gradient (the pull to the base apart), so that such a group can be passed over."""

    @property
    def first_beta(self) -> float:
        """β that a run begins with: the weight of ``Term.kl_G``."""
        return 0.0

    def next_beta(self, beta: float, kl: float) -> float:
        """β of the next training step, after one whose mean ``kl`` (as in ``Term.kl_G``) was seen."""
        return beta

    def old_decay(self, update: int) -> float:
        """η of θ_old ← η·θ_old + (1−η)·θ after the ``update``-th training step (from 0); θ_old samples the next one.

        0: the newest weights sample.
        """
        return 0.0

    def passes(self, trajectories: Trajectories) -> int:
        """How many Terms ``terms`` will yield: the loss is their mean."""
        ...

    def terms(self, policy: Policy, trajectories: Trajectories, advantages_G: Tensor, seed: int) -> Iterator[Term]:
        """
        Args:
            trajectories, advantages_G: of a group, or of a part of it.
            advantages_G: a masked sibling, whose loss will not count, has the mean of the others': it is neither the best
                nor the worst of the group.
            seed: of all that is drawn at random.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Anchored(Objective):
    """An objective with a pull to the frozen base, whose weight may be adapted towards a target.

    β ← β·exp(kl_rate·clip(log(KL/target), −1, 1)) after each training step: the proportional controller of Ziegler
    et al. (arXiv 1909.08593, section 2.2), in the logarithm so that far too little weighs as much as far too much.
    """

    kl_beta: float = 0.0
    """β of the distance to the frozen base; 0 skips the base's forward pass."""
    kl_target: float = 0.0
    """The distance to hold (nats for a KL); 0 leaves β as it is."""
    kl_rate: float = 0.1
    """Largest change of log β in one training step."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.kl_beta < 0:
            yield "kl_beta", f"is {self.kl_beta}; a negative weight would reward leaving the base model"
        if self.kl_target < 0:
            yield "kl_target", f"is {self.kl_target}; a distance is 0 or more (0: β stays as it is)"
        if self.kl_target > 0 and self.kl_beta == 0:
            yield "kl_beta", "is 0 while kl_target is set; β is adapted by factors, so it needs to begin above 0"
        if not self.kl_rate > 0:
            yield "kl_rate", f"is {self.kl_rate}; it needs to be above 0, or β could not move"

    @property
    def first_beta(self) -> float:
        return self.kl_beta

    def next_beta(self, beta: float, kl: float) -> float:
        if self.kl_target <= 0 or not math.isfinite(kl):
            return beta
        error = math.log(kl / self.kl_target) if kl > 0 else -1.0
        return beta * math.exp(self.kl_rate * min(1.0, max(-1.0, error)))
