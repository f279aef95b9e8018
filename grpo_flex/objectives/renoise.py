"""Noise put back onto clean samples: what objectives on the forward process (NFT, AWM, Flow-DPO) learn from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from grpo_flex.types import Trajectories


class Renoised(NamedTuple):
    """One noise level of clean samples: x_σ = (1−σ)·x_0 + σ·ε."""

    x: Tensor
    """x_σ, [G, N, C]."""
    sigma: float
    clean: Tensor
    """x_0, [G, N, C]."""
    target: Tensor
    """ε − x_0, the velocity of the straight path; [G, N, C]."""


def renoised(
    trajectories: Trajectories, draws: int, seed: int, device: torch.device, shared: bool = False
) -> Iterator[Renoised]:
    """``draws`` noise levels of a group's clean samples, the same for all siblings.

    Levels are those at which the sampler calls the model, drawn at random from as many equal parts of the
    schedule, so that every group sees early and late ones. Noise is drawn on the CPU, so that every device gets
    the same numbers, and for the whole group, so that a part of it gets what it has in the whole.

    Args:
        shared: one ε for all siblings, instead of one each.
    """
    import torch

    assert trajectories.final_GNC is not None, "the objective has to set keeps_final"
    clean, levels = trajectories.final_GNC.to(device), trajectories.sigmas[:-1]
    siblings = 1 if shared else trajectories.group_size or len(clean)
    own = slice(0, 1) if shared else slice(trajectories.first, trajectories.first + len(clean))
    generator = torch.Generator().manual_seed(seed)
    for k in range(draws):
        place = (k + float(torch.rand((), generator=generator, dtype=torch.float64))) / draws
        sigma = levels[int(place * len(levels))]
        noise = torch.randn((siblings, *clean.shape[1:]), generator=generator, dtype=clean.dtype)[own].to(device)
        yield Renoised((1 - sigma) * clean + sigma * noise, sigma, clean, noise - clean)


def mean_square(difference: Tensor) -> Tensor:
    """‖difference‖² of each sibling, mean over N·C; [G]."""
    return difference.square().flatten(1).mean(dim=1)


def draws_problem(draws: int) -> Iterator[tuple[str, str]]:
    """The complaint about a number of draws that trains nothing."""
    if draws < 1:
        yield "draws", f"is {draws}; it needs at least 1 noise level a sample, or there is nothing to learn from"
