"""Every objective with the learner and the rollout worker, on a tiny FLUX (CPU, float32)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from grpo_flex.config import RunConfig
from grpo_flex.dynamics import Dynamics, FlowSde, Ode
from grpo_flex.learner import BoundPolicy, Learner
from grpo_flex.objectives.awm import Awm
from grpo_flex.objectives.base import Objective
from grpo_flex.objectives.dpo import Dpo
from grpo_flex.objectives.grpo import Grpo
from grpo_flex.objectives.guard import Guard
from grpo_flex.objectives.nft import Nft
from grpo_flex.objectives.renoise import mean_square, renoised
from grpo_flex.rollout import RolloutWorker
from grpo_flex.types import Prompt, RolloutGroup

PROMPT = Prompt(id="p0", text="a red circle on a black background")
ADVANTAGES = np.array([1.0, -1.0, 1.0, -1.0])
FORWARD = [Nft(), Awm(clip=0.5), Dpo()]
ALL = [Grpo(clip=0.2), Guard(clip=0.2), *FORWARD]
named = pytest.mark.parametrize("objective", ALL, ids=lambda o: type(o).__name__)
forward = pytest.mark.parametrize("objective", FORWARD, ids=lambda o: type(o).__name__)


def using(config: RunConfig, objective: Objective, dynamics: Dynamics | None = None) -> RunConfig:
    sampling = replace(config.sampling, same_noise=False, dynamics=dynamics or config.sampling.dynamics)
    config = replace(config, objective=objective, sampling=sampling)
    config.validate()
    return config


def start(config: RunConfig) -> tuple[Learner, RolloutGroup]:
    """A learner whose adapter does something, and a group that was sampled with it."""
    learner = Learner(config)
    generator = torch.Generator().manual_seed(1)
    state = learner.state()
    adapter = {k: t + 0.05 * torch.randn(t.shape, generator=generator) for k, t in state["adapter"].items()}
    learner.load_state({"version": 0, "adapter": adapter, "optimizer": state["optimizer"]})
    return learner, RolloutWorker(config).generate(0, PROMPT, learner.adapter())


@named
def test_a_rollout_stores_what_its_objective_needs_and_no_more(config: RunConfig, objective: Objective) -> None:
    _, group = start(using(config, objective))
    kept = group.trajectories
    steps = 3 if objective.needs_noise else 0
    assert kept.latents_GKNC.shape == kept.next_latents_GKNC.shape == (4, steps, 4, 16)
    assert kept.logprobs_GK.shape == (4, steps) and len(kept.steps_K) == steps
    assert (kept.means_GKNC is not None) is objective.keeps_means
    assert (kept.final_GNC is not None) is objective.keeps_final
    assert objective.passes(kept) > 0


@pytest.mark.parametrize("objective", [Grpo(), Guard(), Awm()], ids=lambda o: type(o).__name__)
def test_the_first_update_sees_ratio_one(config: RunConfig, objective: Objective) -> None:
    learner, group = start(using(config, objective))
    metrics = learner.update([group], [ADVANTAGES], 0).metrics
    assert metrics["policy/ratio"] == 1 and metrics["policy/first_log_ratio_abs"] == 0
    assert metrics["policy/clip_fraction"] == 0


def test_nft_begins_at_the_policy_that_sampled(config: RunConfig) -> None:
    learner, group = start(using(config, Nft()))
    assert learner.update([group], [ADVANTAGES], 0).metrics["policy/moved"] == 0
    assert learner.update([group], [ADVANTAGES], 1).metrics["policy/optimality"] == 0.5


def test_nft_without_a_preference_pulls_back_to_the_policy_that_sampled(config: RunConfig) -> None:
    learner, group = start(using(config, Nft(old_rate=0.5)))
    for i in range(2):
        learner.update([group], [ADVANTAGES], i)  # the second leaves θ_old behind
    metrics = learner.update([group], [np.zeros(4)], 2).metrics
    assert metrics["policy/moved"] > 0 and metrics["policy/grad_norm"] > 0


@forward
@pytest.mark.parametrize("dynamics", [Ode(), FlowSde(a=0.7)], ids=lambda d: type(d).__name__)
def test_forward_objectives_prefer_the_better_siblings(
    config: RunConfig, objective: Objective, dynamics: Dynamics
) -> None:
    """The matching error of the good falls against that of the bad, whatever sampled them."""
    learner, group = start(using(config, objective, dynamics))
    before = matching_errors(learner, group)
    for i in range(4):
        learner.update([group], [ADVANTAGES], i)
    gained = before - matching_errors(learner, group)
    pair = [0, 1] if isinstance(objective, Dpo) else [0, 2, 1, 3]
    good, bad = gained[pair].chunk(2)
    assert good.mean() > bad.mean()


def matching_errors(learner: Learner, group: RolloutGroup) -> torch.Tensor:
    policy = BoundPolicy(learner.model, group.conditioning, learner.config.sampling.dynamics)
    with torch.no_grad():
        levels = renoised(group.trajectories, 16, 77, torch.device("cpu"))
        return torch.stack([mean_square(policy.velocity(at.x, at.sigma) - at.target) for at in levels]).mean(0)


@pytest.mark.parametrize("objective", [Grpo(clip=0.2), Guard(clip=0.2), Nft(), Awm()], ids=lambda o: type(o).__name__)
def test_all_zero_advantages_have_no_gradient(config: RunConfig, objective: Objective) -> None:
    learner, group = start(using(replace(config, optimizer=replace(config.optimizer, weight_decay=0.0)), objective))
    learner._matters = lambda advantage: True  # as if there were a pull to the base: the group is not passed over
    before = learner.state()["adapter"]
    learner.update([group], [np.zeros(4)], 0)
    assert all(torch.equal(before[k], t) for k, t in learner.state()["adapter"].items())


@pytest.mark.parametrize("objective", [Grpo(clip=0.2), Guard(clip=0.2), Awm(), Dpo()], ids=lambda o: type(o).__name__)
def test_all_zero_advantages_move_nothing(config: RunConfig, objective: Objective) -> None:
    """Neither by the momentum of an earlier step nor by weight decay."""
    learner, group = start(using(config, objective))
    assert learner.update([group], [ADVANTAGES], 0).metrics["policy/skipped_updates"] == 0
    before = learner.state()["adapter"]
    metrics = learner.update([group, group], [np.zeros(4), np.array([0.0, np.nan, np.nan, 0.0])], 1).metrics
    assert metrics["policy/skipped_updates"] == 1 and metrics["policy/grad_norm"] == 0
    assert all(torch.equal(before[k], t) for k, t in learner.state()["adapter"].items())


@named
def test_siblings_one_by_one_give_the_gradient_of_the_whole_group(config: RunConfig, objective: Objective) -> None:
    """A micro-batch of four equals four of one: each with the others masked (a pair, where it takes two)."""
    masks = [[0, 1]] if isinstance(objective, Dpo) else [[0], [1], [2], [3]]
    whole = np.array([1.0, -1.0, np.nan, np.nan]) if isinstance(objective, Dpo) else ADVANTAGES
    config = using(config, objective)
    parts = [gradients(config, np.array([a if i in m else np.nan for i, a in enumerate(whole)])) for m in masks]
    for together, *single in zip(gradients(config, whole), *parts, strict=True):
        torch.testing.assert_close(together, torch.stack(single).mean(0), rtol=1e-4, atol=1e-6)


def gradients(config: RunConfig, advantages: np.ndarray) -> Iterator[torch.Tensor]:
    """What the optimiser is given, before clipping."""
    learner, group = start(replace(config, optimizer=replace(config.optimizer, max_grad_norm=1e9)))
    learner.update([group], [advantages], 0)
    yield from (p.grad.clone() for p in learner.parameters if p.grad is not None)


@pytest.mark.parametrize("objective", [Nft(kl_beta=0.5), Awm(kl_beta=0.5), Guard(kl_beta=0.5)], ids=str)
def test_the_pull_to_the_base_pulls(config: RunConfig, objective: Objective) -> None:
    learner, group = start(using(config, objective))
    kl = [learner.update([group], [np.zeros(4)], i).metrics["policy/kl"] for i in range(6)]
    assert kl[0] > 0 and kl[-1] < kl[0]


@pytest.mark.parametrize("objective", [Grpo(clip=0.2), Nft()], ids=lambda o: type(o).__name__)
def test_the_distance_to_the_base_is_watched_without_a_pull(config: RunConfig, objective: Objective) -> None:
    learner = Learner(using(config, objective))
    group = RolloutWorker(learner.config).generate(0, PROMPT, learner.adapter())
    before = [p.detach().clone() for p in learner.parameters]
    distance = [learner._base_distance(group, 0)]  # a fresh adapter is the base
    for i in range(2):
        distance.append(learner.update([group], [ADVANTAGES], i).metrics["policy/base_distance"])
    assert distance[0] == 0 < distance[1]
    assert any(not torch.equal(a, b) for a, b in zip(before, learner.parameters, strict=True))


def test_beta_is_adapted_and_logged(config: RunConfig) -> None:
    learner, group = start(using(config, Grpo(kl_beta=0.1, kl_target=1e3, kl_rate=0.2)))
    betas = [learner.update([group], [ADVANTAGES], i).metrics["policy/kl_beta"] for i in range(3)]
    assert betas == pytest.approx([0.1, 0.1 * np.exp(-0.2), 0.1 * np.exp(-0.4)])


def test_a_new_first_beta_on_resume_is_obeyed(config: RunConfig) -> None:
    objective = Grpo(kl_beta=0.1, kl_target=1e3)
    learner, group = start(using(config, objective))
    learner.update([group], [ADVANTAGES], 0)
    resumed = Learner(using(config, replace(objective, kl_beta=0.7)))
    resumed.load_state(learner.state())
    assert resumed.kl_beta == 0.7 and learner.kl_beta < 0.1
