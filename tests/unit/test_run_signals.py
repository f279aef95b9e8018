"""SIGTERM while a run is brought back, waits for nodes, loads its models or evaluates; and who else may work on it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grpo_flex import checkpoint, report, run
from grpo_flex import run_dir as run_dir_module
from grpo_flex.__main__ import main
from grpo_flex.config import RunConfig
from grpo_flex.copied_run import Copy
from grpo_flex.metrics import read_metrics
from grpo_flex.status import STATUS
from grpo_flex.types import Sample
from tests.configs import judge_of
from tests.one_process import OneProcess, StandInJudge, in_one_process


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """A run leaves those of whoever called it."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def own(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """One step, in this process."""
    in_one_process(monkeypatch, StandInJudge(lambda _: 6))
    judge = replace(judge_of(config), server=None, endpoints=("http://judge/v1",))
    return replace(
        config,
        steps=1,
        runs_dir=str(tmp_path / "runs"),
        judge=judge,
        evaluation=replace(config.evaluation, versus_base=0),
    )


def send(number: int) -> None:
    """Ray's waiting ends with a KeyboardInterrupt of its own, whatever the handler raised."""
    try:
        os.kill(os.getpid(), number)
    except KeyboardInterrupt:
        raise KeyboardInterrupt from None


def while_models_load(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(OneProcess, "wait_until_ready", lambda _: send(number))


def test_a_resume_that_is_terminated_while_it_starts_asks_to_be_resumed(
    own: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.train(own) == 0
    run_dir = Path(own.runs_dir) / own.name
    while_models_load(monkeypatch, signal.SIGTERM)
    capsys.readouterr()
    assert main(["train", "--resume", str(run_dir), "steps=2"]) == run.RESUME_ME
    out, err = capsys.readouterr()
    assert f"the last checkpoint stands: python -m grpo_flex train --resume {run_dir}" in out and not err


def test_a_ctrl_c_there_and_a_run_without_a_checkpoint_stop_at_once(
    own: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        while_models_load(patch, signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            run.train(own)
    assert not list(Path(own.runs_dir).iterdir())
    assert run.train(own) == 0
    while_models_load(monkeypatch, signal.SIGINT)
    assert main(["train", "--resume", str(Path(own.runs_dir) / own.name), "steps=2"]) == 130


def test_a_run_that_is_terminated_while_it_is_brought_back_asks_to_be_resumed_from_its_copy(
    own: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror = f"file://{tmp_path}/mirror"
    assert run.train(replace(own, checkpoint=replace(own.checkpoint, mirror=mirror))) == 0
    run_dir, where = Path(own.runs_dir) / own.name, f"{mirror}/{own.name}"
    run_dir.rename(tmp_path / "gone")
    monkeypatch.setattr(Copy, "bring_back", lambda *_: send(signal.SIGTERM))
    assert main(["train", "--resume", where, "steps=2"]) == run.RESUME_ME
    assert f"train --resume {where}" in capsys.readouterr().out


def test_a_run_that_is_over_is_not_disturbed(
    own: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "write_report", lambda _: send(signal.SIGTERM))
    assert run.train(own) == 0


def stop_in_evaluation(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A SIGTERM comes while held-out samples are drawn for that time, from 0."""
    begun, evaluate = [0], OneProcess.evaluate

    def stopped(self: OneProcess, *arguments: Any) -> Iterator[Sample]:
        begun[0] += 1
        if begun[0] == number + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, *arguments)

    monkeypatch.setattr(OneProcess, "evaluate", stopped)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """Its metrics, but for the times."""
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in read_metrics(run_dir)]


def scores(run_dir: Path) -> dict[str, float | None]:
    """The held-out score of the last checkpoint."""
    path = checkpoint.complete(run_dir)[-1]
    return {path.name: json.loads((path / "checkpoint.json").read_text())["score"]}


@pytest.mark.parametrize("step", [1, 2])
def test_an_evaluation_that_is_stopped_is_made_up_for_by_the_resume(
    own: RunConfig,
    step: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also that of the last step; the step itself is kept, and the curves lack nothing."""
    config = replace(own, steps=2, evaluation=replace(own.evaluation, every=1))
    assert run.train(replace(config, runs_dir=str(tmp_path / "whole"))) == 0
    run_dir = Path(own.runs_dir) / own.name
    with monkeypatch.context() as patch:
        stop_in_evaluation(patch, step)
        assert run.train(config) == run.RESUME_ME
    assert [row["step"] for row in lines(run_dir)] == list(range(step))
    assert json.loads((run_dir / STATUS).read_text())["phase"] == "stopped"
    assert checkpoint.load(run_dir)[0] == step
    capsys.readouterr()
    assert main(["train", "--resume", str(run_dir)]) == 0
    assert "have a gap" not in caplog.text
    assert lines(run_dir) == lines(tmp_path / "whole" / own.name)
    assert scores(run_dir) == scores(tmp_path / "whole" / own.name)  # by which the best checkpoint is kept
    assert json.loads((run_dir / STATUS).read_text())["phase"] == "finished"
    assert main(["train", "--resume", str(run_dir)]) == 2
    assert "has completed its 2 steps" in capsys.readouterr().err
    if step == 1:  # killed after it had made up for it: the same checkpoint again
        shutil.rmtree(run_dir / "checkpoints" / "step_000002")
        assert main(["train", "--resume", str(run_dir)]) == 0
        assert lines(run_dir) == lines(tmp_path / "whole" / own.name)


def test_a_run_that_is_stopped_in_its_first_evaluation_leaves_nothing(
    own: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_in_evaluation(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt):
        run.train(own)
    assert not list(Path(own.runs_dir).iterdir())


def test_a_run_that_another_process_is_starting_is_left_alone(
    own: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before that one has said anything: loading models takes minutes."""
    monkeypatch.setattr(run_dir_module, "CLAIM_S", 0.1)
    assert run.train(own) == 0
    run_dir = Path(own.runs_dir) / own.name
    with run_dir_module.claimed(run_dir):
        assert main(["train", "--resume", str(run_dir), "steps=2"]) == 2
    assert f"another process is starting or ending {run_dir}" in capsys.readouterr().err
    assert main(["train", "--resume", str(run_dir), "steps=2"]) == 0
