"""The clipped surrogate and the KL, on hand-computed numbers and against autograd."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from grpo_flex.dynamics import Cps, Dance, FlowSde
from grpo_flex.objectives.grpo import Grpo, clipped_surrogate, gaussian_kl
from tests.policies import FormulaPolicy, matrix, sampled_group


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_at_ratio_one_the_loss_is_minus_a_and_the_gradient_minus_a() -> None:
    log_ratio, advantages = f64(0, 0, 0).requires_grad_(), f64(2, -1, 0)
    loss, metrics = clipped_surrogate(log_ratio, advantages, clip=1e-4)
    assert torch.equal(loss, -advantages)
    (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
    assert torch.equal(gradient, -advantages)
    assert torch.equal(metrics["ratio"], f64(1, 1, 1)) and not metrics["clip_fraction"].any()


def test_the_surrogate_is_pessimistic() -> None:
    # ratio 1.2 and 0.8 with clip 0.1: gains are cut at the clip, losses are not.
    log_ratio = f64(1.2, 1.2, 0.8, 0.8).log().requires_grad_()
    advantages = f64(1, -1, 1, -1)
    loss, metrics = clipped_surrogate(log_ratio, advantages, clip=0.1)
    torch.testing.assert_close(loss, f64(-1.1, 1.2, -0.8, 0.9))
    (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
    torch.testing.assert_close(gradient, f64(0, 1.2, -0.8, 0))
    assert metrics["clip_fraction"].tolist() == [1, 1, 1, 1]
    assert metrics["clip_fraction_high"].tolist() == [1, 0, 0, 0]
    assert metrics["clip_fraction_low"].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(("dynamics", "s"), [(FlowSde(a=0.7), 0.7 * (0.6 / 0.4) ** 0.5), (Dance(eta=0.3), 0.3)])
def test_kl_is_a_weighted_velocity_distance(dynamics: FlowSde | Dance, s: float) -> None:
    """KL = ‖Δμ‖²/(2s²Δ) = (Δ/2)·(s(1−σ)/(2σ) + 1/s)²·‖Δv‖²."""
    sigma, sigma_next = 0.6, 0.45
    x, v, v_ref = torch.randn(3, 2, 4, 3, dtype=torch.float64)
    mean, std = dynamics.moments(x, v, sigma, sigma_next)
    kl = gaussian_kl(mean, dynamics.moments(x, v_ref, sigma, sigma_next)[0], std**2)
    delta = sigma - sigma_next
    expected = delta / 2 * (s * (1 - sigma) / (2 * sigma) + 1 / s) ** 2 * ((v - v_ref) ** 2).mean(dim=(1, 2))
    torch.testing.assert_close(kl, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("form", "without_delta"), [("exact", False), ("flow_grpo", True)])
def test_the_two_forms_of_the_kl_by_hand(form: Literal["exact", "flow_grpo"], without_delta: bool) -> None:
    """‖μ − μ_ref‖²/(2·s²Δ), and as in Flow-GRPO's code ‖μ − μ_ref‖²/(2·s²); s = a·√(σ/(1−σ)), at σ = 1 with 1 − σ'."""
    a, policy = 0.7, FormulaPolicy(matrix(1), matrix(2), matrix(9), FlowSde(a=0.7))
    taken = sampled_group(policy)
    for k, term in enumerate(Grpo(kl_beta=1.0, kl_form=form).terms(policy, taken, f64(1, -1, 0, 0), 0)):
        x, sigma, sigma_next = taken.latents_GKNC[:, k], taken.sigmas[k], taken.sigmas[k + 1]
        delta, s2 = sigma - sigma_next, a**2 * sigma / (1 - (sigma if k else sigma_next))
        difference = policy.velocity(x, sigma) - policy.reference_velocity(x, sigma)
        apart = (1 + s2 * (1 - sigma) / (2 * sigma)) * delta * difference  # what μ has of v
        expected = (apart**2).mean(dim=(1, 2)) / (2 * s2 * (1 if without_delta else delta))
        assert term.kl_G is not None
        torch.testing.assert_close(term.kl_G, expected, rtol=1e-10, atol=1e-12)


def test_both_forms_of_the_kl_of_cps_are_the_exact_one() -> None:
    """Its standard deviation is σ'·sin(aπ/2), and Flow-CPS divides by twice its square."""
    policy = FormulaPolicy(matrix(1), matrix(2), matrix(9), Cps(a=0.6))
    taken = sampled_group(policy)
    forms: tuple[Literal["exact", "flow_grpo"], ...] = ("exact", "flow_grpo")
    one, two = ([*Grpo(kl_beta=1.0, kl_form=form).terms(policy, taken, f64(1, -1, 0, 0), 0)] for form in forms)
    for exact, other in zip(one, two, strict=True):
        assert exact.kl_G is not None and other.kl_G is not None and exact.kl_G.any()
        assert torch.equal(exact.kl_G, other.kl_G)


def test_kl_is_that_of_torch_distributions() -> None:
    from torch.distributions import Normal, kl_divergence

    x, v, v_ref = torch.randn(3, 2, 4, 3, dtype=torch.float64)
    mean, std = Cps(a=0.5).moments(x, v, 0.6, 0.4)
    mean_ref, _ = Cps(a=0.5).moments(x, v_ref, 0.6, 0.4)
    expected = kl_divergence(Normal(mean, std), Normal(mean_ref, std)).mean(dim=(1, 2))
    torch.testing.assert_close(gaussian_kl(mean, mean_ref, std**2), expected, rtol=1e-10, atol=1e-12)
