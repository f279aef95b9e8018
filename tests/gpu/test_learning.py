"""Sampling and learning on a GPU against the CPU, compiled blocks against plain ones, NCCL and FSDP2 against neither."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

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


def gradients(config: RunConfig, ranks: Ranks, shard: bool) -> list[torch.Tensor]:
    """Of all weights, moved away from the base's, where the base's are lent between the forward and the backward pass."""
    model: Any = config.generator.load(DEVICE)
    weights: Any = Full().attach(model, 0)
    masters, chance = weights.train(ranks, shard), torch.Generator().manual_seed(0)
    assert weights.split == shard
    with torch.no_grad():
        for master in masters:
            master.add_(0.1 * torch.randn(master.shape, generator=chance).to(master))
            master.grad = torch.zeros_like(master)
    weights.sync()
    told, x = stand_in(model), torch.randn(4, *model.latent_shape, generator=chance).to(DEVICE)
    loss = model.velocity(x, 0.7, told).square().sum()
    with torch.no_grad(), weights.base():
        model.velocity(x, 0.7, told)
    loss.backward()
    return [master.grad.cpu() for master in masters]


def test_lent_weights_are_back_before_a_sharded_backward_pass(config: RunConfig) -> None:
    """FSDP2 gathers on streams of its own. One rank is enough for that, and all of a weight is then its part."""
    ranks = Ranks(0, 1, DEVICE)
    ranks.join(f"127.0.0.1:{free_ports('127.0.0.1', 0, 1)}", 60.0)
    try:
        sharded = gradients(config, ranks, shard=True)
    finally:
        torch.distributed.destroy_process_group()
    for part, alone in zip(sharded, gradients(config, Ranks(), shard=False), strict=True):
        torch.testing.assert_close(part, alone, rtol=1e-3, atol=1e-5)


def _rank(rank: int, address: str, configs: list[RunConfig], groups: list[RolloutGroup], folder: str) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = str(rank)
    ranks = Ranks(rank, 2, DEVICE)
    ranks.join(address, 60.0)
    learners = (Learner(config, DEVICE, ranks) for config in configs)
    torch.save([(learner.sharded, learnt(learner, groups)) for learner in learners], Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="NCCL takes no two ranks on one GPU")
def test_two_learners_on_nccl_equal_one(config: RunConfig, tmp_path: Path) -> None:
    """The base whole and sharded, with a LoRA adapter."""
    plain = with_pull(config)
    both = [replace(plain, placement=replace(plain.placement, learners=2, shard_base=shard)) for shard in (False, True)]
    groups = sampled(config, "cpu")
    address = f"127.0.0.1:{free_ports('127.0.0.1', 0, 1)}"
    mp.spawn(_rank, (address, both, groups, str(tmp_path)), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    alone = learnt(Learner(plain, DEVICE), groups)
    for found in (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)):
        assert [sharded for sharded, _ in found] == [False, True]
        for _, weights in found:
            for one, two in zip(alone, weights, strict=True):
                torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)
