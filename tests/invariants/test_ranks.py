"""Several learners equal one: the same update from the same groups, over real processes and gloo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from grpo_flex.config import Placement, RunConfig
from grpo_flex.learner import Learner, in_order
from grpo_flex.objectives.grpo import Grpo
from grpo_flex.ranks import Ranks
from grpo_flex.rollout import RolloutWorker
from grpo_flex.types import Prompt, RolloutGroup
from reward_server.machine import free_ports
from tests.configs import tiny_config

NAN = float("nan")
ADVANTAGES = [
    np.array([1.0, -1.0, 0.5, -0.5]),
    np.array([NAN, 1.0, NAN, -1.0]),  # masked siblings
    np.array([0.0, 0.0, 0.0, 0.0]),  # nothing to learn
    np.array([NAN, NAN, NAN, NAN]),  # wholly masked
    np.array([2.0, -1.0, 0.0, -1.0]),
]
STEPS = 2


def several(config: RunConfig, kl_beta: float, **placement: Any) -> RunConfig:
    """A step of five groups in two optimiser steps: shares of two and one, then of one and one."""
    return replace(
        config,
        objective=Grpo(clip=1e-3, kl_beta=kl_beta, kl_target=1e-4 if kl_beta else 0.0),
        optimizer=replace(config.optimizer, updates_per_rollout=2),
        placement=replace(config.placement, **placement),
    )


def batch(config: RunConfig, learner: Learner) -> list[RolloutGroup]:
    worker, adapter = RolloutWorker(config), learner.adapter()
    prompts = [Prompt(id=f"p{i}", text="a red circle on a black background") for i in range(len(ADVANTAGES))]
    return [worker.generate(learner.version, prompt, adapter) for prompt in prompts]


def trained(config: RunConfig, ranks: Ranks | None = None) -> dict[str, Any]:
    """What a learner has come to after some steps, as seen by this rank."""
    learner, metrics, after = Learner(config, "cpu", ranks), [], []
    sampler = Learner(replace(config, placement=Placement(learner_threads=1)))  # the same groups for everybody
    for step in range(STEPS):
        groups = batch(config, sampler)
        for begun in (2, 3) if ranks else ():  # a head start, which one learner does without
            learner.begin(groups, ADVANTAGES[:begun], len(groups), step)
        metrics.append(dict(learner.update(groups, ADVANTAGES, step).metrics))
        sampler.version = learner.version
        after.append([p.detach().clone() for p in learner.parameters])
    shares = [share._asdict() for share in learner.shares(len(ADVANTAGES))]
    stored = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in learner.model.transformer.parameters())
    return {"metrics": metrics, "after": after, "shares": shares, "stored": stored, "state": learner.state()}


def _rank(rank: int, address: str, configs: Sequence[RunConfig], folder: str) -> None:
    torch.set_num_threads(1)
    ranks = Ranks(rank, 2)
    ranks.join(address, 60.0)
    torch.save([trained(config, ranks) for config in configs], Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def both(configs: Sequence[RunConfig], folder: Path) -> list[list[dict[str, Any]]]:
    """What the two ranks have come to, for each configuration; one pair of processes, whose start is what takes time."""
    mp.spawn(_rank, (f"127.0.0.1:{free_ports('127.0.0.1', 0, 1)}", configs, str(folder)), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    return [list(pair) for pair in zip(*ranks, strict=True)]


CASES = ((0.0, False), (0.01, False), (0.01, True))
"""(pull to the base, whether the base is sharded)."""


@pytest.fixture(scope="module")
def of_two(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[tuple[float, bool], tuple[RunConfig, list[dict[str, Any]]]]:
    """For each case its configuration and what the two ranks have come to."""
    folder = tmp_path_factory.mktemp("ranks")
    configs = [several(tiny_config(folder), kl_beta, learners=2, shard_base=shard) for kl_beta, shard in CASES]
    return dict(zip(CASES, zip(configs, both(configs, folder), strict=True), strict=True))


@pytest.mark.parametrize(("kl_beta", "shard"), CASES)
def test_two_learners_equal_one(of_two: dict[Any, Any], kl_beta: float, shard: bool) -> None:
    config, (first, second) = of_two[kl_beta, shard]
    one = trained(several(config, kl_beta, learners=1, shard_base=False))
    for step in range(STEPS):
        # Bit for bit the same adapter on all ranks after each step …
        assert all(map(torch.equal, first["after"][step], second["after"][step]))
        # … and that of one learner, up to the order of a sum.
        for two, alone in zip(first["after"][step], one["after"][step], strict=True):
            torch.testing.assert_close(two, alone, rtol=1e-5, atol=1e-7)
        assert first["metrics"][step] == second["metrics"][step]
        assert first["metrics"][step] == pytest.approx(one["metrics"][step], rel=1e-3, abs=1e-9)
    assert first["metrics"][0] == pytest.approx(one["metrics"][0], rel=1e-5, abs=1e-9)
    assert first["state"]["kl_beta"] == second["state"]["kl_beta"] == pytest.approx(one["state"]["kl_beta"])
    own = [[i for share in rank["shares"] for i in share["own"]] for rank in (first, second)]
    assert sorted(own[0] + own[1]) == [0, 1, 2, 3, 4] and len(own[0]) != len(own[1])
    assert (first["stored"] + second["stored"] < 1.5 * one["stored"]) == shard


def test_figures_are_in_the_order_of_the_groups_whoever_computed_them() -> None:
    one, two = {"kl": [(0, 1.0), (0, 2.0), (2, 5.0)], "lr": [(0, 0.1)]}, {"kl": [(1, 3.0), (1, 4.0)], "none": []}
    assert in_order([one, two]) == {"kl": [1.0, 2.0, 3.0, 4.0, 5.0], "lr": [0.1]}
