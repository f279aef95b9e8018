"""Progress on a terminal and in a log, status.json, summary and status."""

from __future__ import annotations

import io
import json
import os
import re
import time
from pathlib import Path

import pytest

from grpo_flex import run_dir
from grpo_flex.config import ConfigError
from grpo_flex.console import Console
from grpo_flex.status import GONE_S, StatusFile, _birth, running_pid, status, summary
from grpo_flex.terminal import duration
from tests.unit.run_stand_in import make_run


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_status_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    with Console(10, run_dir=tmp_path / "gone", out=io.StringIO()) as console:
        console.phase("rollout")
        console.note("no space left")


def test_a_log_gets_plain_lines_not_more_often_than_every_ten_seconds() -> None:
    out, clock = io.StringIO(), Clock()
    with Console(100, 0, "shapes", out=out, clock=clock) as console:
        for step in range(1, 26):
            console.phase("rollout")
            clock.now += 1.0
            console.step(step, {"reward/mean": 0.5, "perf/rollout_s": 0.6, "perf/step_s": 1.0})
    assert out.getvalue().splitlines() == [
        "shapes: 0 of 100 steps done",
        "step   1/100  reward 0.500  1.0 s/step  rollout 0.6  ETA 1 min 39 s",
        "step  11/100  reward 0.500  1.0 s/step  rollout 0.6  ETA 1 min 29 s",
        "step  21/100  reward 0.500  1.0 s/step  rollout 0.6  ETA 1 min 19 s",
        "stopped at step 25 of 100",
    ]


def test_evaluations_the_last_step_and_notes_always_show() -> None:
    out, clock = io.StringIO(), Clock()
    with Console(12, 10, "shapes", out=out, clock=clock) as console:
        console.step(11, {"reward/mean": 0.5})
        console.step(12, {"reward/mean": 0.5, "heldout/exact": 0.1, "heldout/oracle": 0.75})
        console.note("[bold] is no markup")
    lines = out.getvalue().splitlines()
    assert "held-out 0.750" in lines[2]
    assert lines[-2:] == ["[bold] is no markup", "finished at step 12 of 12"]


def test_a_log_says_how_workers_judge_and_checkpoint_stand(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_000004").mkdir(parents=True)
    out, clock = io.StringIO(), Clock()
    with Console(9, 4, "shapes", run_dir=tmp_path, out=out, clock=clock) as console:
        console.workers({"learner": "alive", "rollout-0": "alive, restarted once", "rollout-1": "alive"})
        console.judge({"http://one/v1": "healthy, 3 in flight"})
        clock.now += 20
        console.step(5, {"reward/mean": 0.5})
        console.workers({"learner": "alive", "rollout-0": "restarting", "rollout-1": "alive"})
        clock.now += 20
        console.step(6, {"reward/mean": 0.5, "heldout/oracle": 0.75})
    usual, evaluated = out.getvalue().splitlines()[1:3]
    assert usual.endswith("rollout-0 alive, restarted once") and "checkpoint" not in usual
    assert "checkpoint of step 4  workers 2/3 alive  judge 1/1 healthy  rollout-0 restarting" in evaluated


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    out, clock = Terminal(), Clock()
    with Console(10, 4, "shapes", out=out, clock=clock) as console:
        console.phase("judge")
        clock.now += 30
        console.step(5, {"reward/mean": 0.512, "heldout/oracle": 0.61})
        console.note("the [judge] is away")
    shown = out.getvalue()
    for part in ("shapes", "5/10", "judge", "reward 0.512", "0.610", "2 min 30 s", "the [judge] is away"):
        assert part in shown


def test_below_the_bar_stand_pace_checkpoint_and_what_is_not_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "checkpoints" / "step_000004").mkdir(parents=True)
    out, clock = Terminal(), Clock()
    with Console(10, 4, "shapes", run_dir=tmp_path, out=out, clock=clock) as console:
        clock.now += 30
        console.step(5, {"perf/rollout_s": 20.0, "perf/update_s": 9.0, "perf/step_s": 30.0})
        console.workers({"learner": "alive", "rollout-0": "alive"})
        console.judge({"http://one/v1": "healthy, 3 in flight", "http://two/v1": "healthy, 0 in flight"})
        assert console.troubles == ""
        console.workers({"learner": "alive", "rollout-0": "alive, restarted once", "rollout-1": "restarting"})
        console.judge({"http://one/v1": "healthy, 3 in flight", "http://two/v1": "open: nothing is sent to it"})
    shown = out.getvalue()
    troubles = "rollout-0 alive, restarted once  rollout-1 restarting  judge http://two/v1 away"
    pace = "30.0 s a step  rollout 20.0 s · update 9.0 s  checkpoint of step 4  workers 2/3 alive  judge 1/2 healthy"
    assert f"{troubles}  {pace}" in re.sub(r"\x1b\[[\d;]*m", "", shown) and "http://one" not in shown


