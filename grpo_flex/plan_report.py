"""What a person reads of a plan."""

from __future__ import annotations

import math
from collections.abc import Iterator

from grpo_flex.config import Full
from grpo_flex.plan import GIB, Plan, Process
from grpo_flex.plan_changes import first_change

TIGHT = 0.9
"""A card that is fuller than this by the plan leaves little for what the plan does not count."""


def report(plan: Plan, gpus: int, gpu_memory: float, tflops: float, judge_rate: float) -> Iterator[str]:
    """Lines of text.

    Args:
        gpus, gpu_memory: what there is; 0: not said, and nothing is compared.
        tflops: sustained by one GPU, 10¹² a second; 0: no times.
        judge_rate: verdicts that the judge gives in a second; 0: not known.
    """
    sampling = plan.config.sampling
    at_once = min(sampling.micro_batch or sampling.group_size, sampling.group_size)
    yield from _parameters(plan)
    for process in plan.processes:
        yield from _process(process, at_once)
    yield from _step(plan, tflops, judge_rate)
    if gpus:
        yield from _fit(plan, gpus, gpu_memory)


def _parameters(plan: Plan) -> Iterator[str]:
    config = plan.config
    generator = config.generator
    yield f"{config.name}: {generator.model}"  # pyright: ignore[reportAttributeAccessIssue]
    yield "\nParameters"
    for name, count in plan.parameters.items():
        yield f"  {name:<36}{count / 1e6:>12,.1f} M"
    if isinstance(config.adapter, Full):
        trained = "trained: the whole transformer"
        width = 2 if generator.dtype == "bfloat16" else 4  # pyright: ignore[reportAttributeAccessIssue]
    else:
        trained, width = f"adapter of rank {config.adapter.rank}", 4
    yield f"  {trained:<36}{plan.adapter / 1e6:>12,.1f} M{_gib(width * plan.adapter):>14} as a file"


def _process(process: Process, at_once: int) -> Iterator[str]:
    """A column for each moment that may be the fullest, and which one is."""
    where = f"{process.gpus:g} GPU each" if process.gpus else "on the CPU"
    siblings = f"{at_once} sibling{'' if at_once == 1 else 's'} at once"
    yield f"\nMemory of each {process.name} ({process.count}, {where}), {siblings}; fullest: {process.fullest}"
    parts = dict.fromkeys(name for held in process.moments.values() for name in held)
    width = max(map(len, parts)) + 2
    yield "  " + " " * width + "".join(f"{moment:>14}" for moment in process.moments)
    for name in parts:
        held = (moment.get(name, 0) for moment in process.moments.values())
        yield f"  {name:<{width}}" + "".join(f"{_gib(size) if size else '-':>14}" for size in held)
    totals = (sum(moment.values()) for moment in process.moments.values())
    yield f"  {'together':<{width}}" + "".join(f"{_gib(size):>14}" for size in totals)


def _step(plan: Plan, tflops: float, judge_rate: float) -> Iterator[str]:
    prompts, sampling = plan.config.prompts, plan.config.sampling
    yield f"\nOne step: {prompts.per_step} prompts × {sampling.group_size} siblings"
    place = plan.config.placement
    workers = place.learners if place.colocated else place.rollout_workers
    rollout = plan.rollout_flops / (tflops * 1e12 * workers) if tflops else 0.0
    update = plan.update_flops / (tflops * 1e12 * place.learners) if tflops else 0.0
    judge = plan.judge_calls / judge_rate if judge_rate else 0.0
    rows = (
        ("rollout", _tera(plan.rollout_flops), rollout, f"{workers} at once"),
        ("update", _tera(plan.update_flops), update, f"{place.learners} at once"),
        ("judge", f"{plan.judge_calls:,} verdicts", judge, "while the rollout goes on"),
    )
    for name, work, seconds, how in rows:
        yield f"  {name:<12}{work:>24}" + (f"{seconds:>12,.1f} s, {how}" if seconds else "")
    yield f"  {'stored':<12}{_gib(plan.stored):>24} in the host's memory: groups"
    yield f"  {'':<12}{_gib(plan.published):>24} and weights: published, newest state, copies"
    if tflops:
        first = max(rollout, judge)
        whole = max(first, update) if sampling.lookahead else first + update
        yield f"  {'together':<12}{'':>24}{whole:>12,.1f} s, if a GPU sustains {tflops:g} TFLOP/s" + (
            "" if judge_rate else "; without the judge, whose --judge-rate is not given"
        )
        yield from _limits(plan, update, plan.longest_call / (tflops * 1e12))


def _limits(plan: Plan, update: float, call: float) -> Iterator[str]:
    """The limits of time that an update, or a worker's longest call, would not keep; both in seconds."""
    place = plan.config.placement
    for field, limit, seconds, what in (
        ("update_timeout_s", place.update_timeout_s, update, "an update"),
        ("rollout_timeout_s", place.rollout_timeout_s, call, "the longest call of a rollout worker"),
    ):
        if seconds > limit:
            yield (
                f"\nplacement.{field} is {limit:g}, and {what} would take {seconds:,.0f} s: who takes longer is taken for hung "
                f"and started again. Set twice that, placement.{field}={2 * math.ceil(seconds)}, or more."
            )


def _fit(plan: Plan, gpus: int, gpu_memory: float) -> Iterator[str]:
    needed, full = len(plan.cards()), plan.fullest()
    if plan.fits(gpus, gpu_memory):
        yield f"\nFits: {needed} of {gpus} GPUs are used, and the fullest holds {_gib(full).strip()} of {gpu_memory:g} GiB."
        if full > TIGHT * gpu_memory * GIB:
            yield "It is tight: CUDA's own memory, fragmentation and most of the libraries' workspaces are not in these numbers."
        return
    if needed > gpus:
        yield f"\nDoes not fit: placement asks for {needed} GPUs and there are {gpus}; set {_fewer_gpus(plan)}."
        return
    yield f"\nDoes not fit: the fullest GPU would hold {_gib(full).strip()} of {gpu_memory:g} GiB."
    found = first_change(plan, gpus, gpu_memory)
    if found is None:
        yield (
            "No single change of micro-batch, precision, recomputation, offloading, quantisation and group size makes it "
            "fit, nor all of them together."
        )
    else:
        needs = "; base_bits needs bitsandbytes" if any("base_bits" in change for change in found[0]) else ""
        yield f"First change that makes it fit: {' '.join(found[0])} ({_gib(found[1].fullest()).strip()}{needs})."


def _fewer_gpus(plan: Plan) -> str:
    """The fields of ``placement`` that decide it. NCCL takes no two ranks on one GPU, so those of a group share none."""
    place = plan.config.placement
    if place.colocated:
        return "placement.learners, each of which has a GPU of its own"
    if place.learners > 1 or place.broadcast:
        return "placement.rollout_workers and placement.learners"
    return (
        "placement.colocated=true, with which the learner samples too; or placement.rollout_workers, and rollout_gpus and "
        "learner_gpus below 1 for workers that share one with the learner"
    )


def _tera(flops: float) -> str:
    return f"{flops / 1e12:,.0f} TFLOP" if flops >= 1e14 else f"{flops / 1e12:,.3g} TFLOP"


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:,.2f} MiB"
