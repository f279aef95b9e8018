"""Whether this machine's GPUs have room for a run, asked before any weight is loaded."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence

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
    if _elsewhere(config) or not (place.rollout_gpus or place.learner_gpus):
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
    """Bytes of the GPU with the least memory; 0 where there is none."""
    try:
        return min(map(int, _of_each_gpu("memory.total")), default=0) * MIB
    except ValueError:
        return 0


def visible_gpus() -> list[str]:
    """Those that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return _of_each_gpu("index") if given is None else [part.strip() for part in given.split(",") if part.strip()]


def apart(config: RunConfig, taken: Sequence[str], needed: float, say: Callable[[str], None]) -> list[str]:
    """The GPUs that a local Ray cluster is to have, beside a judge that has taken some; empty: all that it finds.

    Says so where the same GPU may be given to both.

    Args:
        needed: GPUs that the run asks for.
    """
    if not (taken and needed):
        return []
    others = [gpu for gpu in visible_gpus() if gpu not in taken]
    if not _elsewhere(config) and needed <= len(others):
        return others
    say(
        f"warning: the judge that this run started has GPU {', '.join(taken)} of this machine, and Ray may give them to "
        "workers and learners too; if they do not fit there together, leave the run enough others, or host the judge "
        "elsewhere (judge.endpoints)"
    )
    return []


def _elsewhere(config: RunConfig) -> str:
    """Address of the Ray cluster that the run joins, if it starts none."""
    return config.placement.ray_address or os.environ.get("RAY_ADDRESS", "")


def _of_each_gpu(what: str) -> list[str]:
    """Asks the driver, so that no CUDA context is made; nothing where there is no GPU."""
    asked = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []
