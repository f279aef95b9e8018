"""Whether this machine's GPUs have room for a run, asked before any weight is loaded."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable

from grpo_flex.config import ConfigError, RunConfig

MIB, GIB = 2**20, 2**30


def check_room(config: RunConfig, say: Callable[[str], None]) -> None:
    """Refuse a run whose weights and optimiser state exceed a GPU; warn of one whose activations may.

    Says nothing of a run on CPUs, on a cluster whose GPUs are not this machine's, or of a model that cannot be planned.

    Raises:
        ConfigError: what would lie on one GPU all the time is more than it has.
    """
    from grpo_flex.plan import make_plan

    place = config.placement
    elsewhere = place.ray_address or os.environ.get("RAY_ADDRESS")
    if elsewhere or not (place.rollout_gpus or place.learner_gpus):
        return
    memory = smallest_gpu()
    if not memory:
        return
    try:
        plan = make_plan(config)
    except (ConfigError, NotImplementedError, RuntimeError) as error:  # a generator that meta tensors cannot run
        say(f"memory was not checked: {error}")
        return
    ask = "python -m grpo_flex plan says by which part, and what would help"
    if plan.lasting() > memory:
        raise ConfigError(
            f"generator.model and adapter need {plan.lasting() / GIB:.1f} GiB on one GPU for weights and optimiser alone, "
            f"and this machine's have {memory / GIB:.1f} GiB; {ask}"
        )
    if plan.fullest() > memory:
        say(
            f"warning: by the plan one GPU will hold {plan.fullest() / GIB:.1f} GiB, and this machine's have "
            f"{memory / GIB:.1f} GiB; {ask}"
        )


def smallest_gpu() -> int:
    """Bytes of the GPU with the least memory; 0 where there is none. Asks the driver, so that no CUDA context is made."""
    asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout
        return min(int(line) for line in said.split()) * MIB
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0
