"""One step function, against torch.distributions and against the mathematics (float64)."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal

from grpo_flex.dynamics import (
    AllButLast,
    Cps,
    Dance,
    Dynamics,
    FastWindow,
    FlowSde,
    Multistep,
    Ode,
    Past,
    RandomFraction,
    SlidingWindow,
    Window,
    gaussian_logprob,
    shifted_sigmas,
    step,
)

DYNAMICS = [FlowSde(a=0.7), Dance(eta=0.3), Cps(a=0.6)]
STILL = [Ode(), FlowSde(a=0.0), Dance(eta=0.0), Cps(a=0.0)]
sigmas = st.floats(0.05, 1.0)


def latents(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, v, noise = torch.randn(3, 2, 5, 4, generator=generator, dtype=torch.float64)
    return x, v, noise


@pytest.mark.parametrize("dynamics", STILL, ids=lambda d: type(d).__name__)
@given(sigma=sigmas, share=st.floats(0.0, 0.99))
def test_without_noise_every_dynamics_is_the_euler_step(dynamics: Dynamics, sigma: float, share: float) -> None:
    x, v, _ = latents()
    taken = step(dynamics, x, v, sigma, sigma * share)
    assert torch.equal(taken.next_sample, taken.mean)
    torch.testing.assert_close(taken.mean, x - v * (sigma - sigma * share), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dynamics", DYNAMICS, ids=lambda d: type(d).__name__)
def test_logprob_is_the_normal_density(dynamics: Dynamics) -> None:
    x, v, noise = latents()
    taken = step(dynamics, x, v, 0.8, 0.6, noise=noise)
    expected = Normal(taken.mean, taken.std).log_prob(taken.next_sample).mean(dim=(1, 2))
    torch.testing.assert_close(taken.logprob, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dynamics", DYNAMICS, ids=lambda d: type(d).__name__)
def test_a_step_is_its_mean_and_its_noise_times_its_standard_deviation(dynamics: Dynamics) -> None:
    x, v, noise = latents()
    taken, (mean, std) = step(dynamics, x, v, 0.8, 0.6, noise=noise), dynamics.moments(x, v, 0.8, 0.6)
    assert std > 0 and torch.equal(taken.next_sample, mean + std * noise)


@pytest.mark.parametrize("dynamics", DYNAMICS, ids=lambda d: type(d).__name__)
def test_rescoring_gives_the_sampled_logprob_bit_for_bit(dynamics: Dynamics) -> None:
    x, v, noise = (t.float() for t in latents())
    taken = step(dynamics, x, v, 0.8, 0.6, noise=noise)
    again = step(dynamics, x, v, 0.8, 0.6, next_sample=taken.next_sample)
    assert torch.equal(taken.logprob, again.logprob) and torch.equal(taken.mean, again.mean)


@given(steps=st.integers(2, 60), shift=st.floats(0.5, 8.0), a=st.floats(0.1, 2.0))
def test_first_flow_sde_step_has_std_a(steps: int, shift: float, a: float) -> None:
    x, v, noise = latents()
    schedule = shifted_sigmas(steps, shift)
    taken = step(FlowSde(a=a), x, v, schedule[0], schedule[1], noise=noise)
    assert taken.std == pytest.approx(a, rel=1e-12)


def test_flow_sde_mean_is_the_published_drift() -> None:
    x, v, _ = latents()
    sigma, sigma_next, a = 0.7, 0.5, 0.9
    s, dt = a * math.sqrt(sigma / (1 - sigma)), sigma_next - sigma
    mean = x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    torch.testing.assert_close(FlowSde(a=a).moments(x, v, sigma, sigma_next)[0], mean, rtol=1e-12, atol=1e-12)


@given(sigma=sigmas, share=st.floats(0.0, 0.99), a=st.floats(0.01, 1.0))
def test_cps_keeps_the_noise_level(sigma: float, share: float, a: float) -> None:
    """√(σ'² − c²)² + c² = σ'²: from unit noise and a zero picture, the next latent has std σ'."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    x, v = sigma * one, one  # x0 = 0, ε = 1
    mean, c = Cps(a=a).moments(x, v, sigma, sigma * share)
    assert float(mean) ** 2 + c**2 == pytest.approx((sigma * share) ** 2, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("a", [0.3, 0.7])
def test_cps_has_a_share_of_fresh_noise_by_formula(a: float) -> None:
    x, v, _ = latents()
    assert Cps(a=a).moments(x, v, 0.8, 0.6)[1] == pytest.approx(0.6 * math.sin(a * math.pi / 2), rel=1e-12)


def test_cps_with_a_1_is_entirely_fresh_noise() -> None:
    x, v, _ = latents()
    mean, c = Cps(a=1.0).moments(x, v, 0.8, 0.6)
    assert c == pytest.approx(0.6)
    torch.testing.assert_close(mean, (1 - 0.6) * (x - 0.8 * v), rtol=0, atol=1e-7)


def test_a_stochastic_step_without_noise_is_refused() -> None:
    x, v, _ = latents()
    with pytest.raises(ValueError, match="needs noise"):
        step(FlowSde(), x, v, 0.8, 0.6)


def test_a_deterministic_step_has_no_density() -> None:
    x, v, _ = latents()
    assert torch.equal(gaussian_logprob(x, v, 0.0), torch.zeros(2, dtype=torch.float64))


@given(steps=st.integers(1, 100), shift=st.floats(0.2, 12.0))
def test_schedule_falls_from_one_to_zero(steps: int, shift: float) -> None:
    schedule = shifted_sigmas(steps, shift)
    assert len(schedule) == steps + 1 and schedule[0] == 1 and schedule[-1] == 0
    assert all(a > b for a, b in pairwise(schedule))


WINDOWS = [AllButLast(), RandomFraction(fraction=0.6), FastWindow(size=2, last_start=3), SlidingWindow(size=3, every=2),
           SlidingWindow(size=2, flash=0.4)]  # fmt: skip


@pytest.mark.parametrize("window", WINDOWS, ids=lambda w: type(w).__name__)
@given(steps=st.integers(6, 40), iteration=st.integers(0, 500), seed=st.integers(0, 2**62))
def test_windows_train_only_stochastic_steps_and_never_the_last(
    window: Window, steps: int, iteration: int, seed: int
) -> None:
    assert not list(window.fits(steps))
    chosen = window.select(steps, iteration, seed)
    assert chosen == window.select(steps, iteration, seed)
    assert chosen.trained and set(chosen.trained) <= chosen.stochastic
    assert list(chosen.trained) == sorted(set(chosen.trained))
    assert max(chosen.stochastic) < steps - 1
    schedule = chosen.schedule(shifted_sigmas(steps, 3.0))
    assert schedule[0] == 1 and schedule[-1] == 0 and max(chosen.stochastic) < len(schedule) - 2
    end = max(chosen.trained) + 2
    assert schedule[:end] == shifted_sigmas(steps, 3.0)[:end]  # trained steps are where they were


def test_sliding_window_moves_and_begins_anew() -> None:
    window = SlidingWindow(size=4, stride=1, every=25)
    starts = [window.select(10, i, 0).trained[0] for i in range(0, 200, 25)]
    assert starts == [0, 1, 2, 3, 4, 5, 0, 1]


@pytest.mark.parametrize(
    "window", [FastWindow(size=3, last_start=2), FastWindow(size=5, last_start=9), SlidingWindow(size=5)], ids=str
)
def test_a_window_outside_the_schedule_is_named(window: FastWindow | SlidingWindow) -> None:
    (field, complaint), *_ = window.fits(5)
    assert field == ("size" if window.size > 4 else "last_start") and "sampling.steps=5" in complaint


@given(steps=st.integers(2, 40), fraction=st.floats(0.01, 1.0), seed=st.integers(0, 2**62))
def test_a_random_fraction_is_that_share_of_the_steps_but_the_last(steps: int, fraction: float, seed: int) -> None:
    chosen = RandomFraction(fraction=fraction).select(steps, 0, seed)
    assert len(chosen.trained) == max(1, round(fraction * (steps - 1)))
    assert chosen.stochastic == frozenset(range(steps - 1))


def test_a_shared_fraction_is_one_choice_a_training_step() -> None:
    """By the step alone; otherwise by the group's seed alone."""
    for shared in (True, False):
        window = RandomFraction(fraction=0.5, shared=shared)
        by_seed = {window.select(20, 3, seed).trained for seed in range(20)}
        by_step = {window.select(20, iteration, 5).trained for iteration in range(20)}
        assert (len(by_seed) == 1, len(by_step) == 1) == (shared, not shared)


def test_a_fast_window_starts_anywhere_up_to_its_last_start_by_the_groups_seed() -> None:
    window = FastWindow(size=2, last_start=3)
    starts = {window.select(10, 0, seed).trained[0] for seed in range(100)}
    assert starts == {0, 1, 2, 3}
    assert len({window.select(10, iteration, 7).trained for iteration in range(20)}) == 1


@pytest.mark.parametrize(("flash", "left"), [(1.0, 6), (0.5, 3), (0.4, 2), (0.01, 1)])
def test_flash_leaves_a_share_of_the_steps_after_the_window(flash: float, left: int) -> None:
    chosen = SlidingWindow(size=3, every=1, flash=flash).select(10, 1, 0)
    assert chosen.trained == (1, 2, 3)
    assert len(chosen.schedule(shifted_sigmas(10, 3.0))) - 1 == 4 + left


@given(past=st.floats(0.5, 1.0), now=st.floats(0.2, 0.49), after=st.floats(0.0, 0.19))
def test_the_multistep_solver_is_exact_for_a_velocity_linear_in_sigma(past: float, now: float, after: float) -> None:
    """v = a + bσ along the path: x(σ) = aσ + bσ²/2."""
    a, b, _ = latents()
    taken = Multistep().advance(a * now + b * now**2 / 2, a + b * now, now, after, Past(a + b * past, past))
    torch.testing.assert_close(taken, a * after + b * after**2 / 2, rtol=1e-10, atol=1e-10)


def test_without_a_past_every_solver_takes_an_euler_step() -> None:
    x, v, _ = latents()
    euler = x - v * (0.8 - 0.6)
    for solver in (Ode(), Multistep()):
        torch.testing.assert_close(solver.advance(x, v, 0.8, 0.6, None), euler, rtol=1e-12, atol=1e-12)
    assert torch.equal(Ode().advance(x, v, 0.8, 0.6, Past(x, 0.9)), step(Ode(), x, v, 0.8, 0.6).next_sample)


@pytest.mark.parametrize("flash", [0.0, 1.5])
def test_an_impossible_flash_is_a_complaint(flash: float) -> None:
    assert [field for field, _ in SlidingWindow(flash=flash).problems()] == ["flash"]
