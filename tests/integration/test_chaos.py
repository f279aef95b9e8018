"""A run whose processes are killed and stopped at random, by a seeded schedule, equals the run that was left in peace.

The short form is a part of every test run; ``make chaos`` is the long one (``CHAOS_STEPS``, ``CHAOS_SEED``), which also
watches over memory.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from grpo_flex import checkpoint, verdicts
from grpo_flex.config import RunConfig
from grpo_flex.metrics import read_metrics
from grpo_flex.prompts import PromptStream, read_prompts, seed_for
from testbed.oracle_judge import OracleJudge
from tests.configs import judge_of, tiny_config
from tests.integration.processes import descendants, experiment_file, rows, start_training, wait_for

STEPS = int(os.environ.get("CHAOS_STEPS", "11"))
SEED = int(os.environ.get("CHAOS_SEED", "0"))
FATES = (
    ("ray::RolloutActor", "killed"), ("ray::RolloutActor", "hung"), ("ray::LearnerActor", "killed"),
    ("ray::LearnerActor", "hung"), ("testbed.oracle_judge", "killed"), ("testbed.oracle_judge", "hung"),
    ("ray::JudgeActor", "killed"), ("driver", "killed"), ("driver", "hung"),
)  # fmt: skip
GAP = 1 if STEPS < 50 else 4
"""Steps between two blows."""
HANG_S = 2.0
"""A judge that hangs comes back: as long as its process lives, the run waits for it. So does a driver, and all wait for it."""
QUIET_SHARE = 0.5
"""In the long form the driver is left alone for so much of the run, the last part: its memory is watched there."""
GROWTH_MB = 32
"""What a process may grow by in that time. One adapter and one state a step would be more."""
MARK = "GRPO_FLEX_TEST_CHAOS"


@dataclass(kw_only=True)
class Ordeal:
    """A run in progress, and what is done to it."""

    run_dir: Path
    process: subprocess.Popen[str]
    random: random.Random
    said: list[str] = field(default_factory=list)
    memory: list[tuple[int, int]] = field(default_factory=list)
    """Of the driver and of the object store, MB, at each blow since the driver was last killed."""

    def strike(self, victim: str, fate: str, at_step: int) -> None:
        """Wait for the step, and for some moment in it."""
        wait_for(lambda: len(rows(self.run_dir)) > at_step, self.process)
        time.sleep(self.random.uniform(0, 0.6))
        if (victim, fate) == ("driver", "hung"):
            return self.stop_for_a_while(self.process.pid)
        if victim == "driver":
            wait_for(lambda: checkpoint.complete(self.run_dir), self.process)  # without any there is nothing to resume
            return self.kill_the_driver()
        self.memory.append((resident_mb(self.process.pid), resident_mb(self._raylet(), "RssShmem")))
        wait_for(lambda: descendants(self.process.pid, victim), self.process)
        pid = self.random.choice(descendants(self.process.pid, victim))
        if victim == "testbed.oracle_judge" and fate == "hung":
            return self.stop_for_a_while(pid)
        os.kill(pid, signal.SIGKILL if fate == "killed" else signal.SIGSTOP)

    def stop_for_a_while(self, pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(HANG_S)
        os.kill(pid, signal.SIGCONT)

    def kill_the_driver(self) -> None:
        self.process.kill()
        self.said.append(self.process.communicate(timeout=60)[0])
        nobody_is_left()
        self.memory.clear()
        self.process = start_training("--resume", str(self.run_dir))

    def finish(self) -> None:
        self.said.append(self.process.communicate(timeout=600)[0])
        assert self.process.returncode == 0, self.said[-1]
        nobody_is_left()

    def _raylet(self) -> int:
        return descendants(self.process.pid, "/raylet/raylet")[0]


def resident_mb(pid: int, kind: str = "VmRSS") -> int:
    """Of a process; "RssShmem" of a raylet is what its object store has ever touched."""
    found = re.search(rf"^{kind}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) // 1024


def nobody_is_left(limit_s: float = 100.0) -> None:
    """Every process that a run has started, however indirectly, ends with it.

    Ray's agent of a node is not waited for: it looks for a head that was killed for more than a minute (seen twice) and
    then ends, too.
    """
    until = time.monotonic() + limit_s
    while left := [process for process in marked() if "DashboardAgent" not in process]:
        assert time.monotonic() < until, left
        time.sleep(0.1)


def marked() -> Iterator[str]:
    """Processes with the test's mark in their environment, which children inherit; not this one."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"{MARK}={os.getpid()}".encode() in (entry / "environ").read_bytes():
                yield f"{entry.name} {(entry / 'cmdline').read_bytes()[:200]!r}"
        except OSError:  # it has ended in between, or is somebody else's
            continue


