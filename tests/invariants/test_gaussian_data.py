"""For Gaussian data the velocity is known in closed form, so the sampler's whole distribution can be followed.

N(m, S²): v = −m + (σ − (1−σ)S²)/((1−σ)²S² + σ²)·(x − (1−σ)m). Every dynamics here is affine in x, so mean and
variance propagate exactly; the final variance has to converge to S² as the number of steps grows.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from grpo_flex.dynamics import Cps, Dance, Dynamics, FlowSde, Multistep, Ode, Past, Solver, shifted_sigmas

S2 = 0.3
EXPECTED = {
    "ode": (Ode(), {10: 0.171, 40: 0.262, 400: 0.296, 4000: 0.2996}),
    "flow_sde": (FlowSde(a=0.7), {10: 0.219, 40: 0.277, 400: 0.299, 4000: 0.3002}),
    "dance": (Dance(eta=0.3), {10: 0.183, 40: 0.265, 400: 0.296, 4000: 0.2996}),
}


def velocity(x: torch.Tensor, sigma: float, mean: float) -> torch.Tensor:
    slope = (sigma - (1 - sigma) * S2) / ((1 - sigma) ** 2 * S2 + sigma**2)
    return -mean + slope * (x - (1 - sigma) * mean)


def final_moments(
    dynamics: Dynamics, steps: int, data_mean: float, last: Dynamics | None = None
) -> tuple[float, float]:
    """Exact mean and variance of x_0; ``last`` takes the last step (rollouts: ODE)."""
    schedule, mean, variance = shifted_sigmas(steps, 3.0), 0.0, 1.0
    for i, (sigma, sigma_next) in enumerate(pairwise(schedule)):
        x = torch.tensor([[[0.0]], [[1.0]]], dtype=torch.float64)
        now = dynamics if i < steps - 1 or last is None else last
        mu, std = now.moments(x, velocity(x, sigma, data_mean), sigma, sigma_next)
        offset, slope = float(mu[0]), float(mu[1] - mu[0])
        mean, variance = offset + slope * mean, slope**2 * variance + std**2
    return mean, variance


@pytest.mark.parametrize("name", EXPECTED)
def test_final_variance_converges_to_that_of_the_data(name: str) -> None:
    dynamics, expected = EXPECTED[name]
    for steps, variance in expected.items():
        assert final_moments(dynamics, steps, 0.0)[1] == pytest.approx(variance, abs=6e-4 if steps < 4000 else 6e-5)


@pytest.mark.parametrize("name", EXPECTED)
def test_an_ode_last_step_does_not_change_the_limit(name: str) -> None:
    assert final_moments(EXPECTED[name][0], 4000, 0.0, last=Ode())[1] == pytest.approx(S2, abs=1e-3)


@pytest.mark.parametrize("name", EXPECTED)
def test_final_mean_converges_to_that_of_the_data(name: str) -> None:
    assert final_moments(EXPECTED[name][0], 4000, 0.8)[0] == pytest.approx(0.8, abs=2e-3)


def test_cps_does_not_preserve_the_variance() -> None:
    assert abs(final_moments(Cps(a=0.7), 4000, 0.0)[1] - S2) > 0.02


@pytest.mark.parametrize("sigma", [0.05, 0.4, 0.9])
@pytest.mark.parametrize("dynamics", [FlowSde(a=0.7), Dance(eta=0.3)], ids=["flow_sde", "dance"])
def test_the_drift_takes_the_score_from_the_velocity(dynamics: Dynamics, sigma: float) -> None:
    """∇log p_σ = −(x − (1−σ)·x̂0)/σ², with x̂0 = x − σv, whatever v is."""
    x, v = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    score = -(x - (1 - sigma) * (x - sigma * v)) / sigma**2
    mu, std = dynamics.moments(x, v, sigma, sigma / 2)
    drift = mu - Ode().moments(x, v, sigma, sigma / 2)[0]
    torch.testing.assert_close(drift, std**2 / 2 * score, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dynamics", [FlowSde(a=0.7), Dance(eta=0.3)], ids=["flow_sde", "dance"])
def test_an_sde_drifts_by_half_its_noise_times_the_score(dynamics: Dynamics) -> None:
    """μ − μ_ODE = s²Δ/2·∇log p, with the score ∇log p of N((1−σ)m, (1−σ)²S² + σ²) itself."""
    x, sigma, mean = torch.linspace(-2, 2, 9, dtype=torch.float64), 0.4, 0.5
    v = velocity(x, sigma, mean)
    mu, std = dynamics.moments(x, v, sigma, 0.25)
    drift = mu - Ode().moments(x, v, sigma, 0.25)[0]
    score = -(x - (1 - sigma) * mean) / ((1 - sigma) ** 2 * S2 + sigma**2)
    torch.testing.assert_close(drift, std**2 / 2 * score, rtol=1e-12, atol=1e-12)


def solved_variance(solver: Solver, steps: int) -> float:
    """Exact variance of x_0 under a deterministic solver: it is linear in x, so one point shows its slope."""
    x, past = torch.ones(1, 1, 1, dtype=torch.float64), None
    for sigma, sigma_next in pairwise(shifted_sigmas(steps, 3.0)):
        v = velocity(x, sigma, 0.0)
        x, past = solver.advance(x, v, sigma, sigma_next, past), Past(v, sigma)
    return float(x) ** 2


@pytest.mark.parametrize(("solver", "order"), [(Ode(), 1), (Multistep(), 2)], ids=["euler", "multistep"])
def test_halving_the_steps_size_divides_the_error_by_two_to_the_order(solver: Solver, order: int) -> None:
    errors = [abs(solved_variance(solver, steps) - S2) for steps in (1000, 2000, 4000)]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.05)


@pytest.mark.parametrize("steps", [10, 20, 40])
def test_the_second_order_solver_is_better_at_the_same_number_of_calls(steps: int) -> None:
    euler, second = (abs(solved_variance(solver, steps) - S2) for solver in (Ode(), Multistep()))
    assert second < euler / 5
