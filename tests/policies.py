"""A policy whose velocity is a formula: objectives are tested on it in float64, without any transformer."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from grpo_flex.dynamics import Dynamics, FlowSde, Step, shifted_sigmas, step
from grpo_flex.types import Trajectories

SHAPE = (3, 4)


def v_of(weights: Tensor, x: Tensor, sigma: float) -> Tensor:
    """v = tanh(x·W + σ), element by element; ``weights`` [C, C]."""
    return torch.tanh(x @ weights + sigma)


class FormulaPolicy:
    """θ, θ_old and the base are three matrices; see ``objectives.base.Policy``."""

    def __init__(self, theta: Tensor, old: Tensor, base: Tensor, dynamics: Dynamics | None = None) -> None:
        self.theta, self.old, self.base = theta, old, base
        self.dynamics: Dynamics = dynamics or FlowSde(a=0.7)

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        return v_of(self.theta, x, sigma)

    def old_velocity(self, x: Tensor, sigma: float) -> Tensor:
        return v_of(self.old, x, sigma).detach()

    def reference_velocity(self, x: Tensor, sigma: float) -> Tensor:
        return v_of(self.base, x, sigma).detach()

    def rescore(self, trajectories: Trajectories, k: int) -> Step:
        i, x = trajectories.steps_K[k], trajectories.latents_GKNC[:, k]
        sigma, sigma_next = trajectories.sigmas[i], trajectories.sigmas[i + 1]
        taken = trajectories.next_latents_GKNC[:, k]
        return step(self.dynamics, x, self.velocity(x, sigma), sigma, sigma_next, next_sample=taken)


def matrix(seed: int, scale: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(SHAPE[1], SHAPE[1], generator=generator, dtype=torch.float64)


def clean_group(size: int = 4, seed: int = 0, sigmas: tuple[float, ...] = shifted_sigmas(5, 3.0)) -> Trajectories:
    """Clean samples alone, as a deterministic sampler leaves them; float64."""
    generator = torch.Generator().manual_seed(seed)
    final = torch.randn(size, *SHAPE, generator=generator, dtype=torch.float64)
    none = final.new_zeros(size, 0, *SHAPE)
    return Trajectories(
        latents_GKNC=none,
        next_latents_GKNC=none,
        steps_K=(),
        sigmas=sigmas,
        logprobs_GK=none[:, :, 0, 0],
        final_GNC=final,
    )


def sampled_group(policy: FormulaPolicy, size: int = 4, steps: int = 5, seed: int = 0) -> Trajectories:
    """Every step but the last, sampled by ``policy.old``; float64."""
    generator = torch.Generator().manual_seed(seed)
    sigmas = shifted_sigmas(steps, 3.0)
    x, before, taken = torch.randn(size, *SHAPE, generator=generator, dtype=torch.float64), [], []
    for sigma, sigma_next in pairwise(sigmas[:-1]):
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        before.append(x)
        taken.append(step(policy.dynamics, x, policy.old_velocity(x, sigma), sigma, sigma_next, noise=noise))
        x = taken[-1].next_sample
    return Trajectories(
        latents_GKNC=torch.stack(before, 1), next_latents_GKNC=torch.stack([s.next_sample for s in taken], 1),
        steps_K=tuple(range(steps - 1)), sigmas=sigmas, logprobs_GK=torch.stack([s.logprob for s in taken], 1),
        means_GKNC=torch.stack([s.mean for s in taken], 1), final_GNC=x,
    )  # fmt: skip
