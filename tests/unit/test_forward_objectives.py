"""NFT, AWM and Flow-DPO against their formulas, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo_flex.objectives.awm import Awm
from grpo_flex.objectives.base import Objective
from grpo_flex.objectives.dpo import Dpo, implicit_margin
from grpo_flex.objectives.nft import Nft, branches, clean_error
from grpo_flex.objectives.renoise import Renoised, mean_square, renoised
from tests.policies import FormulaPolicy, clean_group, matrix

CPU = torch.device("cpu")
ADVANTAGES = torch.tensor([1.5, -0.5, -1.0, 0.0], dtype=torch.float64)


def total(objective: Objective, policy: FormulaPolicy, advantages: torch.Tensor = ADVANTAGES) -> torch.Tensor:
    """Σ of all terms' losses, with the distance to the base at its first weight."""
    loss = torch.zeros((), dtype=torch.float64)
    terms = list(objective.terms(policy, clean_group(), advantages, 3))
    assert len(terms) == objective.passes(clean_group())
    for term in terms:
        loss = loss + term.loss_G.sum()
        if term.kl_G is not None:
            loss = loss + objective.first_beta * term.kl_G.sum()
    return loss


def gradient(objective: Objective, theta: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor = ADVANTAGES):
    theta = theta.clone().requires_grad_()
    (found,) = torch.autograd.grad(total(objective, FormulaPolicy(theta, old, matrix(9)), advantages), theta)
    return found


# ---------------------------------------------------------------- NFT


