"""A whole RunConfig around the random tiny FLUX, small enough for a test."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from grpo_flex.advantages import GroupRelative
from grpo_flex.config import (
    Adapter,
    Checkpoint,
    Evaluation,
    Judge,
    Optimizer,
    Placement,
    Prompts,
    RunConfig,
    Sampling,
    Wandb,
)
from grpo_flex.dynamics import AllButLast, FlowSde
from grpo_flex.generators.flux import Flux
from grpo_flex.objectives.grpo import Grpo
from grpo_flex.pairing import RoundRobin
from grpo_flex.rewards import WinRate
from grpo_flex.types import Prompt
from reward_server.families.flex import Flex
from testbed.oracle_judge import OracleJudge


@dataclass(frozen=True, kw_only=True)
class Brightness:
    """A scorer that reads every pixel, so that equal scores mean equal pictures."""

    def __call__(self, media: np.ndarray, prompt: Prompt) -> dict[str, float]:
        return {"oracle": float(media.mean() / 255), "exact": 0.0}


def tiny_config(folder: Path, **changes: Any) -> RunConfig:
    """A valid configuration whose files lie in ``folder``; ``changes`` replace its parts."""
    from tests.tiny import (
        save_tiny_flux,
        write_prompts,
    )  # diffusers: a run that imports this module's scorer does without

    model = folder / "tiny_flux"
    if not model.is_dir():
        save_tiny_flux(model)
        write_prompts(folder / "train.jsonl", 10)
        write_prompts(folder / "heldout.jsonl", 3)
    config = RunConfig(
        name="tiny",
        steps=3,
        seed=7,
        runs_dir=str(folder / "runs"),
        generator=Flux(model=str(model), height=32, width=32, max_sequence_length=16),
        prompts=Prompts(train=str(folder / "train.jsonl"), heldout=str(folder / "heldout.jsonl"), per_step=2),
        sampling=Sampling(group_size=4, steps=4, eval_steps=2, dynamics=FlowSde(a=0.7), window=AllButLast()),
        judge=Judge(family=Flex(), server=OracleJudge(), pairs=RoundRobin()),
        reward=WinRate(),
        advantage=GroupRelative(),
        objective=Grpo(clip=1e-3),
        adapter=Adapter(rank=4, alpha=8),
        optimizer=Optimizer(lr=1e-2, ema=0.5),
        evaluation=Evaluation(every=2, scorer=Brightness()),
        placement=Placement(rollout_workers=1, rollout_cpus=1, learner_cpus=1, learner_threads=1),
        checkpoint=Checkpoint(every=1, keep=2),
        wandb=Wandb(mode="disabled"),
    )
    return replace(config, **changes)


def judge_of(config: RunConfig) -> Judge:
    """The judge of a configuration that has one."""
    assert config.judge is not None
    return config.judge
