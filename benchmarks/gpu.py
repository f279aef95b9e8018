"""Speed, memory and precision of one generator at its true size with random weights: what gpu_flux and gpu_wan share.

One process holds the learner's model, samples one group with it and learns from that group, as a rollout worker and the
learner do in turn. Needs torch, transformers, diffusers, peft and accelerate, and neither Ray, vLLM nor W&B.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from grpo_flex.config import RunConfig
from grpo_flex.generators.blank import Description, stand_in, without_weights
from grpo_flex.generators.memory import grow_segments
from grpo_flex.plan import GIB, Plan, Process, make_plan


@dataclass(frozen=True, kw_only=True)
class Row:
    """One setting. Seconds are of one group: its whole rollout without decoding, and one pass of the update a trained step."""

    name: str
    rollout_s: float
    rollout_tflops: float
    """Sustained, 10¹² a second."""
    update_s: float
    update_tflops: float
    """Of the model alone, as if no activation were recomputed: its share of the peak is the model FLOP utilisation."""
    update_hardware_tflops: float
    """Of all that the card did, recomputation included: the hardware FLOP utilisation."""
    peak_gib: float
    """Of the update, as the CUDA allocator counts; 0 on the CPU."""
    planned_gib: float
    rollout_peak_gib: float
    """The same of the rollout, and below of decoding, each beside what the learner has in its memory anyway."""
    rollout_planned_gib: float
    decode_peak_gib: float
    decode_planned_gib: float
    gap: float
    """Mean over siblings and steps of |log p of the rollout − log p of the update|, nats a dimension."""
    largest_gap: float


def parser(text: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=text)
    made.add_argument("--tiny", action="store_true", help="a tiny model, on the CPU: shows that the benchmark runs")
    made.add_argument("--group-size", type=int, default=4)
    made.add_argument("--steps", type=int, default=4, help="denoising steps; all but the last are trained")
    made.add_argument(
        "--peak-tflops", type=float, default=0.0, help="the card's own dense bf16 peak, for its utilisation"
    )
    made.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    return made


def plans(config: RunConfig) -> tuple[Plan, Plan]:
    """Of the experiment, and of the same without recomputed activations, whose update is the model's work alone."""
    return make_plan(config), make_plan(with_memory(config, checkpoint_every=0))


def measure(config: RunConfig, planned: tuple[Plan, Plan], name: str, device: str) -> Row:
    """Sample and learn from one group, once to warm up and once for the clock.

    Args:
        planned: the configuration's ``plans``, which take minutes: they are better made before a GPU waits for them.
    """
    import torch

    from grpo_flex.learner import BoundPolicy, Learner

    plan, plain = planned
    torch.manual_seed(0)
    with without_weights(device):
        learner = Learner(config, device)
    model: Any = learner.model
    policy = BoundPolicy(model, stand_in(model), config.sampling.dynamics, learner.weights)

    def update() -> None:
        learner.optimizer.zero_grad(set_to_none=False)
        advantages = torch.linspace(-1, 1, config.sampling.group_size, device=device)
        for term in config.objective.terms(policy, trajectories, advantages, 0):
            term.loss_G.sum().backward()
        learner.optimizer.step()

    trajectories, logprobs = _rollout(config, policy, device)
    gap = _gap(policy, trajectories, logprobs)
    update()
    rollout_s, rollout_peak = _measured(lambda: _rollout(config, policy, device), device)
    _, decode_peak = _measured(lambda: model.decode(trajectories.final_GNC), device)
    update_s, peak = _measured(update, device)
    worker, updating = plan.processes
    tera = 1e12 * config.prompts.per_step * update_s
    return Row(
        name=name, rollout_s=rollout_s, rollout_tflops=plan.forward_flops * config.sampling.steps / rollout_s / 1e12,
        update_s=update_s, update_tflops=plain.update_flops / tera,
        update_hardware_tflops=plan.update_flops / tera, peak_gib=peak / GIB, planned_gib=updating.total / GIB,
        rollout_peak_gib=rollout_peak / GIB, rollout_planned_gib=_beside(updating, worker, "sampling") / GIB,
        decode_peak_gib=decode_peak / GIB, decode_planned_gib=_beside(updating, worker, "decoding") / GIB,
        gap=float(gap.mean()), largest_gap=float(gap.max()),
    )  # fmt: skip


def with_memory(config: RunConfig, **changes: Any) -> RunConfig:
    """The same experiment with other fields of ``generator.memory``."""
    generator: Any = config.generator
    return replace(config, generator=replace(generator, memory=replace(generator.memory, **changes)))


