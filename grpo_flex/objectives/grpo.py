"""Flow-GRPO (arXiv 2505.05470): a clipped policy gradient on the denoising steps that were taken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from grpo_flex.objectives.base import Anchored, Policy, Term

if TYPE_CHECKING:
    from torch import Tensor

    from grpo_flex.dynamics import Step
    from grpo_flex.types import Trajectories


@dataclass(frozen=True, kw_only=True)
class Grpo(Anchored):
    """L = mean max(−A·r, −A·clip(r, 1−c, 1+c)) + β·KL, with r = exp(log p − log p_old) of each step."""

    clip: float = 1e-4
    """c. So small because log p is a mean over all latent elements."""
    kl_form: Literal["exact", "flow_grpo"] = "exact"
    """exact: ‖μ − μ_ref‖²/(2·std²), with std² = s²Δ of an SDE, as in Flow-GRPO's paper. flow_grpo: ‖μ − μ_ref‖²/(2·s²), as in its
    authors' code (github.com/yifan123/flow_grpo, issue 78): β is not portable between them. CPS's c has no Δ in it, so both are
    the exact form there, which is also that of its authors' code."""

    needs_noise: ClassVar[bool] = True

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if not self.clip > 0:
            yield (
                "clip",
                f"is {self.clip}; it needs to be above 0 (1e-4 … 1e-5 is usual), or every gradient is clipped away",
            )
        if self.kl_form not in ("exact", "flow_grpo"):
            yield "kl_form", f"is {self.kl_form!r}; it needs to be exact or flow_grpo"

    def passes(self, trajectories: Trajectories) -> int:
        return len(trajectories.steps_K)

    def terms(self, policy: Policy, trajectories: Trajectories, advantages_G: Tensor, seed: int) -> Iterator[Term]:
        for k, i in enumerate(trajectories.steps_K):
            new = policy.rescore(trajectories, k)
            log_ratio = self.log_ratio(new, trajectories, k)
            loss, metrics = clipped_surrogate(log_ratio, advantages_G, self.clip)
            weight = self.step_weight(trajectories.sigmas[i], trajectories.sigmas[i + 1])
            kl = self._kl(policy, trajectories, k, new) if self.kl_beta else None
            yield Term(weight * loss, metrics | {f"steps/log_ratio_{i:02d}": log_ratio.detach()}, kl)

    def log_ratio(self, new: Step, trajectories: Trajectories, k: int) -> Tensor:
        """log p − log p_old of the k-th trained step, [G], nats a dimension."""
        return new.logprob - trajectories.logprobs_GK[:, k].to(new.logprob)

    def step_weight(self, sigma: float, sigma_next: float) -> float:
        """Weight of one step's surrogate in the loss."""
        return 1.0

    def _kl(self, policy: Policy, trajectories: Trajectories, k: int, new: Step) -> Tensor:
        i = trajectories.steps_K[k]
        sigma, sigma_next = trajectories.sigmas[i], trajectories.sigmas[i + 1]
        x = trajectories.latents_GKNC[:, k].to(new.mean)
        mean_ref, std = policy.dynamics.moments(x, policy.reference_velocity(x, sigma), sigma, sigma_next)
        without_delta = self.kl_form == "flow_grpo" and getattr(policy.dynamics, "diffuses", True)
        variance = std**2 / (sigma - sigma_next) if without_delta else std**2
        return gaussian_kl(new.mean, mean_ref, variance)


def clipped_surrogate(log_ratio_G: Tensor, advantages_G: Tensor, clip: float) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's pessimistic surrogate for each sibling, [G], and its metrics.

    At log_ratio = 0 the value is −A and the gradient −A·∇log p.
    """
    ratio = log_ratio_G.exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    loss = (-advantages_G * ratio).maximum(-advantages_G * clipped)
    with_clip = ((ratio - 1).abs() > clip).float()
    metrics = {
        "ratio": ratio.detach(),
        "log_ratio_abs": log_ratio_G.detach().abs(),
        "clip_fraction": with_clip,
        "clip_fraction_high": with_clip * (ratio > 1) * (advantages_G > 0),
        "clip_fraction_low": with_clip * (ratio < 1) * (advantages_G < 0),
    }
    return loss, metrics


def gaussian_kl(mean: Tensor, mean_ref: Tensor, variance: float) -> Tensor:
    """KL between Gaussians of equal variance, ‖μ − μ_ref‖²/(2·variance), mean over dims; [G], nats."""
    return ((mean - mean_ref) ** 2).flatten(1).mean(dim=1) / (2 * variance)
