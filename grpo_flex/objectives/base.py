"""What the learner asks of an objective, and what it offers to one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    """Each [G]; averaged over the unmasked siblings and logged as policy/<name>."""


class Objective(Protocol):
    """A frozen dataclass. ``terms`` yields one Term for each forward-backward pass of a group."""

    needs_noise: ClassVar[bool]
    """Whether it learns from the density of stochastic steps."""
    keeps_means: ClassVar[bool]
    """Whether rollouts have to store μ_old."""
    keeps_final: ClassVar[bool]
    """Whether rollouts have to store x_0."""

    def passes(self, trajectories: Trajectories) -> int:
        """How many Terms ``terms`` will yield: the loss is their mean."""
        ...

    def terms(self, policy: Policy, trajectories: Trajectories, advantages_G: Tensor, seed: int) -> Iterator[Term]: ...
