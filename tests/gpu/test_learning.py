"""Sampling and learning on a GPU against the CPU, compiled blocks against plain ones, NCCL and FSDP2 against neither."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from grpo_flex.config import Full, RunConfig
from grpo_flex.generators.blank import stand_in
from grpo_flex.learner import Learner
from grpo_flex.objectives.grpo import Grpo
from grpo_flex.overrides import override
from grpo_flex.ranks import Ranks
from grpo_flex.rollout import RolloutWorker
from grpo_flex.types import Prompt, RolloutGroup
from reward_server.machine import free_ports

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
PROMPTS = [Prompt(id=f"p{i}", text="a red circle on a black background") for i in range(2)]
ADVANTAGES = [np.array([1.0, -1.0, 0.5, -0.5]), np.array([np.nan, 1.0, np.nan, -1.0])]


def sampled(config: RunConfig, device: str) -> list[RolloutGroup]:
    """Two groups of the base model."""
    worker, adapter = RolloutWorker(config, device), Learner(config).adapter()
    return [worker.generate(0, prompt, adapter) for prompt in PROMPTS]


def learnt(learner: Learner, groups: list[RolloutGroup]) -> list[torch.Tensor]:
    """The trained weights after two steps of two updates each."""
    for step in range(2):
        learner.update(groups, ADVANTAGES, step)
    local = (getattr(p, "to_local", lambda p=p: p)() for p in learner.parameters)
    return [p.detach().float().cpu() for p in local]


def with_pull(config: RunConfig, **changes: Any) -> RunConfig:
    """Weights of the base are lent between a forward pass and its backward one."""
    optimizer = replace(config.optimizer, updates_per_rollout=2, lr=1e-3)
    return replace(config, objective=Grpo(clip=1e-3, kl_beta=0.01), optimizer=optimizer, **changes)


def test_noise_and_samples_do_not_depend_on_the_device(config: RunConfig) -> None:
    for here, there in zip(sampled(config, "cpu"), sampled(config, DEVICE), strict=True):
        one, other = (group.trajectories.next_latents_GKNC.cpu() for group in (here, there))
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-3)


def test_an_update_is_that_of_the_cpu(config: RunConfig) -> None:
    config, groups = with_pull(config), sampled(config, "cpu")
    for here, there in zip(learnt(Learner(config), groups), learnt(Learner(config, DEVICE), groups), strict=True):
        torch.testing.assert_close(there, here, rtol=1e-2, atol=1e-4)


def test_a_compiled_block_computes_the_same(config: RunConfig) -> None:
    models: list[Any] = [
        Learner(override(config, [f"generator.memory.compile={flag}"]), DEVICE).model for flag in ("false", "true")
    ]
    x = torch.randn(4, *models[0].latent_shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    plain, compiled = (model.velocity(x, 0.7, stand_in(model)) for model in models)
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("whole", [False, True], ids=["lora", "full"])
def test_a_sharded_learner_equals_one_that_is_not(config: RunConfig, whole: bool) -> None:
    """One rank of NCCL: FSDP2 gathers on streams of its own, and lent weights have to be back before it does."""
    plain = with_pull(config, adapter=Full()) if whole else with_pull(config)
    sharded = replace(plain, placement=replace(plain.placement, shard_base=True))
    groups, ranks = sampled(config, "cpu"), Ranks(0, 1, DEVICE)
    ranks.join(f"127.0.0.1:{free_ports('127.0.0.1', 0, 1)}", 60.0)
    try:
        parts = learnt(Learner(sharded, DEVICE, ranks), groups)
    finally:
        torch.distributed.destroy_process_group()
    for part, alone in zip(parts, learnt(Learner(plain, DEVICE), groups), strict=True):
        torch.testing.assert_close(part, alone, rtol=1e-3, atol=1e-5)
