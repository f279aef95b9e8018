"""θ, θ_old and the average of θ: who samples, who is evaluated, and what a resume brings back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_flex.config import ConfigError, RunConfig
from grpo_flex.learner import BoundPolicy, Learner
from grpo_flex.objectives.base import Objective, Policy, Term
from grpo_flex.objectives.grpo import Grpo
from grpo_flex.rollout import RolloutWorker
from grpo_flex.types import Adapter, Prompt, RolloutGroup, Trajectories
from grpo_flex.weights import Lora, copies, follow, lent, warmed_up

PROMPT = Prompt(id="p0", text="a red circle on a black background")
OTHER = Prompt(id="p1", text="a blue square on a white background")
ADVANTAGES = np.array([1.0, -1.0, 0.5, -0.5])


@dataclass(frozen=True, kw_only=True)
class Lagging(Grpo):
    """Grpo, but what samples follows θ only half way."""

    clip: float = 0.2

    needs_old: ClassVar[bool] = True

    def old_decay(self, update: int) -> float:
        return 0.5


def after(config: RunConfig, steps: int, learner: Learner | None = None) -> Learner:
    """A learner after some on-policy training steps."""
    learner, worker = learner or Learner(config), RolloutWorker(config)
    for _ in range(steps):
        group = worker.generate(learner.version, PROMPT, learner.adapter())
        learner.update([group], [ADVANTAGES], learner.version)
    return learner


def tensors(adapter: Adapter) -> torch.Tensor:
    return torch.cat([t.flatten() for t in adapter.tensors.values()])


def theta(learner: Learner) -> torch.Tensor:
    return torch.cat([t.flatten() for t in learner.state()["adapter"].values()])


def with_ema(config: RunConfig, ema: float, objective: Objective | None = None) -> RunConfig:
    return replace(config, optimizer=replace(config.optimizer, ema=ema), objective=objective or config.objective)


def test_without_an_average_all_three_are_the_same_bits(config: RunConfig) -> None:
    learner = after(with_ema(config, 0.0), 2)
    assert torch.equal(tensors(learner.adapter()), theta(learner))
    assert torch.equal(tensors(learner.evaluation_adapter()), theta(learner))


@settings(deadline=None)
@given(st.floats(0, 0.9999), st.integers(0, 10_000))
def test_the_decay_warms_up(decay: float, updates: int) -> None:
    assert warmed_up(decay, updates) == min(decay, (1 + updates) / (10 + updates)) < 1


def test_the_average_is_the_weighted_mean_of_its_past(config: RunConfig) -> None:
    learner = Learner(with_ema(config, 0.9))
    worker, mean = RolloutWorker(config), theta(learner)
    for n in range(3):
        group = worker.generate(n, PROMPT, learner.adapter())
        learner.update([group], [ADVANTAGES], n)
        decay = (1 + n) / (10 + n)
        mean = decay * mean + (1 - decay) * theta(learner)
        torch.testing.assert_close(tensors(learner.evaluation_adapter()), mean, rtol=1e-6, atol=1e-8)
    assert not torch.equal(mean, theta(learner))
    assert torch.equal(tensors(learner.adapter()), theta(learner))  # sampling stays on-policy


def test_what_is_evaluated_and_exported_is_the_average(config: RunConfig, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    learner = after(with_ema(config, 0.9), 2)
    exported = load_file(learner.save_adapter(tmp_path))
    for name, tensor in learner.evaluation_adapter().tensors.items():
        assert torch.equal(exported[f"transformer.{name}"], tensor)


def test_a_worker_tells_two_adapters_of_one_version_apart(config: RunConfig) -> None:
    learner, worker = after(with_ema(config, 0.9), 2), RolloutWorker(config)
    for adapter in (learner.adapter(), learner.evaluation_adapter(), learner.adapter()):
        worker.use(adapter)
        fresh = RolloutWorker(config)
        fresh.use(adapter)
        one, two = (w.evaluate([PROMPT], adapter)[0].media for w in (worker, fresh))
        assert np.array_equal(one, two)


@pytest.mark.parametrize("objective", [Grpo(clip=0.2, kl_beta=0.1, kl_target=1e-4), Lagging()], ids=["kl", "lagging"])
def test_a_resume_is_exact(config: RunConfig, objective: Objective, tmp_path: Path) -> None:
    config = with_ema(config, 0.9, objective)
    torch.save(after(config, 2).state(), tmp_path / "state.pt")
    resumed = Learner(config)
    resumed.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    straight, resumed = after(config, 4), after(config, 2, resumed)
    assert straight.kl_beta == resumed.kl_beta
    for one, two in (
        (theta(straight), theta(resumed)),
        (tensors(straight.adapter()), tensors(resumed.adapter())),
        (tensors(straight.evaluation_adapter()), tensors(resumed.evaluation_adapter())),
    ):
        assert torch.equal(one, two)


def test_an_earlier_checkpoint_without_averages_is_read(config: RunConfig) -> None:
    state = after(config, 1).state()
    learner = Learner(config)
    learner.load_state({key: state[key] for key in ("version", "adapter", "optimizer")})
    assert torch.equal(tensors(learner.evaluation_adapter()), theta(learner))
    assert torch.equal(tensors(learner.adapter()), theta(learner))


def test_equal_adapters_are_stored_once(config: RunConfig) -> None:
    state = after(with_ema(config, 0.0), 1).state()
    assert all(state["old"][k] is state["average"][k] is state["adapter"][k] for k in state["adapter"])


@pytest.mark.parametrize("copied_first", [True, False])
def test_what_equals_theta_is_not_copied_and_nothing_else_changes(
    config: RunConfig, copied_first: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Beside a learner that copies all the same, as earlier versions did; each goes on from the other's checkpoint."""
    config = with_ema(config, 0.0)
    config = replace(config, optimizer=replace(config.optimizer, updates_per_rollout=2))

    def made(copying: bool) -> Learner:
        with monkeypatch.context() as patched:
            if copying:
                patched.setattr(Lora, "copies", lambda self, needed: copies(self._parameters))
            learner = Learner(config)
        assert len(learner.apart) == (2 * len(learner.parameters) if copying else 0)
        return learner

    def trained(learner: Learner, updates: int) -> Learner:
        for _ in range(updates):
            worker = RolloutWorker(config)
            groups = [worker.generate(learner.version, p, learner.adapter()) for p in (PROMPT, OTHER)]
            learner.update(groups, [ADVANTAGES, -ADVANTAGES], learner.version)
        return learner

    straight = trained(made(copied_first), 3)
    torch.save(trained(made(copied_first), 1).state(), tmp_path / "state.pt")
    resumed = made(not copied_first)
    resumed.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    trained(resumed, 2)
    for name in ("adapter", "old", "average"):
        one, two = straight.state()[name], resumed.state()[name]
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert torch.equal(tensors(straight.adapter()), tensors(resumed.adapter()))