@given(beta=st.floats(0.05, 5.0), seed=st.integers(0, 99))
def test_the_branches_are_mirrored_about_the_old_policy(beta: float, seed: int) -> None:
    v, old = matrix(seed), matrix(seed + 100)
    positive, negative = branches(v, old, beta)
    torch.testing.assert_close((positive + negative) / 2, old, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(positive, (1 - beta) * old + beta * v, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(negative, (1 + beta) * old - beta * v, rtol=1e-12, atol=1e-12)


@given(beta=st.floats(0.05, 5.0))
def test_at_the_old_policy_both_branches_are_it(beta: float) -> None:
    v = matrix(1)
    assert all(torch.equal(branch, v) for branch in branches(v, v, beta))


def test_clean_error_by_hand() -> None:
    # x − σv − x0 = 3 − 0.5·2 − 1 = 1 and −1 − 0.5·4 − 0 = −3: mean square 5, mean size 2.
    at = Renoised(torch.tensor([[[3.0, -1.0]]]), 0.5, torch.tensor([[[1.0, 0.0]]]), torch.zeros(1, 1, 2))
    assert clean_error(at, torch.tensor([[[2.0, 4.0]]])).tolist() == [2.5]


def test_half_optimal_samples_have_no_gradient_at_the_old_policy() -> None:
    found = gradient(Nft(beta=0.7), matrix(1), matrix(1), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-15)


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_at_the_old_policy_it_is_flow_matching_weighted_by_the_advantage(beta: float) -> None:
    """∇L = (2r − 1)·∇e at v = v_old, whatever β: A/A_max times the gradient of the normalised x_0 error."""
    theta = matrix(1).requires_grad_()
    weighted = torch.zeros((), dtype=torch.float64)
    for at in renoised(clean_group(), 4, 3, CPU):
        v = FormulaPolicy(theta, theta, theta).velocity(at.x, at.sigma)
        weighted = weighted + (ADVANTAGES / 2.0 * clean_error(at, v)).sum()
    (expected,) = torch.autograd.grad(weighted, theta)
    torch.testing.assert_close(gradient(Nft(beta=beta), matrix(1), matrix(1)), expected, rtol=1e-10, atol=1e-12)


def test_wholly_good_samples_are_matched_and_bad_ones_left() -> None:
    """Beyond ±A_max only one branch counts."""
    policy = FormulaPolicy(matrix(1), matrix(2), matrix(9))
    extreme = torch.tensor([5.0, -5.0, 2.0, -2.0], dtype=torch.float64)
    for at, term in zip(
        renoised(clean_group(), 4, 3, CPU), Nft(beta=0.5).terms(policy, clean_group(), extreme, 3), strict=True
    ):
        pair = branches(policy.velocity(at.x, at.sigma), policy.old_velocity(at.x, at.sigma), 0.5)
        good, bad = (clean_error(at, v) / 0.5 for v in pair)
        torch.testing.assert_close(term.loss_G, torch.stack([good[0], bad[1], good[2], bad[3]]))
        assert term.metrics["optimality"].tolist() == [1, 0, 1, 0]


def test_the_policy_that_samples_follows_more_and_more_slowly() -> None:
    objective = Nft()
    assert [objective.old_decay(n) for n in (0, 100, 500, 9000)] == [0.0, 0.1, 0.5, 0.5]
    assert Nft(old_max=0.0).old_decay(300) == 0


# ---------------------------------------------------------------- AWM


def test_awm_ratio_is_exactly_one_at_the_old_weights() -> None:
    policy = FormulaPolicy(matrix(1), matrix(1), matrix(9))
    for term in Awm().terms(policy, clean_group(), ADVANTAGES, 3):
        assert torch.equal(term.metrics["ratio"], torch.ones(4, dtype=torch.float64))
        assert torch.equal(term.loss_G, -ADVANTAGES)


def test_awm_is_flow_matching_weighted_by_the_advantage_at_the_old_weights() -> None:
    theta = matrix(1).requires_grad_()
    weighted = torch.zeros((), dtype=torch.float64)
    for at in renoised(clean_group(), 4, 3, CPU):
        v = FormulaPolicy(theta, theta, theta).velocity(at.x, at.sigma)
        weighted = weighted + (ADVANTAGES * 2.5 * mean_square(v - at.target)).sum()
    (expected,) = torch.autograd.grad(weighted, theta)
    torch.testing.assert_close(gradient(Awm(weight=2.5), matrix(1), matrix(1)), expected, rtol=1e-10, atol=1e-12)


def test_awm_gains_beyond_the_clip_have_no_gradient_and_losses_keep_theirs() -> None:
    theta, old, objective = matrix(1), matrix(2), Awm(clip=1e-9, draws=1)
    (term,) = objective.terms(FormulaPolicy(theta, old, old), clean_group(), ADVANTAGES, 3)
    gained = torch.sign(term.metrics["ratio"] - 1)  # better matched than before: good if the sample is
    assert gained.all()
    assert not gradient(objective, theta, old, gained).any()
    assert gradient(objective, theta, old, -gained).any()


# ---------------------------------------------------------------- Flow-DPO


def test_dpo_at_the_reference_is_ln_2() -> None:
    base = matrix(9)
    for term in Dpo().terms(FormulaPolicy(base, base, base), clean_group(), ADVANTAGES, 3):
        torch.testing.assert_close(term.loss_G, torch.full((4,), math.log(2), dtype=torch.float64), rtol=1e-12, atol=0)


def test_dpo_margin_by_hand() -> None:
    # −100/2·[(2 − 1) − (5 − 6)] = −100.
    assert implicit_margin(torch.tensor([2.0, 5.0]), torch.tensor([1.0, 6.0]), 100).item() == -100


def test_dpo_compares_the_best_and_the_worst_at_one_noise() -> None:
    theta, base, beta = matrix(1), matrix(9), 3.0
    clean = clean_group().final_GNC
    assert clean is not None
    generator = torch.Generator().manual_seed(3)
    term = next(Dpo(beta=beta, draws=1).terms(FormulaPolicy(theta, theta, base), clean_group(), ADVANTAGES, 3))
    sigma = clean_group().sigmas[int(float(torch.rand((), generator=generator, dtype=torch.float64)) * 5)]
    noise = torch.randn(1, *clean.shape[1:], generator=generator, dtype=torch.float64)[0]

    def error(weights: torch.Tensor, sibling: int) -> torch.Tensor:
        x = (1 - sigma) * clean[sibling] + sigma * noise
        return (torch.tanh(x @ weights + sigma) - (noise - clean[sibling])).square().mean()

    margin = -beta / 2 * ((error(theta, 0) - error(base, 0)) - (error(theta, 2) - error(base, 2)))
    expected = -torch.log(torch.sigmoid(margin))
    torch.testing.assert_close(term.loss_G, expected.expand(4), rtol=1e-12, atol=0)


def test_dpo_without_a_preference_has_no_gradient() -> None:
    assert not gradient(Dpo(), matrix(1), matrix(1), torch.zeros(4, dtype=torch.float64)).any()


def test_dpo_gradient_pushes_the_margin_up() -> None:
    theta, base, objective = matrix(1), matrix(9), Dpo(beta=2.0)

    def margin(weights: torch.Tensor) -> float:
        terms = objective.terms(FormulaPolicy(weights, weights, base), clean_group(), ADVANTAGES, 3)
        return float(torch.stack([term.metrics["dpo_margin"][0] for term in terms]).mean())

    assert margin(theta - 0.01 * gradient(objective, theta, theta)) > margin(theta)


# ---------------------------------------------------------------- all of them

OBJECTIVES = [Nft(beta=0.7), Nft(beta=2.0, kl_beta=0.3), Awm(clip=10.0), Awm(clip=10.0, kl_beta=0.2), Dpo(beta=3.0)]


def frozen_loss(objective: Objective, theta: torch.Tensor, old: torch.Tensor, at_theta: torch.Tensor) -> torch.Tensor:
    """The loss with NFT's stop-gradient size taken at ``at_theta``: what its gradient is the gradient of."""
    if not isinstance(objective, Nft):
        return total(objective, FormulaPolicy(theta, old, matrix(9)))
    loss = torch.zeros((), dtype=torch.float64)
    good = (ADVANTAGES / (2 * objective.advantage_max) + 0.5).clamp(0, 1)
    for at in renoised(clean_group(), objective.draws, 3, CPU):
        policy, still = FormulaPolicy(theta, old, matrix(9)), FormulaPolicy(at_theta, old, matrix(9))
        pairs = [
            branches(p.velocity(at.x, at.sigma), p.old_velocity(at.x, at.sigma), objective.beta)
            for p in (policy, still)
        ]
        for weight, v, frozen in zip((good, 1 - good), *pairs, strict=True):
            size = (at.x - at.sigma * frozen - at.clean).abs().flatten(1).mean(1)
            loss = loss + (weight * mean_square(at.x - at.sigma * v - at.clean) / size).sum() / objective.beta
        if objective.kl_beta:
            distance = policy.velocity(at.x, at.sigma) - policy.reference_velocity(at.x, at.sigma)
            loss = loss + objective.kl_beta * mean_square(distance).sum()
    return loss


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_gradients_are_those_of_finite_differences(objective: Objective) -> None:
    theta, old, step = matrix(1), matrix(2), 1e-6
    analytic = gradient(objective, theta, old)
    for place in [(0, 0), (1, 2), (3, 1)]:
        nudge = torch.zeros_like(theta)
        nudge[place] = step
        slope = (
            frozen_loss(objective, theta + nudge, old, theta) - frozen_loss(objective, theta - nudge, old, theta)
        ) / (2 * step)
        assert float(analytic[place]) == pytest.approx(float(slope), rel=1e-6, abs=1e-8)


BROKEN = [
    (Nft(beta=0.0), "beta"), (Nft(draws=0), "draws"), (Nft(advantage_max=0.0), "advantage_max"),
    (Nft(old_rate=-1.0), "old_rate"), (Nft(old_max=1.0), "old_max"), (Nft(kl_beta=-1.0), "kl_beta"),
    (Awm(clip=0.0), "clip"), (Awm(weight=-1.0), "weight"), (Awm(draws=-2), "draws"),
    (Awm(kl_target=0.1), "kl_beta"), (Awm(kl_beta=0.1, kl_target=-1.0), "kl_target"),
    (Awm(kl_rate=0.0), "kl_rate"), (Dpo(beta=0.0), "beta"), (Dpo(draws=0), "draws"),
]  # fmt: skip


@pytest.mark.parametrize(("objective", "field"), BROKEN, ids=lambda x: x if isinstance(x, str) else type(x).__name__)
def test_an_impossible_setting_is_a_complaint(objective: Nft | Awm | Dpo, field: str) -> None:
    assert [name for name, _ in objective.problems()] == [field]
