"""GRPO-Guard (arXiv 2510.22319): Flow-GRPO with a ratio that is centred at 1 and alike at all noise levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from grpo_flex.objectives.grpo import Grpo

if TYPE_CHECKING:
    from torch import Tensor

    from grpo_flex.dynamics import Step
    from grpo_flex.types import Trajectories


@dataclass(frozen=True, kw_only=True)
class Guard(Grpo):
    """Grpo's loss with the paper's RatioNorm, and each step's gradient weighted by 1/Δ.

    r̂ = exp(s√Δ·(log r + ‖μ − μ_old‖²/(2·s²Δ))). With x' = μ_old + s√Δ·ε the exponent is mean(ε·(μ − μ_old)): it has
    mean 0, where log r has the mean −‖μ − μ_old‖²/(2·s²Δ), and it does not depend on how noisy the step is. What is
    left of a step's scale is ∂μ/∂v, about Δ in an SDE, which the weight takes out. In CPS, whose mean moves otherwise with
    v, it would not: refused.
    """

    clip: float = 4e-6
    """c, on r̂'s own scale (the paper: 2e-6 … 4e-6; Pref-GRPO's runs: 1e-4)."""

    keeps_means: ClassVar[bool] = True
    needs_diffusion: ClassVar[bool] = True

    def log_ratio(self, new: Step, trajectories: Trajectories, k: int) -> Tensor:
        """log r̂ = mean((x' − μ_old)·(μ − μ_old))/(s√Δ), [G].

        The same number as the definition's, without the difference of two log-probabilities of order 1, whose
        rounding in float32 is not small against such clip ranges.
        """
        assert trajectories.means_GKNC is not None
        old_mean = trajectories.means_GKNC[:, k].to(new.mean)
        return ((new.next_sample - old_mean) * (new.mean - old_mean)).flatten(1).mean(dim=1) / new.std

    def step_weight(self, sigma: float, sigma_next: float) -> float:
        return 1 / (sigma - sigma_next)
