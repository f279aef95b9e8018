"""DiffusionNFT (arXiv 2509.16117): reinforcement on the forward process; no likelihoods, any ODE sampler.

The loss of eq. (5) with the paper's practical choices: a prediction of x_0 whose error is normalised by its own size,
and a soft update of the policy that samples. The paper trains without classifier-free guidance: set the generator's to
none. Where it is on, the guided velocity is what is trained, at twice the cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from grpo_flex.objectives.base import Anchored, Policy, Term
from grpo_flex.objectives.renoise import Renoised, draws_problem, mean_square, renoised

if TYPE_CHECKING:
    from torch import Tensor

    from grpo_flex.types import Trajectories


@dataclass(frozen=True, kw_only=True)
class Nft(Anchored):
    """L = (r·e⁺ + (1−r)·e⁻)/β at random noise levels of x_0, with r = clip(A/(2·A_max) + ½, 0, 1).

    e± = ‖x̂_0± − x_0‖²/sg(mean|x̂_0± − x_0|), x̂_0± = x_σ − σ·v±, v⁺ = (1−β)·v_old + β·v, v⁻ = (1+β)·v_old − β·v.
    v_old belongs to the policy that samples, θ_old ← η·θ_old + (1−η)·θ with η = min(old_rate·update, old_max).

    With ``sampling.lookahead`` the group was drawn by an earlier θ_old, of the velocity v_s. Without the normalisation the
    loss is smallest at β·(v − v_old) = 2·r̄·(v⁺* − v_s) + (2·r̄−1)·(v_s − v_old), where v⁺* belongs to the good samples and r̄ is
    the mean of r at x_σ: the direction of improvement stays, and a pull to v_s (for r̄ > ½) comes with it, which is small
    since r̄ is about ½ where advantages have the mean 0. No ratio of likelihoods is taken, so nothing else asks for v_s.
    """

    beta: float = 1.0
    """β: how far v⁺ and v⁻ are from v_old, in units of v − v_old; the smaller, the larger the step that is asked for."""
    advantage_max: float = 2.0
    """A_max: an advantage of this size makes a sample wholly good (r = 1) or wholly bad (r = 0)."""
    draws: int = 4
    """Noise levels for each sample and update."""
    old_rate: float = 0.001
    """How fast the decay η of the policy that samples grows with the training steps."""
    old_max: float = 0.5
    """Its largest value; 0 samples with the newest weights."""

    keeps_final: ClassVar[bool] = True
    needs_old: ClassVar[bool] = True
    still_at_zero: ClassVar[bool] = False  # r = ½ pulls v back to v_old

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        yield from draws_problem(self.draws)
        if not self.beta > 0:
            yield "beta", f"is {self.beta}; it needs to be above 0: at 0 both branches are v_old, and nothing is learnt"
        if not self.advantage_max > 0:
            yield "advantage_max", f"is {self.advantage_max}; it divides the advantages and needs to be above 0"
        if self.old_rate < 0:
            yield "old_rate", f"is {self.old_rate}; it cannot be negative (0: the newest weights sample)"
        if not 0 <= self.old_max < 1:
            yield (
                "old_max",
                f"is {self.old_max}; it needs to be 0 or more and below 1, where sampling would never change",
            )

    def old_decay(self, update: int) -> float:
        return min(self.old_rate * update, self.old_max)

    def passes(self, trajectories: Trajectories) -> int:
        return self.draws

    def terms(self, policy: Policy, trajectories: Trajectories, advantages_G: Tensor, seed: int) -> Iterator[Term]:
        good = (advantages_G / (2 * self.advantage_max) + 0.5).clamp(0, 1)
        for at in renoised(trajectories, self.draws, seed, advantages_G.device):
            v, old = policy.velocity(at.x, at.sigma), policy.old_velocity(at.x, at.sigma)
            positive, negative = branches(v, old, self.beta)
            loss = (good * clean_error(at, positive) + (1 - good) * clean_error(at, negative)) / self.beta
            kl = mean_square(v - policy.reference_velocity(at.x, at.sigma)) if self.kl_beta else None
            moved = mean_square(v.detach() - old).sqrt()
            yield Term(loss, {"optimality": good, "moved": moved}, kl)


def branches(v: Tensor, old: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """v⁺ = (1−β)·v_old + β·v and v⁻ = (1+β)·v_old − β·v: the mean of both is v_old, whatever v is."""
    step = beta * (v - old)
    return old + step, old - step


def clean_error(at: Renoised, v: Tensor) -> Tensor:
    """‖x̂_0 − x_0‖²/sg(mean|x̂_0 − x_0|), mean over dims; [G]. Its scale is that of an error, not of its square."""
    error = at.x - at.sigma * v - at.clean
    size = error.detach().abs().flatten(1).mean(dim=1)
    return mean_square(error) / size.clamp_min(1e-5)
