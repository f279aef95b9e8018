"""Advantage-Weighted Matching (AWM, arXiv 2509.25050): the pretraining loss, weighted by the advantage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from grpo_flex.objectives.base import Anchored, Policy, Term
from grpo_flex.objectives.grpo import clipped_surrogate
from grpo_flex.objectives.renoise import draws_problem, mean_square, renoised

if TYPE_CHECKING:
    from torch import Tensor

    from grpo_flex.types import Trajectories


@dataclass(frozen=True, kw_only=True)
class Awm(Anchored):
    """PPO's clipped surrogate on m = −w·‖v(x_σ) − (ε − x_0)‖² at random noise levels of x_0: r = exp(m − m_old).

    m stands in for the log-likelihood of x_0 (its evidence lower bound is an integral of such terms). At the weights
    that sampled the ratio is 1 and the gradient A·w·∇‖v − (ε − x_0)‖²: flow matching weighted by the advantage.

    The ratio weighs x_0 by how likely it is now against how likely it was when it was drawn, so m_old has to be that of the
    weights that drew it. With ``sampling.lookahead`` the learner has only newer ones, and the two are refused together.
    """

    clip: float = 1e-3
    """c: how far exp of the change in matching error (mean over latent elements, times w) may leave 1."""
    weight: float = 1.0
    """w, the same at all noise levels; it scales the ratio's distance from 1, and with it what ``clip`` means."""
    draws: int = 4
    """Noise levels for each sample and update."""

    keeps_final: ClassVar[bool] = True
    needs_old: ClassVar[bool] = True
    old_sampled: ClassVar[bool] = True

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        yield from draws_problem(self.draws)
        for name in ("clip", "weight"):
            if not getattr(self, name) > 0:
                yield name, f"is {getattr(self, name)}; it needs to be above 0, or there is no gradient"

    def passes(self, trajectories: Trajectories) -> int:
        return self.draws

    def terms(self, policy: Policy, trajectories: Trajectories, advantages_G: Tensor, seed: int) -> Iterator[Term]:
        for at in renoised(trajectories, self.draws, seed, advantages_G.device):
            v = policy.velocity(at.x, at.sigma)
            error, old_error = (mean_square(u - at.target) for u in (v, policy.old_velocity(at.x, at.sigma)))
            loss, metrics = clipped_surrogate(self.weight * (old_error - error), advantages_G, self.clip)
            kl = mean_square(v - policy.reference_velocity(at.x, at.sigma)) if self.kl_beta else None
            yield Term(loss, metrics | {"matching_error": error.detach()}, kl)