def test_time_before_the_first_rollout_does_not_count_as_a_step() -> None:
    clock = Clock()
    console = Console(10, out=io.StringIO(), clock=clock)
    console.phase("evaluate")
    clock.now += 500
    console.phase("rollout")
    clock.now += 2
    console.step(1, {})
    assert console.eta_seconds == pytest.approx(18)


def test_status_json_is_written_at_most_once_a_second_and_ends_with_the_last_state(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "status.json"
    with Console(10, 0, "shapes", run_dir=tmp_path, out=io.StringIO(), clock=clock) as console:
        console.phase("rollout")
        assert json.loads(path.read_text())["phase"] == "starting"
        clock.now += 1.0
        console.phase("judge")
        assert json.loads(path.read_text())["phase"] == "judge"
        console.step(3, {})
        console.workers({"rollout-0": "sampling"})
    state = json.loads(path.read_text())
    assert (state["phase"], state["step"], state["total"], state["pid"]) == ("stopped", 3, 10, os.getpid())
    assert state["workers"] == {"rollout-0": "sampling"}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.6, "1 min 00 s"), (725, "12 min 05 s"), (12000, "3 h 20 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def printed(function, *args) -> str:
    out = io.StringIO()
    function(*args, out=out)
    return out.getvalue()


def test_summary_names_scores_and_places(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "adapter").mkdir()
    (run / "adapter" / "pytorch_lora_weights.safetensors").touch()
    text = printed(summary, run, "python -m grpo_flex train --resume runs/shapes")
    assert "shapes: finished at step 20" in text
    assert "oracle     0.500 → 0.800 (+0.300)" in text
    assert str(run / "samples" / "before_after.png") in text
    assert "pytorch_lora_weights.safetensors" in text
    assert "report.html" not in text  # there is none yet
    assert "continue   python -m grpo_flex train --resume runs/shapes" in text


def test_summary_of_a_run_that_was_stopped_before_its_first_step(tmp_path: Path) -> None:
    out = io.StringIO()
    summary(make_run(tmp_path, upto=-1), out=out, stopped=True)
    assert out.getvalue().strip() == "shapes: stopped at step 0"


def test_status_of_a_living_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, upto=8)
    for step in (2, 10, 9):
        (run / "checkpoints" / f"step_{step}").mkdir(parents=True)
    clock = Clock()
    with Console(20, 8, "shapes", run_dir=run, out=io.StringIO(), clock=clock) as console:
        clock.now += 2
        console.workers({"rollout-0": "sampling"})
        clock.now += 2
        console.judge({"http://127.0.0.1:8000/v1": "healthy"})
        clock.now += 2
        console.phase("update")
        text = printed(status, run)
    assert "step 8 of 20" in text and f"alive (pid {os.getpid()}" in text
    assert "update, since 0 s ago" in text
    assert "rollout 2.0 s · judge 1.0 s · update 0.6 s" in text
    assert text.count("checkpoints/step_10") == 1
    assert "rollout-0: sampling" in text and "http://127.0.0.1:8000/v1: healthy" in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"pid": 2**22 + 1}, "dead without a farewell"),
        ({"started": "12"}, "dead without a farewell"),  # the pid has been given to another process
        ({"host": "elsewhere"}, "runs on another host"),
        ({"phase": "finished"}, "ended"),
    ],
)
def test_status_of_a_process_that_is_gone(tmp_path: Path, change: dict[str, object], expected: str) -> None:
    run = make_run(tmp_path, upto=0)
    console = Console(20, run_dir=run, out=io.StringIO())
    console.phase("rollout")
    path = run / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"workers": {"rollout-0": "alive"}} | change))
    text = printed(status, run)
    assert expected in text
    assert ("rollout-0: alive, when last seen" in text) == ("host" not in change)


