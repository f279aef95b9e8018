"""Prompts that are sampled in one batch get what they get alone, whatever window and neighbours they have."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from grpo_flex.config import RunConfig
from grpo_flex.dynamics import AllButLast, FastWindow, Multistep, RandomFraction, Window
from grpo_flex.learner import BoundPolicy, Learner
from grpo_flex.overrides import override
from grpo_flex.rollout import RolloutWorker
from grpo_flex.types import Prompt
from tests.invariants.test_learning import nudged

PROMPTS = [
    Prompt(id="p0", text="a red circle on a black background"),
    Prompt(id="p1", text="a blue square"),
    Prompt(id="p2", text="white"),
]


@pytest.mark.parametrize(
    "window",
    [AllButLast(), RandomFraction(fraction=0.6), FastWindow(size=1, last_start=2)],
    ids=lambda w: type(w).__name__,
)
def test_neighbours_change_nothing(config: RunConfig, window: Window) -> None:
    config = replace(config, sampling=replace(config.sampling, window=window, solver=Multistep()))
    learner = Learner(config)
    adapter, worker = nudged(learner), RolloutWorker(config)
    together = worker.generate_together(0, PROMPTS, adapter)
    for prompt, group in zip(PROMPTS, together, strict=True):
        alone = worker.generate(0, prompt, adapter)
        assert group.prompt == prompt and group.seeds_G == alone.seeds_G
        assert group.trajectories.steps_K == alone.trajectories.steps_K
        assert torch.equal(group.conditioning["embeds"], alone.conditioning["embeds"])
        pairs = zip(group.media_G, alone.media_G, strict=True)
        assert all(np.abs(a.astype(int) - b.astype(int)).max() <= 1 for a, b in pairs)
        torch.testing.assert_close(group.trajectories.logprobs_GK, alone.trajectories.logprobs_GK, rtol=0, atol=1e-6)
        # The learner computes group by group: its ratio to what was sampled together is 1 but for rounding.
        policy = BoundPolicy(learner.model, group.conditioning, config.sampling.dynamics)
        for k in range(len(group.trajectories.steps_K)):
            logprob = policy.rescore(group.trajectories, k).logprob
            torch.testing.assert_close(logprob, group.trajectories.logprobs_GK[:, k], rtol=0, atol=1e-6)


def test_the_budget_says_how_many(config: RunConfig) -> None:
    worker = RolloutWorker(config)  # 4 siblings of 4 tokens
    for budget, prompts in ((0, 1), (15, 1), (31, 1), (32, 2), (50, 3)):
        worker.config = override(config, [f"sampling.batch_tokens={budget}"])
        assert worker.together == prompts


@pytest.mark.parametrize(("tokens", "copies", "prompts"), [(64, 1, 16), (4096, 2, 8), (14_040, 1, 4), (100_000, 1, 1)])
def test_long_clips_are_evaluated_in_smaller_batches(config: RunConfig, tokens: int, copies: int, prompts: int) -> None:
    worker: Any = object.__new__(RolloutWorker)
    worker.config = replace(config, evaluation=replace(config.evaluation, samples_per_prompt=copies))
    worker.model = SimpleNamespace(latent_shape=(tokens, 16))
    assert worker.heldout_together == prompts
