"""Noise put back onto clean samples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo_flex.dynamics import shifted_sigmas
from grpo_flex.objectives.renoise import draws_problem, mean_square, renoised
from tests.policies import clean_group


@given(draws=st.integers(1, 20), steps=st.integers(1, 12), seed=st.integers(0, 2**62))
def test_levels_are_the_samplers_and_spread_over_its_schedule(draws: int, steps: int, seed: int) -> None:
    group = clean_group(sigmas=shifted_sigmas(steps, 3.0))
    levels = [at.sigma for at in renoised(group, draws, seed, torch.device("cpu"))]
    assert len(levels) == draws and set(levels) <= set(group.sigmas[:-1])
    assert levels == sorted(levels, reverse=True)
    if draws % steps == 0:
        assert all(levels.count(sigma) == draws // steps for sigma in group.sigmas[:-1])


@pytest.mark.parametrize("shared", [True, False])
def test_the_path_is_straight(shared: bool) -> None:
    """x_σ − σ·(ε − x_0) = x_0 and x_σ + (1−σ)·(ε − x_0) = ε, in float64."""
    group = clean_group()
    for at in renoised(group, 3, 5, torch.device("cpu"), shared):
        torch.testing.assert_close(at.x - at.sigma * at.target, at.clean, rtol=1e-12, atol=1e-12)
        noise = at.x + (1 - at.sigma) * at.target
        assert torch.allclose(noise[0], noise[1], rtol=0, atol=1e-12) is shared


def test_the_seed_decides() -> None:
    first, again, other = (next(renoised(clean_group(), 1, seed, torch.device("cpu"))).x for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_mean_square_is_for_each_sibling() -> None:
    assert mean_square(torch.tensor([[[1.0, 3.0]], [[0.0, 2.0]]])).tolist() == [5.0, 2.0]


def test_no_draws_is_a_complaint() -> None:
    assert [field for field, _ in draws_problem(0)] == ["draws"] and not list(draws_problem(1))