def schedule(chance: random.Random, steps: int) -> list[tuple[int, str, str]]:
    """(step after which it comes, victim, fate): all fates in one order after another, none in the last two steps."""
    order: list[tuple[str, str]] = []
    while len(order) < len(FATES) or len(order) * GAP < steps:
        order += chance.sample(FATES, len(FATES))
    blows = [(1 + GAP * i, *fate) for i, fate in enumerate(order) if 1 + GAP * i <= steps - 2]
    last = steps if STEPS < 50 else steps * (1 - QUIET_SHARE)
    return [blow for blow in blows if blow[1:] != ("driver", "killed") or blow[0] < last]


def hardy(folder: Path) -> RunConfig:
    """A configuration that waits for every verdict and has nothing against being started again."""
    config = tiny_config(folder, steps=STEPS)
    judge = replace(
        judge_of(config), server=OracleJudge(latency_s=0.3), restarts=1000, min_judged=1.0, min_groups=1.0,
        timeout_s=2.0, backoff_s=0.1, probe_s=0.5, patience_s=1.0,
    )  # fmt: skip
    placement = replace(
        config.placement, rollout_workers=2, rollout_timeout_s=4.0, rollout_restarts=1000, update_timeout_s=4.0,
        learner_restarts=1000,
    )  # fmt: skip
    evaluation = replace(config.evaluation, versus_base=0)  # its questions would stand among those of the steps
    return replace(config, judge=judge, placement=placement, evaluation=evaluation)


@pytest.mark.timeout(600 + 30 * STEPS)
def test_nothing_is_lost_whoever_is_killed_or_hangs(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MARK, str(os.getpid()))
    config, chance = hardy(tmp_path), random.Random(SEED)
    run_dir = tmp_path / "runs" / "tiny"
    ordeal = Ordeal(run_dir=run_dir, process=start_training(experiment_file(config, tmp_path)), random=chance)
    blows = schedule(chance, STEPS)
    assert {blow[1:] for blow in blows} == set(FATES)
    for at_step, victim, fate in blows:
        ordeal.strike(victim, fate, at_step)
    ordeal.finish()

    found = read_metrics(run_dir)
    assert [row["step"] for row in found] == list(range(STEPS + 1))
    assert checkpoint.load(run_dir)[0] == STEPS
    assert not any(row["judge/dropped_groups"] or row["reward/masked_share"] for row in found[1:])
    assert any(row.get("perf/early_groups") for row in found)
    check_verdicts(run_dir, config)
    expected = read_metrics(straight / "runs" / "tiny")
    assert list(map(learnt, found[: len(expected)])) == list(map(learnt, expected))
    if STEPS >= 50:
        check_memory(ordeal.memory)


def learnt(row: dict[str, Any]) -> dict[str, Any]:
    """What was sampled, rewarded and learnt, without what an outage may change: the clock and the judge's troubles."""
    kept = ("reward/", "advantage/", "policy/", "heldout/oracle")
    return {key: value for key, value in row.items() if key.startswith(kept)}


def check_verdicts(run_dir: Path, config: RunConfig) -> None:
    """In every step each prompt of the stream had each of its pairs judged, once."""
    stream = PromptStream(read_prompts(config.prompts.train, "prompts.train"), config.prompts.per_step, config.seed)
    plan, size = judge_of(config).pairs, config.sampling.group_size
    expected = Counter(
        (step + 1, prompt.id, members)
        for step in range(STEPS)
        for prompt in stream.batch(step)
        for members in plan.pairs(size, seed_for(config.seed, "pairs", step, prompt.id))
    )
    entries = verdicts.read_verdicts(run_dir / verdicts.FILE_NAME)
    assert Counter((e.step, e.prompt_id, e.verdict.members) for e in entries if e.verdict.status == "ok") == expected


def check_memory(memory: Sequence[tuple[int, int]]) -> None:
    first, last = memory[len(memory) // 4], memory[-1]
    assert last[0] - first[0] < GROWTH_MB and last[1] - first[1] < GROWTH_MB, memory
