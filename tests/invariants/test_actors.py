"""What actors hand to each other: adapters bit for bit and of the right age; a shared model that gives the same."""

from __future__ import annotations

import os
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ray import cloudpickle

from grpo_flex.actors import ColocatedActor, LearnerActor, RolloutActor, ScorerActor
from grpo_flex.config import ConfigError, RunConfig
from grpo_flex.learner import Learner
from grpo_flex.types import Adapter, GroupMedia, Prompt, Role, RolloutGroup
from grpo_flex.weights import read_adapter
from tests.configs import Brightness
from tests.invariants.test_learning import nudged

ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
PROMPT = Prompt(id="p0", text="a red circle on a black background")


def through_the_object_store(value: Any) -> Any:
    return cloudpickle.loads(cloudpickle.dumps(value))


def sampled(actor: RolloutActor | ColocatedActor, step: int, adapter: Adapter) -> RolloutGroup:
    """The group that an actor samples, whose two parts are put together again."""
    seconds, media, group = actor.generate(step, [PROMPT], adapter)
    assert isinstance(seconds, float) and seconds > 0
    assert type(media) is GroupMedia and isinstance(group, RolloutGroup) and group.media_G == ()
    assert (media.step, media.prompt) == (group.step, group.prompt)
    return replace(group, media_G=media.media_G)


def same(one: RolloutGroup, two: RolloutGroup) -> bool:
    pictures = all(np.array_equal(a, b) for a, b in zip(one.media_G, two.media_G, strict=True))
    return pictures and torch.equal(one.trajectories.logprobs_GK, two.trajectories.logprobs_GK)


def test_a_worker_holds_what_was_published_bit_for_bit(config: RunConfig) -> None:
    learner, actor = LearnerActor(config, "cpu"), RolloutActor(config, "cpu", "rollout-0")
    nudged(learner.learner)
    version, adapter = learner.adapter("sampling")
    group = sampled(actor, 0, through_the_object_store(adapter))
    held = read_adapter(actor.worker.model.transformer, 0).tensors
    assert held.keys() == adapter.tensors.keys() and all(torch.equal(held[k], adapter.tensors[k]) for k in held)
    assert group.policy_version == version == 0


@pytest.mark.parametrize(("device", "seen"), [("cpu", ""), ("cuda", "0,1")])
def test_an_actor_sees_no_gpu_that_it_did_not_ask_for(
    config: RunConfig, device: str, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for make in (
        lambda: RolloutActor(config, device, "rollout-0"),
        lambda: LearnerActor(config, device),
        lambda: ScorerActor(Brightness(), 1, float(device == "cuda")),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        for name in ALLOCATOR:
            monkeypatch.delenv(name, raising=False)
        make()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == seen
        assert os.environ.get("PYTORCH_ALLOC_CONF") == ("expandable_segments:True" if device == "cuda" else None)


@pytest.mark.parametrize("name", ALLOCATOR)
def test_what_the_environment_says_of_the_allocator_goes_first(
    config: RunConfig, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ALLOCATOR:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "max_split_size_mb:512")
    RolloutActor(config, "cuda", "rollout-0")
    assert {n: os.environ[n] for n in ALLOCATOR if n in os.environ} == {name: "max_split_size_mb:512"}


def test_an_adapter_of_another_age_is_refused(config: RunConfig) -> None:
    learner, actor = LearnerActor(config, "cpu"), RolloutActor(config, "cpu", "rollout-0")
    _, adapter = learner.adapter("sampling")
    for step in (1, -1):
        with pytest.raises(ValueError, match=r"sampling.lookahead=0 allows 0 to 0"):
            actor.generate(step, [PROMPT], adapter)
    ahead = replace(config, sampling=replace(config.sampling, lookahead=1))
    assert sampled(RolloutActor(ahead, "cpu", "rollout-0"), 1, adapter).policy_version == 0


def test_an_adapter_that_was_written_half_way_is_not_used(config: RunConfig) -> None:
    actor, adapter = RolloutActor(config, "cpu", "rollout-0"), LearnerActor(config, "cpu").adapter("sampling")[1]
    actor.generate(0, [PROMPT], adapter)
    name = next(iter(adapter.tensors))
    broken = replace(adapter, role="evaluation", tensors={**adapter.tensors, name: adapter.tensors[name][:-1]})
    with pytest.raises(ValueError, match="do not fit the model"):
        actor.worker.use(broken)
    assert actor.worker.loaded == (-1, "")


@pytest.mark.parametrize("role", ["sampling", "evaluation", "base"])
def test_a_shared_model_samples_as_one_of_its_own_and_keeps_what_is_trained(config: RunConfig, role: Role) -> None:
    apart, shared = LearnerActor(config, "cpu"), ColocatedActor(config, "cpu")
    advantages = (np.array([1.0, -1.0, 0.5, -0.5]),)
    for actor in (apart, shared):
        nudged(actor.learner)
        worker = RolloutActor(config, "cpu", "rollout-0").worker
        actor.learner.update([worker.generate(0, PROMPT, actor.learner.adapter())], advantages, 0)  # three adapters
    worker = RolloutActor(config, "cpu", "rollout-0").worker
    expected = worker.generate(1, PROMPT, apart.adapter(role)[1])
    before = [p.detach().clone() for p in shared.learner.parameters]
    _, light = shared.adapter(role)
    assert not light.tensors and same(sampled(shared, 1, light), expected)
    assert all(map(torch.equal, before, shared.learner.parameters))


def test_weights_that_are_shared_are_never_old(config: RunConfig) -> None:
    place = replace(config.placement, colocated=True)
    with pytest.raises(ConfigError, match=r"sampling.lookahead is 1 with placement.colocated"):
        replace(config, placement=place, sampling=replace(config.sampling, lookahead=1)).validate()


def test_learners_that_start_from_a_state_leave_it_as_it_is(config: RunConfig) -> None:
    """Two of them on a node read it in the same memory."""
    learner, worker = Learner(config), RolloutActor(config, "cpu", "rollout-0").worker
    advantages = (np.array([1.0, -1.0, 0.5, -0.5]),)
    learner.update([worker.generate(0, PROMPT, learner.adapter())], advantages, 0)
    kept = learner.state()
    before = deepcopy(kept["optimizer"]), {name: tensor.clone() for name, tensor in kept["adapter"].items()}
    again = Learner(config)
    again.load_state(kept)
    group = worker.generate(1, PROMPT, again.adapter())
    again.update([group], advantages, 1)
    learner.update([group], advantages, 1)
    assert all(map(torch.equal, again.parameters, learner.parameters))
    moments = zip(before[0]["state"].values(), kept["optimizer"]["state"].values(), strict=True)
    assert all(torch.equal(old[name], new[name]) for old, new in moments for name in old)
    assert all(torch.equal(before[1][name], kept["adapter"][name]) for name in before[1])