def test_what_samples_may_follow_more_slowly(config: RunConfig) -> None:
    config = replace(config, objective=Lagging())
    learner = Learner(config)
    old = theta(learner)
    for _ in range(2):
        after(config, 1, learner)
        old = 0.5 * old + 0.5 * theta(learner)
        torch.testing.assert_close(tensors(learner.adapter()), old, rtol=1e-6, atol=1e-8)
    assert not torch.equal(old, theta(learner))


@dataclass(frozen=True, kw_only=True)
class Seen(Objective):
    """Records what ``old_velocity`` says during the updates of one rollout."""

    found: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])

    needs_old: ClassVar[bool] = True

    def passes(self, trajectories: Trajectories) -> int:
        return 1

    def terms(
        self, policy: Policy, trajectories: Trajectories, advantages_G: torch.Tensor, seed: int
    ) -> Iterator[Term]:
        x = torch.ones(2, 4, 16)
        now, old = policy.velocity(x, 0.5), policy.old_velocity(x, 0.5)
        self.found[0].append(now.detach())
        self.found[1].append(old)
        yield Term((now.mean() * advantages_G), {})


def test_the_old_velocity_stays_while_the_updates_of_a_rollout_go_on(config: RunConfig) -> None:
    optimizer = replace(config.optimizer, updates_per_rollout=2)
    seen = Seen(found=([], []))
    learner = Learner(replace(config, objective=seen))
    learner.config = config
    after(config, 1, learner)  # B = 0 at the very beginning
    groups = [_group(config, learner, prompt) for prompt in (PROMPT, PROMPT)]
    learner.config = replace(config, objective=seen, optimizer=optimizer)
    learner.update(groups, [np.ones(4), np.ones(4)], 1)
    now, old = seen.found
    assert torch.equal(now[0], old[0]) and torch.equal(old[0], old[1])
    assert not torch.equal(now[1], old[1])


def _group(config: RunConfig, learner: Learner, prompt: Prompt) -> RolloutGroup:
    return RolloutWorker(config).generate(1, prompt, learner.adapter())


def test_lending_gives_back_also_after_an_error_and_keeps_the_gradient(config: RunConfig) -> None:
    learner = after(config, 1)
    group = _group(config, learner, PROMPT)
    old = [torch.zeros_like(p) for p in learner.parameters]
    policy = BoundPolicy(learner.model, group.conditioning, config.sampling.dynamics, learner.weights, old)
    x = torch.ones(2, 4, 16)

    def gradient(in_between: bool) -> list[torch.Tensor]:
        for p in learner.parameters:
            p.grad = None
        v = policy.velocity(x, 0.5)
        if in_between:
            assert torch.equal(policy.old_velocity(x, 0.5), policy.reference_velocity(x, 0.5))
        v.square().sum().backward()
        return [p.grad.clone() for p in learner.parameters if p.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(gradient(False), gradient(True), strict=True))
    same = [p.detach().clone() for p in learner.parameters]
    as_sampled = BoundPolicy(learner.model, group.conditioning, config.sampling.dynamics, learner.weights, same)
    assert torch.equal(as_sampled.old_velocity(x, 0.5), as_sampled.velocity(x, 0.5))
    before = theta(learner)
    with pytest.raises(KeyError), lent(learner.parameters, old):
        raise KeyError
    assert torch.equal(theta(learner), before)


def test_following_in_float64() -> None:
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    average = [torch.zeros(2, dtype=torch.float64)]
    follow(average, [p], 0.25)
    assert torch.equal(average[0], torch.tensor([0.75, 1.5], dtype=torch.float64))
    follow(average, [p], 0.0)
    assert torch.equal(average[0], p.detach()) and average[0].data_ptr() != p.data_ptr()


@pytest.mark.parametrize("ema", [-0.1, 1.0])
def test_a_decay_that_cannot_average_is_refused(config: RunConfig, ema: float) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.ema is .* below 1, where nothing would be learnt"):
        with_ema(config, ema).validate()
