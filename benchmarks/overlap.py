"""How well sampling, judging and learning overlap: a step against the sum of its phases and against the longest.

The same work is done in several ways by the same processes, one rollout worker and one learner of one thread each:

- *one by one*: every phase waits for all of the one before it. Its phases' own times, their sum, and the longest of them are
  what the others are compared with.
- *no head start*: a group is judged while the next is sampled; the update waits for all verdicts.
- *as trained*: the learner also begins with the groups that are complete.

The judge is the oracle with a latency that makes judging take 0.5, 1 and 2 times as long as sampling. Steps are medians;
the first of each way, which fills the pipeline, and the last, which has an evaluation, are left out.

    python -m benchmarks.overlap                           # the table above, with lookahead 0 and 1
    python -m benchmarks.overlap --staleness 0 1 2         # what sampling ahead does to the log ratio
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments import shapes_image_flow_grpo
from grpo_flex.advantages import GroupRelative
from grpo_flex.config import Judge, Prompts, RunConfig, Wandb
from grpo_flex.console import Console
from grpo_flex.metrics import Row, RunLog, read_metrics
from grpo_flex.prompts import PromptStream, read_prompts
from grpo_flex.run import quieten
from grpo_flex.train import Flight, Trainer
from grpo_flex.types import Verdict
from testbed.oracle_judge import OracleJudge

if TYPE_CHECKING:
    from grpo_flex.cluster import Cluster

PHASES = ("rollout", "judge", "update")
HELDOUT = 2
"""Held-out prompts; they are no part of what is measured."""


class NoHeadStart(Trainer):
    def _begin(self) -> None:
        pass


class OneByOne(NoHeadStart):
    """Judging begins when all groups are there."""

    def _ask_about(self, flight: Flight, first: int, *results: Any) -> None:
        pass

    def judge(self, flight: Flight) -> list[list[Verdict]]:
        results = (result for job in dict.fromkeys(flight.jobs) for result in job.results)
        super()._ask_about(flight, 0, *results)
        return super().judge(flight)


@dataclass(frozen=True, kw_only=True)
class Ways:
    """Seconds a step, with one latency of the judge and one lookahead."""

    lookahead: int
    phases: Mapping[str, float]
    """Own times, measured one by one."""
    no_head_start: float
    as_trained: float
    early: float
    """Groups of a step with which the learner could begin before the last was judged, on average."""

    @property
    def total(self) -> float:
        return sum(self.phases.values())

    @property
    def longest(self) -> float:
        return max(self.phases.values())


def experiment(prompts: int, group_size: int, latency_s: float, lookahead: int) -> RunConfig:
    """Flow-GRPO on the testbed, with advantages that need no other group, and one optimiser step a rollout."""
    config = shapes_image_flow_grpo.config()
    return replace(
        config,
        prompts=replace(config.prompts, per_step=prompts),
        sampling=replace(config.sampling, group_size=group_size, lookahead=lookahead),
        judge=replace(_judge(config), server=OracleJudge(latency_s=latency_s)),
        advantage=GroupRelative(),
        optimizer=replace(config.optimizer, updates_per_rollout=1),
        evaluation=replace(config.evaluation, every=10**9, samples_per_prompt=1, versus_base=0),
        placement=replace(config.placement, rollout_workers=1, learner_threads=1),
        wandb=Wandb(mode="disabled"),
    )


def latency_for(judge_s: float, config: RunConfig) -> float:
    """What one answer has to take for all the questions of a step to take ``judge_s``, so many at once."""
    judge = _judge(config)
    questions = config.prompts.per_step * len(judge.pairs.pairs(config.sampling.group_size, 0))
    return judge_s / math.ceil(questions / judge.concurrency)


def _judge(config: RunConfig) -> Judge:
    assert config.judge is not None
    return config.judge


@contextmanager
def started(config: RunConfig) -> Iterator[Cluster]:
    """The processes of a run, ready to work."""
    from grpo_flex.cluster import Cluster
    from grpo_flex.placement import Reservation

    quieten()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        server = stack.enter_context(_judge(config).server.start(folder))
        reserved = stack.enter_context(Reservation(config))
        cluster = stack.enter_context(Cluster(config, reserved))
        cluster.ask(server.endpoints, Path(folder))
        cluster.wait_until_ready()
        yield cluster


def rows(config: RunConfig, cluster: Cluster, way: type[Trainer], done: int, steps: int) -> list[Row]:
    """Metrics of so many steps, after ``done`` others by the same processes; without the first and the last of them."""
    config = replace(config, steps=done + steps)
    stream = PromptStream(_prompts(config.prompts, "train"), config.prompts.per_step, config.seed)
    heldout = _prompts(config.prompts, "heldout")[:HELDOUT]
    with tempfile.TemporaryDirectory() as folder, RunLog(folder, config) as log:
        with Console(config.steps, done, way.__name__) as console:
            way(config, cluster, log, console, prompts=stream, heldout=heldout, step=done).run()
        return [row for row in read_metrics(folder) if done + 1 < (row["step"] or 0) < config.steps]


def _prompts(prompts: Prompts, which: str) -> list:
    return read_prompts(getattr(prompts, which), f"prompts.{which}")


def values(found: Sequence[Row], key: str) -> list[float]:
    return [value for row in found if (value := row[key]) is not None]


def median(found: Sequence[Row], key: str) -> float:
    return float(np.median(values(found, key)))


def sampling_s(prompts: int, group_size: int, steps: int) -> float:
    """How long the sampling of a step takes by itself."""
    config = experiment(prompts, group_size, 0.0, 0)
    with started(config) as cluster:
        return median(rows(config, cluster, OneByOne, 0, steps), "perf/rollout_s")


def measure(config: RunConfig, steps: int) -> Ways:
    """All ways, one after another, by the same processes."""
    with started(config) as cluster:
        at_once = replace(config, sampling=replace(config.sampling, lookahead=0))
        alone = rows(at_once, cluster, OneByOne, 0, steps)
        plain = rows(config, cluster, NoHeadStart, steps, steps)
        trained = rows(config, cluster, Trainer, 2 * steps, steps)
    return Ways(
        lookahead=config.sampling.lookahead,
        phases={phase: median(alone, f"perf/{phase}_s") for phase in PHASES},
        no_head_start=median(plain, "perf/step_s"),
        as_trained=median(trained, "perf/step_s"),
        early=float(np.mean(values(trained, "perf/early_groups"))),
    )


def show(factor: float, ways: Ways) -> str:
    phases = "".join(f"{ways.phases[phase]:>9.2f}" for phase in PHASES)
    compared = f"{ways.as_trained / ways.total:>11.2f}{ways.as_trained / ways.longest:>13.2f}"
    return (
        f"{factor:>6g}x{ways.lookahead:>11}{phases}{ways.total:>8.2f}{ways.no_head_start:>15.2f}{ways.as_trained:>12.2f}"
        f"{compared}{ways.early:>8.1f}"
    )


HEAD = (
    f"{'judge':>7}{'lookahead':>11}{'rollout':>9}{'judge':>9}{'update':>9}{'sum':>8}{'no head start':>15}"
    f"{'as trained':>12}{'over sum':>11}{'over longest':>13}{'early':>8}"
)


# ---------------------------------------------------------------- staleness

STALENESS = ("policy/staleness", "policy/first_log_ratio_abs", "policy/log_ratio_abs", "policy/clip_fraction")


def staleness(lookahead: int, steps: int, seed: int) -> dict[str, float]:
    """Medians over the steps of the Flow-GRPO recipe that are as stale as they get."""
    config = shapes_image_flow_grpo.config()
    config = replace(
        config,
        seed=seed,
        sampling=replace(config.sampling, lookahead=lookahead),
        evaluation=replace(config.evaluation, every=10**9, samples_per_prompt=1, versus_base=0),
        wandb=Wandb(mode="disabled"),
    )
    with started(config) as cluster:
        found = [row for row in rows(config, cluster, Trainer, 0, steps) if row["policy/staleness"] == lookahead]
    return {key: median(found, key) for key in STALENESS}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overlap", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=8, help="for each way; 3 or more")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument(
        "--judge", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="judging time over sampling time"
    )
    parser.add_argument("--lookahead", type=int, nargs="+", default=[0, 1])
    parser.add_argument(
        "--staleness", type=int, nargs="+", metavar="K", help="compare these lookaheads' log ratios instead"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the runs of --staleness")
    options = parser.parse_args(arguments)
    if options.steps < 3:
        parser.error("--steps needs at least 3: the first and the last are left out")
    lines = _staleness_table(options) if options.staleness else _overlap_table(options)
    print("\n" + "\n".join(lines))


def _overlap_table(options: argparse.Namespace) -> list[str]:
    shape = (options.prompts, options.group_size)
    alone, table = sampling_s(*shape, options.steps), [HEAD]
    for factor in options.judge:
        latency = latency_for(factor * alone, experiment(*shape, 0.0, 0))
        for lookahead in options.lookahead:
            table.append(show(factor, measure(experiment(*shape, latency, lookahead), options.steps)))
    return table


def _staleness_table(options: argparse.Namespace) -> list[str]:
    table = ["".join(f"{key:>29}" for key in ("lookahead", *STALENESS))]
    for lookahead in options.staleness:
        found = staleness(lookahead, options.steps, options.seed)
        table.append(f"{lookahead:>29}" + "".join(f"{value:>29.3g}" for value in found.values()))
    return table


if __name__ == "__main__":
    main()