def test_status_without_status_json_and_of_no_run(tmp_path: Path) -> None:
    text = printed(status, make_run(tmp_path, upto=0))
    assert "step 0 of 20" in text and "wrote no status.json" in text and "none yet" in text
    with pytest.raises(ValueError, match="no such directory"):
        status(tmp_path / "nothing")


ELSEWHERE = {"host": "elsewhere", "pid": os.getpid()}  # pids of two hosts have nothing in common


@pytest.mark.parametrize(
    ("change", "age", "found"),
    [
        ({}, 0, None),  # this process itself
        ({"pid": os.getppid(), "started": _birth(os.getppid())}, 5000, os.getppid()),
        ({"pid": os.getppid(), "started": "12"}, 0, None),
        (ELSEWHERE, GONE_S + 1, None),
        (ELSEWHERE | {"phase": "stopped"}, 0, None),
    ],
)
def test_a_run_that_may_be_resumed_and_one_that_goes_on(
    tmp_path: Path, change: dict[str, object], age: float, found: int | None
) -> None:
    left_by_a_run(tmp_path, change, age)
    assert running_pid(tmp_path) == found


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_a_torn_status_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(text)
    assert running_pid(tmp_path) is None


def test_a_run_on_another_host_is_left_alone_while_it_gives_signs_of_life(tmp_path: Path) -> None:
    left_by_a_run(tmp_path, ELSEWHERE, 15)
    expected = rf"on another host \(elsewhere, .* last sign 15 s ago\).* try again in 45 s, or remove {tmp_path}/status"
    with pytest.raises(ConfigError, match=expected):
        running_pid(tmp_path)


def left_by_a_run(run_dir: Path, change: dict[str, object], age: float) -> None:
    file = StatusFile(run_dir, Clock())
    file.update({"phase": "rollout"})
    file.close()
    path = run_dir / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change | {"time": time.time() - age}))


def test_signs_of_life_come_through_a_phase_and_end_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grpo_flex.status.BEAT_S", 0.02)

    def sign() -> float:
        return json.loads((tmp_path / "status.json").read_text())["time"]

    with Console(10, run_dir=tmp_path, out=io.StringIO()) as console:
        console.phase("rollout")
        for _ in range(2):
            before, until = sign(), time.monotonic() + 10
            while sign() == before:
                assert time.monotonic() < until
                time.sleep(0.01)
    last = sign()
    time.sleep(0.1)
    assert sign() == last


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_resume_waits_for_another_sign_of_a_host_that_may_be_gone(
    goes_on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    path, now = tmp_path / "status.json", time.time()
    state = {"host": "elsewhere", "pid": 1, "phase": "update", "time": now - 15}
    path.write_text(json.dumps(state))

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        path.write_text(json.dumps(state | {"time": now + 5 if goes_on else now - 15 - seconds}))

    monkeypatch.setattr(run_dir.time, "sleep", sleep)
    if goes_on:
        with pytest.raises(ConfigError, match="on another host"):
            run_dir.check_alone(tmp_path)
    else:
        run_dir.check_alone(tmp_path)
    assert slept == [pytest.approx(46, abs=1)]
