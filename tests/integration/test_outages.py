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


def check_complete(run_dir: Path, steps: int = STEPS) -> None:
    """Every step has its line, and no number in them is NaN or infinite (which would be null)."""
    found = read_metrics(run_dir)
    assert [row["step"] for row in found] == list(range(steps + 1))
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


def test_what_the_run_has_started_comes_back_by_itself_a_limited_number_of_times(tmp_path: Path) -> None:
    """The judge and a worker are killed, then the judge once more than it may be."""
    config = with_judge(tmp_path, steps=60, workers=2, server=SLOW, restarts=1)
    process = start_training(experiment_file(config, tmp_path))
    run_dir = tmp_path / "runs" / "tiny"
    wait_for(lambda: len(rows(run_dir)) >= 3, process)
    kill(process, "testbed.oracle_judge")
    kill(process, "ray::RolloutActor")
    wait_for(lambda: total(run_dir, "judge/restarts") == 1, process)
    wait_for(lambda: restarted(run_dir, "rollout-0") + restarted(run_dir, "rollout-1") == 1, process)
    wait_for(lambda: [what.split(",")[0] for what in state(run_dir)["judge"].values()] == ["healthy"], process)
    kill(process, "testbed.oracle_judge")
    out, _ = process.communicate(timeout=300)
    assert process.returncode == RESUME_ME, out
    assert "the judge's process has ended; starting it again" in out
    assert "has ended once more, after 1 restarts (judge.restarts=1); see its log in" in out
    done, saved = checkpoint.load(run_dir)
    check_complete(run_dir, done - (checkpoint.PENDING in saved))  # one that was being evaluated has its line later
    assert total(run_dir, "judge/restarts") == 1 and total(run_dir, "judge/masked_share") == 0


def kill(process: subprocess.Popen[str], words: str) -> None:
    os.kill(descendants(process.pid, words)[0], signal.SIGKILL)


def restarted(run_dir: Path, name: str) -> bool:
    return state(run_dir)["workers"][name] == "alive, restarted once"


def state(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "status.json").read_text())


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
