"""GRPO-Guard's ratio norm, and the gradients of the objectives on denoising steps, in float64."""

from __future__ import annotations

import pytest
import torch

from grpo_flex.dynamics import Cps, Dance, Dynamics, FlowSde
from grpo_flex.objectives.grpo import Grpo, gaussian_kl
from grpo_flex.objectives.guard import Guard
from tests.policies import FormulaPolicy, matrix, sampled_group

DYNAMICS = [FlowSde(a=0.7), Dance(eta=0.3), Cps(a=0.6)]
ADVANTAGES = torch.tensor([1.5, -0.5, -1.0, 0.0], dtype=torch.float64)
named = pytest.mark.parametrize("dynamics", DYNAMICS, ids=lambda d: type(d).__name__)


def loss(objective: Grpo, policy: FormulaPolicy) -> torch.Tensor:
    found = torch.zeros((), dtype=torch.float64)
    for term in objective.terms(policy, sampled_group(policy), ADVANTAGES, 0):
        found = found + term.loss_G.sum()
        if term.kl_G is not None:
            found = found + objective.first_beta * term.kl_G.sum()
    return found


@named
def test_the_ratio_is_the_published_one(dynamics: Dynamics) -> None:
    """log r̂ = std·(log r + ‖μ − μ_old‖²/(2·std²))."""
    policy = FormulaPolicy(matrix(1), matrix(2), matrix(9), dynamics)
    group = sampled_group(policy)
    assert group.means_GKNC is not None
    for k in range(len(group.steps_K)):
        new = policy.rescore(group, k)
        plain = new.logprob - group.logprobs_GK[:, k]
        expected = new.std * (plain + gaussian_kl(new.mean, group.means_GKNC[:, k], new.std**2))
        torch.testing.assert_close(Guard().log_ratio(new, group, k), expected, rtol=1e-8, atol=1e-12)


@named
def test_it_is_centred_where_the_plain_ratio_is_shifted(dynamics: Dynamics) -> None:
    """Over many siblings the plain log ratio has the mean −KL, the normalised one 0 (within three standard errors)."""
    policy = FormulaPolicy(matrix(1), matrix(2), matrix(9), dynamics)
    group = sampled_group(policy, size=4000)
    new = policy.rescore(group, 2)
    assert group.means_GKNC is not None
    kl = gaussian_kl(new.mean, group.means_GKNC[:, 2], new.std**2)
    plain, guarded = (objective.log_ratio(new, group, 2) for objective in (Grpo(), Guard()))
    assert abs(float(guarded.mean())) < 3 * float(guarded.std()) / 4000**0.5
    assert float((plain + kl).mean()) == pytest.approx(0, abs=3 * float((plain + kl).std()) / 4000**0.5)
    assert float(plain.mean()) < -0.5 * float(kl.mean())


@named
def test_at_the_old_weights_the_ratio_is_exactly_one(dynamics: Dynamics) -> None:
    policy = FormulaPolicy(matrix(1), matrix(1), matrix(9), dynamics)
    group = sampled_group(policy)
    for k, term in enumerate(Guard().terms(policy, group, ADVANTAGES, 0)):
        assert torch.equal(term.metrics["ratio"], torch.ones(4, dtype=torch.float64))
        delta = group.sigmas[k] - group.sigmas[k + 1]
        torch.testing.assert_close(term.loss_G, -ADVANTAGES / delta, rtol=1e-12, atol=0)


@named
@pytest.mark.parametrize("objective", [Grpo(clip=10.0), Grpo(clip=10.0, kl_beta=0.3), Guard(clip=10.0)], ids=str)
def test_gradients_are_those_of_finite_differences(dynamics: Dynamics, objective: Grpo) -> None:
    theta, step = matrix(1).requires_grad_(), 1e-6
    (analytic,) = torch.autograd.grad(loss(objective, FormulaPolicy(theta, matrix(2), matrix(9), dynamics)), theta)
    for place in [(0, 0), (1, 2), (3, 1)]:
        nudge = torch.zeros_like(theta)
        nudge[place] = step
        up, down = (
            loss(objective, FormulaPolicy(theta.detach() + sign * nudge, matrix(2), matrix(9), dynamics))
            for sign in (1, -1)
        )
        assert float(analytic[place]) == pytest.approx(float(up - down) / (2 * step), rel=1e-5, abs=1e-7)


@named
def test_at_ratio_one_the_gradient_is_minus_advantage_times_score(dynamics: Dynamics) -> None:
    """Also for the normalised ratio: there it is std/Δ·(−A·∇log p) of each step."""
    theta = matrix(1).requires_grad_()
    policy = FormulaPolicy(theta, theta, matrix(9), dynamics)
    group = sampled_group(policy)
    for objective in (Grpo(), Guard()):
        for k, term in enumerate(objective.terms(policy, group, ADVANTAGES, 0)):
            new = policy.rescore(group, k)
            scale = new.std / (group.sigmas[k] - group.sigmas[k + 1]) if isinstance(objective, Guard) else 1.0
            (expected,) = torch.autograd.grad((-ADVANTAGES * new.logprob).sum() * scale, theta)
            (found,) = torch.autograd.grad(term.loss_G.sum(), theta)
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_the_log_ratio_of_each_step_is_reported_under_its_index() -> None:
    policy = FormulaPolicy(matrix(1), matrix(2), matrix(9))
    group = sampled_group(policy)
    for k, term in enumerate(Grpo().terms(policy, group, ADVANTAGES, 0)):
        expected = policy.rescore(group, k).logprob - group.logprobs_GK[:, k]
        assert torch.equal(term.metrics[f"steps/log_ratio_{k:02d}"], expected)


def test_impossible_settings_are_complaints() -> None:
    assert [f for f, _ in Guard(clip=0.0).problems()] == ["clip"]
    assert [f for f, _ in Guard(kl_form="other").problems()] == ["kl_form"]  # pyright: ignore[reportArgumentType]
    assert [f for f, _ in Grpo(kl_beta=-1.0).problems()] == ["kl_beta"]


@pytest.mark.parametrize(("kl", "factor"), [(0.02, 1.0), (0.0, -1.0), (1.0, 1.0), (0.01, 0.0), (0.015, 0.405465)])
def test_beta_moves_towards_the_target(kl: float, factor: float) -> None:
    """log β by 0.1·clip(log(KL/target), ±1); 0.02 is e^0.69 times the target."""
    objective = Grpo(kl_beta=0.5, kl_target=0.01, kl_rate=0.1)
    factor = 0.693147 if kl == 0.02 else factor
    assert objective.next_beta(0.5, kl) == pytest.approx(0.5 * 2.718281828 ** (0.1 * factor), rel=1e-5)


def test_without_a_target_beta_stays() -> None:
    assert Grpo(kl_beta=0.5).next_beta(0.25, 3.0) == 0.25
    assert Grpo(kl_beta=0.5, kl_target=0.1).next_beta(0.25, float("nan")) == 0.25
