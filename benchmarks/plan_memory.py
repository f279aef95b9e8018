"""A plan's activations against the peaks of the CPU's allocator: `python -m benchmarks.plan_memory`.

The testbed's FLUX and Wan, real groups and real updates of several objectives; each figure is planned bytes over measured ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grpo_flex.config import RunConfig
from grpo_flex.config_file import load_experiment
from grpo_flex.dynamics import AllButLast, FlowSde
from grpo_flex.learner import Learner
from grpo_flex.objectives.base import Objective
from grpo_flex.objectives.grpo import Grpo
from grpo_flex.objectives.guard import Guard
from grpo_flex.objectives.nft import Nft
from grpo_flex.overrides import override
from grpo_flex.plan import make_plan
from grpo_flex.prompts import read_prompts
from grpo_flex.rollout import RolloutWorker

RECIPES = ("shapes_image_flow_grpo", "shapes_video_oracle")
OBJECTIVES: tuple[Objective, ...] = (Guard(clip=1e-4), Grpo(clip=1e-4, kl_beta=0.01), Nft())


def peak_of(call: Callable[[], Any]) -> int:
    """Largest sum of the CPU's allocations, as PyTorch's profiler reports them, while ``call`` runs for the second time."""
    call()
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        call()
    peak = now = 0
    results: Any = profile.profiler
    for event in results.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def update_peak(config: RunConfig) -> int:
    """Of one group's whole update: every pass of the objective, forward and back, and the optimiser's step."""
    learner, worker = Learner(config), RolloutWorker(config)
    prompt = read_prompts(config.prompts.train, "prompts.train")[0]
    group = worker.generate(0, prompt, learner.adapter())
    advantages = np.linspace(-1.0, 1.0, config.sampling.group_size)
    return peak_of(lambda: learner.update([group], [advantages], 0))


def planned_peak(config: RunConfig) -> int:
    """The plan's activations of the learner."""
    (learner,) = (process for process in make_plan(config).processes if process.name == "learner")
    return learner.parts["activations"]


def with_objective(recipe: str, objective: Objective) -> RunConfig:
    """A testbed recipe in small: four siblings, four noisy steps."""
    config = load_experiment(Path("experiments") / f"{recipe}.py")
    sampling = replace(config.sampling, dynamics=FlowSde(a=0.7), window=AllButLast(), same_noise=True)
    small = replace(config, objective=objective, sampling=sampling)
    return override(small, ["sampling.group_size=4", "sampling.steps=4", "sampling.micro_batch=0"])


def main() -> None:
    print("planned / measured bytes of an update")
    for recipe in RECIPES:
        for objective in OBJECTIVES:
            config = with_objective(recipe, objective)
            ratio = planned_peak(config) / update_peak(config)
            print(f"{recipe:<24}{type(objective).__name__:<8}{ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
