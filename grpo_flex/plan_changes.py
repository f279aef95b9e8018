"""What would make an experiment fit into the GPUs that there are: the least change first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from grpo_flex.config import ConfigError, Full, RunConfig
from grpo_flex.overrides import override
from grpo_flex.plan import Plan, make_plan


def first_change(plan: Plan, gpus: int, gpu_memory: float) -> tuple[list[str], Plan] | None:
    """The overrides that make it fit: one alone if one is enough, or else those that it takes together; None if none do."""

    def fitting(assignments: Sequence[str]) -> Plan | None:
        changed = _with(plan.config, assignments)
        tried = make_plan(changed) if changed else None
        return tried if tried and tried.fits(gpus, gpu_memory) else None

    together: dict[str, str] = {}
    for assignment in _changes(plan.config):
        if alone := fitting([assignment]):
            return [assignment], alone
    for assignment in _changes(plan.config):
        if not _with(plan.config, [assignment]):
            continue
        together[assignment.partition("=")[0]] = assignment  # a field's smaller number takes the place of a larger one
        if fitted := fitting(list(together.values())):
            return _needed(list(together.values()), fitting, fitted)
    return None


def _needed(
    assignments: list[str], fitting: Callable[[Sequence[str]], Plan | None], fitted: Plan
) -> tuple[list[str], Plan]:
    """Those of the overrides without which it does not fit; the dearer ones, which come last, are given up first."""
    for assignment in reversed(assignments):
        fewer = [other for other in assignments if other != assignment]
        if still := fitting(fewer):
            assignments, fitted = fewer, still
    return assignments, fitted


def _changes(config: RunConfig) -> Iterator[str]:
    """From what costs least to what costs most: smaller micro-batches, precision, time, the base's own bits, the group."""
    bits = getattr(getattr(config.generator, "memory", None), "base_bits", 0)
    shares_out = config.placement.learners > 1 and not config.placement.colocated and not bits
    size = config.sampling.micro_batch or config.sampling.group_size
    while size > 1 and not config.sampling.batch_tokens:
        size = math.ceil(size / 2)
        yield f"sampling.micro_batch={size}"
    yield "generator.dtype=bfloat16"
    if shares_out:
        yield "placement.shard_base=true"
    yield "generator.memory.checkpoint_every=1"
    yield "generator.memory.encodings=encodings"
    yield "generator.memory.vae_slicing=true"
    yield "generator.memory.vae_tiling=true"
    yield "generator.vae_dtype=bfloat16"
    yield "generator.memory.offload=true"
    if (
        not isinstance(config.adapter, Full) and not shares_out
    ):  # quantised weights can be neither trained nor shared out
        yield from (f"generator.memory.base_bits={fewer}" for fewer in (8, 4) if not bits or fewer < bits)
    size = config.sampling.group_size
    while size > 4:
        size = max(4, size // 2)
        yield f"sampling.group_size={size}"


def _with(config: RunConfig, assignments: Sequence[str]) -> RunConfig | None:
    """The configuration with those overrides that its generator has a field for; None where nothing would change."""
    changed = config
    for assignment in assignments:
        with suppress(ConfigError):
            changed = override(changed, [assignment])
    return None if changed == config else changed
