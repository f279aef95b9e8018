"""Siblings that go through the model in parts are what they are together: ratio exactly 1, the same gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from grpo_flex.config import ConfigError, RunConfig
from grpo_flex.dynamics import FlowSde, Ode
from grpo_flex.learner import Learner
from grpo_flex.objectives.dpo import Dpo
from grpo_flex.objectives.grpo import Grpo
from grpo_flex.objectives.guard import Guard
from grpo_flex.objectives.nft import Nft
from grpo_flex.overrides import override
from grpo_flex.rollout import RolloutWorker
from grpo_flex.types import Prompt, RolloutGroup
from tests.invariants.test_learning import nudged
from tests.invariants.test_sampling import at, counting

PROMPT = Prompt(id="p0", text="a red circle on a black background")
OBJECTIVES = [Guard(clip=1e-3, kl_beta=0.1), Nft(kl_beta=0.1), Dpo()]
ADVANTAGES = np.array([1.0, -0.5, np.nan, 0.8, -1.3])


def of_five(config: RunConfig, objective: Any, at_once: int = 0) -> RunConfig:
    """Five siblings, which parts of two or three do not divide."""
    noisy = objective.needs_noise
    dynamics = FlowSde(a=0.7) if noisy else Ode()
    sampling = replace(config.sampling, group_size=5, dynamics=dynamics, same_noise=noisy, micro_batch=at_once)
    made = replace(config, objective=objective, sampling=sampling)
    made.validate()
    return made


def sampled(config: RunConfig) -> tuple[RolloutGroup, list[int]]:
    """A group, and how many samples each of the transformer's calls was given."""
    worker, calls = counting(config)
    return worker.generate(0, PROMPT, nudged(Learner(config))), calls


@pytest.mark.parametrize("at_once", [1, 3])
def test_the_first_ratio_is_exactly_one(config: RunConfig, at_once: int) -> None:
    config = of_five(config, Grpo(clip=1e-3), at_once)
    (group, calls), learner = sampled(config), Learner(config)
    nudged(learner)
    assert max(calls) == at_once and sum(calls) == 4 * 5
    metrics = learner.update([group], [ADVANTAGES], 0).metrics
    assert metrics["policy/first_log_ratio_abs"] == 0 and metrics["policy/ratio"] == 1


def test_a_shared_prefix_is_still_computed_once(config: RunConfig) -> None:
    config = of_five(config, Grpo(), 3)
    _, calls = sampled(replace(config, sampling=replace(config.sampling, steps=6, window=at(3, 2))))
    assert calls == [1, 1, 1, 3, 2, 3, 2, 3, 2]


def moved(config: RunConfig) -> Learner:
    """A learner in float64 whose θ is no longer θ_old, so that ratios are not 1 and NFT has something to compare."""
    learner = Learner(config)
    nudged(learner)
    generator, model = torch.Generator().manual_seed(2), learner.model
    with torch.no_grad():
        for p in learner.parameters:
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    model.dtype = torch.float64  # pyright: ignore[reportAttributeAccessIssue]
    model.transformer.double()
    learner._old, learner._moved = [t.double() for t in learner._old], True
    return learner


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_gradient_and_figures_are_those_of_the_whole_group(config: RunConfig, objective: Any) -> None:
    whole, parts = (moved(of_five(config, objective, at_once)) for at_once in (0, 2))
    group, _ = sampled(whole.config)
    for learner in (whole, parts):
        learner._add_up([group], [ADVANTAGES], [0], 0)
        learner._watch_base([group], learner.shares(1)[0], 0)
    gradients, others = ([p.grad for p in learner.parameters] for learner in (whole, parts))
    assert max(float(g.abs().max()) for g in gradients if g is not None) > 1e-6
    torch.testing.assert_close(others, gradients, rtol=1e-5, atol=1e-8)
    assert whole._seen.keys() == parts._seen.keys() and "base_distance" in whole._seen
    for name, values in whole._seen.items():
        assert [v for _, v in parts._seen[name]] == pytest.approx([v for _, v in values], rel=1e-5, abs=1e-8), name


def test_held_out_samples_come_in_micro_batches_too(config: RunConfig) -> None:
    prompts = [Prompt(id=f"h{i}", text=text) for i, text in enumerate(("a red circle", "blue", "a square on white"))]
    pictures = []
    for at_once in (0, 2):
        made = replace(config, sampling=replace(config.sampling, micro_batch=at_once))
        pictures.append([s.media.astype(int) for s in RolloutWorker(made).evaluate(prompts, Learner(made).adapter())])
    assert all(np.abs(one - two).max() <= 1 for one, two in zip(*pictures, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["micro_batch=-1"], r"sampling\.micro_batch is -1; it cannot be negative \(0: the whole group"),
        (["micro_batch=2", "batch_tokens=64"], r"sampling\.micro_batch is 2 with sampling\.batch_tokens=64: .* to 0"),
    ],
)
def test_what_does_not_go_with_it_is_refused(config: RunConfig, changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(config, [f"sampling.{change}" for change in changes]).validate()
