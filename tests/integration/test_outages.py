"""Whole runs that lose a process on the way: the judge's, a worker's, or all of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from grpo_flex import checkpoint
from grpo_flex.__main__ import main
from grpo_flex.config import RunConfig
from grpo_flex.metrics import read_metrics
from grpo_flex.run import RESUME_ME
from testbed.oracle_judge import OracleJudge
from tests.configs import judge_of, tiny_config
from tests.integration.processes import descendants, experiment_file, rows, start_training, wait_for

STEPS = 6
SLOW = OracleJudge(latency_s=0.5)
"""Slow enough that a kill finds questions under way."""
AWAY_S = 10.0


def with_judge(folder: Path, steps: int = STEPS, workers: int = 1, **changes: Any) -> RunConfig:
    config = tiny_config(folder, steps=steps)
    placement = replace(config.placement, rollout_workers=workers)
    return replace(config, judge=replace(judge_of(config), **changes), placement=placement)


def finished(process: subprocess.Popen[str], limit_s: float = 300) -> str:
    out, _ = process.communicate(timeout=limit_s)
    assert process.returncode == 0, out
    return out


def total(run_dir: Path, key: str) -> float:
    return sum(row.get(key) or 0.0 for row in read_metrics(run_dir))


def check_complete(run_dir: Path) -> None:
    """Every step has its line, and no number in them is NaN or infinite (which would be null)."""
    found = read_metrics(run_dir)
    assert [row["step"] for row in found] == list(range(STEPS + 1))
    assert not [(row["step"], key) for row in found for key, value in row.items() if value is None]


def test_an_external_judge_that_is_killed_and_comes_back_costs_no_step(tmp_path: Path) -> None:
    judge = SLOW.start(tmp_path)
    (url,) = judge.endpoints
    config = with_judge(tmp_path, server=None, endpoints=(url,), patience_s=1.0, backoff_s=0.1, probe_s=0.5)
    process = start_training(experiment_file(config, tmp_path))
    run_dir = tmp_path / "runs" / "tiny"
    wait_for(lambda: len(rows(run_dir)) >= 3, process)  # the base model, and two steps
    os.kill(judge.pid, signal.SIGKILL)
    judge.stop()
    time.sleep(AWAY_S)
    with replace(SLOW, port=urlsplit(url).port or 0).start(tmp_path):
        out = finished(process)
    check_complete(run_dir)
    # Verdicts were masked while it was away, the step waited, and what it had missed was asked again.
    assert total(run_dir, "judge/breaker_openings") >= 1 and total(run_dir, "judge/retries") >= 1
    assert total(run_dir, "judge/asked_again") >= 1 and total(run_dir, "judge/away_s") >= 1
    assert total(run_dir, "judge/restarts") == 0
    assert "waiting for the judge" in out
    # Which of these is commonest depends on what the kill met: a question under way, a retry, or a closed door.
    assert any(f"(mostly: {p})" in out for p in ("no judge reachable", "cannot connect", "connection dropped"))
    assert checkpoint.load(run_dir)[0] == STEPS


def test_what_is_masked_is_said_where_the_step_can_do_without(tmp_path: Path) -> None:
    """Two judges, one of which is killed for good: its questions move over, or are masked by name."""
    one, two = SLOW.start(tmp_path), SLOW.start(tmp_path / "two")
    config = with_judge(
        tmp_path, server=None, endpoints=(*one.endpoints, *two.endpoints), retries=0, min_judged=0.0, backoff_s=0.0
    )
    process = start_training(experiment_file(config, tmp_path))
    run_dir = tmp_path / "runs" / "tiny"
    with one, two:
        wait_for(lambda: len(rows(run_dir)) >= 3, process)
        os.kill(one.pid, signal.SIGKILL)
        finished(process)
    check_complete(run_dir)
    named = total(run_dir, "judge/problem/connection_dropped") + total(run_dir, "judge/problem/cannot_connect")
    assert total(run_dir, "judge/failed") == named >= 1 and total(run_dir, "judge/masked_share") > 0


def test_a_judge_of_the_runs_own_and_a_worker_that_are_killed_come_back_by_themselves(tmp_path: Path) -> None:
    process = start_training(experiment_file(with_judge(tmp_path, workers=2, server=SLOW), tmp_path))
    run_dir = tmp_path / "runs" / "tiny"
    wait_for(lambda: len(rows(run_dir)) >= 3, process)
    (judge,) = descendants(process.pid, "testbed.oracle_judge")
    os.kill(judge, signal.SIGKILL)
    os.kill(descendants(process.pid, "ray::RolloutActor")[0], signal.SIGKILL)
    out = finished(process)
    check_complete(run_dir)
    assert "the judge's process has ended; starting it again" in out
    assert total(run_dir, "judge/restarts") == 1 and total(run_dir, "judge/masked_share") == 0
    state = json.loads((run_dir / "status.json").read_text())
    one, two = sorted(state["workers"][f"rollout-{i}"] for i in (0, 1))
    # The other worker may have done the rest before the lost one was there again.
    assert one == "alive" and two in ("alive, restarted once", "starting, restarted once")
    assert [what.split(",")[0] for what in state["judge"].values()] == ["healthy"]


def test_a_learner_that_is_killed_goes_on_from_the_last_completed_step(tmp_path: Path) -> None:
    process = start_training(experiment_file(with_judge(tmp_path, server=SLOW), tmp_path))
    run_dir = tmp_path / "runs" / "tiny"
    wait_for(lambda: len(rows(run_dir)) >= 3, process)
    os.kill(descendants(process.pid, "ray::LearnerActor")[0], signal.SIGKILL)
    out = finished(process)
    check_complete(run_dir)
    assert "a learner died; starting again from the last completed step" in out
    state = json.loads((run_dir / "status.json").read_text())
    assert state["workers"]["learner"] == "alive, restarted once"


def test_a_judge_that_keeps_dying_stops_the_run_in_order(tmp_path: Path) -> None:
    process = start_training(experiment_file(with_judge(tmp_path, server=SLOW, restarts=0), tmp_path))
    run_dir = tmp_path / "runs" / "tiny"
    wait_for(lambda: len(rows(run_dir)) >= 3, process)
    (judge,) = descendants(process.pid, "testbed.oracle_judge")
    os.kill(judge, signal.SIGKILL)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == RESUME_ME, out
    assert "has ended once more, after 0 restarts (judge.restarts=0); see its log in" in out
    done = len(rows(run_dir)) - 1
    assert checkpoint.load(run_dir)[0] == done >= 2


def test_sigterm_to_every_worker_too_loses_no_completed_step(tmp_path: Path) -> None:
    """As a scheduler ends a job: the workers die first, but the newest state is in the object store."""
    config = with_judge(tmp_path, steps=40, server=SLOW)
    config = replace(config, checkpoint=replace(config.checkpoint, every=2))
    process = start_training(experiment_file(config, tmp_path))
    run_dir = tmp_path / "runs" / "tiny"
    wait_for(lambda: len(rows(run_dir)) == 4, process)  # step 3 is done and not in a checkpoint
    for worker in descendants(process.pid, "Actor"):  # not Ray's own agents: it ends the driver when those are gone
        os.kill(worker, signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == RESUME_ME, out
    assert "the learner has ended too" in out and "--resume" in out
    last = checkpoint.load(run_dir)[0]
    assert last == len(rows(run_dir)) - 1 >= 3 and (run_dir / "report.html").is_file()
    assert main(["train", "--resume", str(run_dir), f"steps={last + 1}"]) == 0
    assert [row["step"] for row in read_metrics(run_dir)] == list(range(last + 2))
