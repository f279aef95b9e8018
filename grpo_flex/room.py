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
        ConfigError: what would lie on one GPU all the time is more than it has, what makes it less is not installed, or
            torch finds none of the GPUs.
    """
    from grpo_flex.plan import make_plan

    place = config.placement
    if elsewhere(config) or not (place.rollout_gpus or place.learner_gpus):
        return
    try:
        config.generator.memory.check_installed()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    memory = smallest_gpu()
    if not memory:
        return
    _check_torch()
    try:
        plan = make_plan(config)
    except Exception as error:  # whatever a generator of somebody's own does on the meta device: the run may be sound
        say(f"memory was not checked: {type(error).__name__}: {error}")
        return
    ask = (
        "python -m grpo_flex plan says by which part, and what would help; CUDA_VISIBLE_DEVICES leaves out a small GPU"
    )
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
    elif plan.fullest() > (free := smallest_gpu("memory.free")) > 0:
        say(
            f"warning: by the plan one GPU will hold {plan.fullest() / GIB:.1f} GiB, and one of this machine's has "
            f"{free / GIB:.1f} GiB free: something else, a judge perhaps, has the rest; {ask}"
        )


def _check_torch() -> None:
    """Refuse GPUs that the driver shows and torch does not find, before each process fails by itself. Makes no CUDA context."""
    import torch

    if torch.cuda.is_available():
        return
    if torch.version.cuda is None:
        why = "is a build for CPUs; remove .venv and run make setup here, where nvidia-smi is"
    else:
        driver = ", ".join({version for (version,) in _of_each_gpu("driver_version")}) or "unknown"
        why = (
            f"is built for CUDA {torch.version.cuda}, for which the driver (version {driver}) may be too old: CUDA 13 wants 580 or "
            "newer; update the driver, or install a torch of the same version for an older CUDA (pytorch.org)"
        )
    raise ConfigError(
        f"placement asks for GPUs, and nvidia-smi lists some, but torch {torch.__version__} sees none: it {why}"
    )


def smallest_gpu(of: str = "memory.total") -> int:
    """Bytes of the GPU with the least memory among those that this process may use; 0 where there is none.

    Args:
        of: or "memory.free".
    """
    given = _given()
    try:
        sizes = [
            int(memory) * MIB
            for index, uuid, memory in _of_each_gpu(f"index,uuid,{of}")
            if given is None or any(name == index or uuid.startswith(name) for name in given)  # CUDA takes a prefix too
        ]
    except ValueError:  # "[N/A]": a card whose memory is the host's
        return 0
    return min(sizes, default=0)


def visible_gpus() -> list[str]:
    """Those that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = _given()
    return [index for (index,) in _of_each_gpu("index")] if given is None else given


def _given() -> list[str] | None:
    """What CUDA_VISIBLE_DEVICES names: indices or UUIDs; None where it is not set and all GPUs may be used."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if given is None else [part.strip() for part in given.split(",") if part.strip()]


def apart(config: RunConfig, taken: Sequence[str], needed: float, say: Callable[[str], None]) -> list[str]:
    """The GPUs that a local Ray cluster is to have, beside a judge that has taken some; empty: all that it finds.

    Says so where the same GPU may be given to both.

    Args:
        needed: GPUs that the run asks for.
    """
    if not (taken and needed):
        return []
    others = [gpu for gpu in visible_gpus() if gpu not in taken]
    if not elsewhere(config) and needed <= len(others):
        return others
    say(
        f"warning: the judge that this run started has GPU {', '.join(taken)} of this machine, and Ray may give them to "
        "workers and learners too; if they do not fit there together, leave the run enough others, or host the judge "
        "elsewhere (judge.endpoints)"
    )
    return []


def elsewhere(config: RunConfig) -> str:
    """Address of the Ray cluster that the run joins, if it starts none."""
    return config.placement.ray_address or os.environ.get("RAY_ADDRESS", "")


def _of_each_gpu(what: str) -> list[list[str]]:
    """The fields of each GPU. Asks the driver, so that no CUDA context is made; nothing where there is no GPU."""
    asked = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [[field.strip() for field in line.split(",")] for line in said.splitlines() if line.strip()]
