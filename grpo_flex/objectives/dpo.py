"""Flow-DPO (VideoAlign, arXiv 2501.13918), online: the best winner of a group against its worst loser."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from grpo_flex.objectives.base import Objective, Policy, Term
from grpo_flex.objectives.renoise import draws_problem, mean_square, renoised

if TYPE_CHECKING:
    from torch import Tensor

    from grpo_flex.types import Trajectories


@dataclass(frozen=True, kw_only=True)
class Dpo(Objective):
    """L = −log sigmoid(−β/2·[(e_w − e_w^ref) − (e_l − e_l^ref)]), e = ‖v(x_σ) − (ε − x_0)‖², (σ, ε) shared by the pair.

    The pair is the sibling with the largest and the one with the smallest advantage. ``advantages.BestAndWorst`` builds
    it as UnifiedReward does; with another advantage it is simply the best and the worst of the group. The reference is
    the frozen base, which is all that holds the policy back: there is no other KL. A pass takes the pair alone through
    the model, two siblings whatever ``sampling.micro_batch`` is.
    """

    beta: float = 500.0
    """β, in units of 1/e. Constant over the noise levels, which the paper finds better than falling with them."""
    draws: int = 4
    """Noise levels for each pair and update."""

    keeps_final: ClassVar[bool] = True
    needs_base: ClassVar[bool] = True
    whole_groups: ClassVar[bool] = True

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from draws_problem(self.draws)
        if not self.beta > 0:
            yield "beta", f"is {self.beta}; it needs to be above 0, or the loss does not depend on the policy"

    def passes(self, trajectories: Trajectories) -> int:
        return self.draws

    def terms(self, policy: Policy, trajectories: Trajectories, advantages_G: Tensor, seed: int) -> Iterator[Term]:
        import torch

        assert trajectories.final_GNC is not None
        best, worst = int(advantages_G.argmax()), int(advantages_G.argmin())
        pair = replace(trajectories, final_GNC=trajectories.final_GNC[[best, worst]])
        # A pair of equals prefers nobody. It keeps its place in the mean, with the gradient 0.
        decided = (advantages_G[best] > advantages_G[worst]).to(advantages_G)
        for at in renoised(pair, self.draws, seed, advantages_G.device, shared=True):
            error = mean_square(policy.velocity(at.x, at.sigma) - at.target)
            error_ref = mean_square(policy.reference_velocity(at.x, at.sigma) - at.target)
            margin = implicit_margin(error, error_ref, self.beta)
            loss = -decided * torch.nn.functional.logsigmoid(margin)
            figures = {"dpo_margin": margin.detach(), "dpo_accuracy": (margin.detach() > 0).to(margin)}
            yield Term(loss.expand_as(advantages_G), {k: v.expand_as(advantages_G) for k, v in figures.items()})


def implicit_margin(error_2: Tensor, error_ref_2: Tensor, beta: float) -> Tensor:
    """−β/2·[(e_w − e_w^ref) − (e_l − e_l^ref)]: how much more than the base the policy prefers the winner; a scalar.

    Args:
        error_2, error_ref_2: matching errors of (winner, loser).
    """
    won, lost = (error_2 - error_ref_2).unbind()
    return -beta / 2 * (won - lost)