def _rollout(config: RunConfig, policy: Any, device: str) -> tuple[Any, Any]:
    """One group's trained steps and their log-probabilities [G, K], with noise that is the same each time."""
    import torch

    from grpo_flex.dynamics import step
    from grpo_flex.types import Trajectories

    sampling, shape = config.sampling, policy.model.latent_shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sampling.group_size, *shape, generator=generator).to(device)
    sigmas, before, after, logprobs = policy.model.sigmas(sampling.steps), [], [], []
    means: list[Any] = []
    with torch.no_grad():
        for sigma, sigma_next in pairwise(sigmas[:-1]):
            noise = torch.randn(x.shape, generator=generator).to(device)
            taken = step(sampling.dynamics, x, policy.velocity(x, sigma), sigma, sigma_next, noise=noise)
            before.append(x)
            means.append(taken.mean)
            after.append(taken.next_sample)
            logprobs.append(taken.logprob)
            x = taken.next_sample
        x = sampling.solver.advance(x, policy.velocity(x, sigmas[-2]), sigmas[-2], sigmas[-1], None)
    trajectories = Trajectories(
        latents_GKNC=torch.stack(before, 1), next_latents_GKNC=torch.stack(after, 1),
        steps_K=tuple(range(len(before))), sigmas=tuple(sigmas), logprobs_GK=torch.stack(logprobs, 1),
        means_GKNC=torch.stack(means, 1), final_GNC=x,
    )  # fmt: skip
    return trajectories, trajectories.logprobs_GK


def _gap(policy: Any, trajectories: Any, logprobs: Any) -> Any:
    """|log p of the rollout − log p with gradients on|, [G, K]: what the ratio is away from 1 before any update."""
    import torch

    scored = [policy.rescore(trajectories, k).logprob.detach() for k in range(len(trajectories.steps_K))]
    return (torch.stack(scored, 1) - logprobs).abs()


def _beside(learner: Process, worker: Process, moment: str) -> int:
    """Planned bytes of the one process here: what the learner holds anyway, and what a worker's moment adds to it."""
    added = {name: size for name, size in worker.moments[moment].items() if name not in worker.stays}
    return sum({**learner.stays, **added}.values())


def _measured(call: Callable[[], Any], device: str) -> tuple[float, int]:
    """Seconds, and the peak of the CUDA allocator's bytes; 0 on the CPU."""
    import torch

    on_gpu = device == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    wait()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began, torch.cuda.max_memory_allocated() if on_gpu else 0


def run(config: RunConfig, arguments: argparse.Namespace) -> list[Row]:
    """All blocks recomputed, without and with compiling; each in a process's memory of its own as far as it can be freed.

    Each is printed when it is there, and what has been measured stands if the next one fails.
    """
    import gc

    import torch

    grow_segments()  # as a run's processes do
    device = "cuda" if torch.cuda.is_available() and not arguments.tiny else "cpu"
    if device == "cpu" and not arguments.tiny:
        raise SystemExit("error: torch sees no CUDA device here; --tiny runs a small model on the CPU")
    settings: dict[str, dict[str, Any]] = {"all blocks recomputed": {"checkpoint_every": 1}}
    if not arguments.no_compile:
        settings["recomputed, compiled"] = {"checkpoint_every": 1, "compile": True}
    planned = plans(with_memory(config, checkpoint_every=1))  # compiling changes nothing of it
    rows: list[Row] = []
    for name, changes in settings.items():
        try:
            row = measure(with_memory(config, **changes), planned, name, device)
        except RuntimeError:  # of the compiler, a kernel or the allocator
            if not rows:
                raise
            traceback.print_exc()
            print(f"{name}: failed, see above", flush=True)
            break
        _print(row, arguments.peak_tflops)
        rows.append(row)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


def _print(row: Row, peak_tflops: float) -> None:
    def rate(tflops: float) -> str:
        return f"{tflops:8.3f} TFLOP/s" + (f" ({tflops / peak_tflops:.1%})" if peak_tflops else "")

    print(f"{row.name}")
    print(f"  rollout of a group   {row.rollout_s:9.3f} s   {rate(row.rollout_tflops)} of the model")
    print(f"  update of a group    {row.update_s:9.3f} s   {rate(row.update_tflops)} of the model")
    print(f"  {'':<33}{rate(row.update_hardware_tflops)} of the hardware, recomputation included")
    print(f"  peak of the rollout  {row.rollout_peak_gib:9.3f} GiB, planned {row.rollout_planned_gib:.3f}")
    print(f"  peak of decoding     {row.decode_peak_gib:9.3f} GiB, planned {row.decode_planned_gib:.3f}")
    print(f"  peak of the update   {row.peak_gib:9.3f} GiB, planned {row.planned_gib:.3f}")
    print(f"  log-prob gap         {row.gap:9.2e} mean, {row.largest_gap:.2e} largest", flush=True)


def save(described: Description, folder: Path) -> str:
    """A folder with the configuration files alone, as ``generator.model`` takes it while nothing is loaded."""
    for name, part in described.parts.items():
        (folder / name).mkdir(parents=True)
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name / file).write_text(json.dumps(dict(part)))
    (folder / "model_index.json").write_text(json.dumps(dict(described.index)))
    return str(folder)
