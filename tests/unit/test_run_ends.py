"""How a run ends when something ends it: exit status, what is saved, what the user reads."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from grpo_flex import checkpoint, report, run, status
from grpo_flex.config import Adapter, Checkpoint, Optimizer
from grpo_flex.fleet import Stranded
from grpo_flex.judge_server import JudgeAway
from grpo_flex.train import Interrupted, Starved, Trainer
from grpo_flex.types import Adapter as Adapters

DEAD = RayActorError()
LOST = ObjectLostError("ab" * 28, cast(Any, None), "")


class Stand:
    """What ``_run_to_the_end`` sees of a Trainer."""

    def __init__(self, folder: Path, ends: BaseException | None, stopping: bool = False, learner: bool = True) -> None:
        self.ends, self.asked, self.learner = ends, stopping, learner
        self.notes: list[str] = []
        self.done: list[str] = []
        self.console = SimpleNamespace(note=self.notes.append)
        self.step, self.evaluates_on_resume = 3, False
        self.log = SimpleNamespace(run_dir=folder, last_step=3)
        (folder / "metrics.jsonl").write_text('{"step": 3}\n')
        self.config = SimpleNamespace(adapter=Adapter(), steps=3)
        self.cluster = SimpleNamespace(save_adapter=self.export, close_judge=lambda: self.done.append("judge"))

    def run(self) -> None:
        if self.ends is not None:
            raise self.ends

    def save(self) -> None:
        if not self.learner:
            raise RayActorError
        self.done.append("checkpoint")
        checkpoint.save(self.log.run_dir, self.step, {}, keep=1)

    def export(self, folder: Path) -> None:
        folder.mkdir()
        self.done.append("adapter")

    def stop(self) -> None:
        self.asked = True

    def stopping(self, within_s: float) -> bool:
        return self.asked


def end(stand: Stand) -> int:
    return run._run_to_the_end(cast(Trainer, stand))


def test_a_run_that_is_done(tmp_path: Path) -> None:
    stand = Stand(tmp_path, None)
    assert end(stand) == 0 and stand.done == ["adapter", "judge"]


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (Interrupted(), run.RESUME_ME),
        (JudgeAway("no judge"), run.RESUME_ME),
        (Starved("no reward"), run.MEND_FIRST),
        (Stranded("no worker"), run.MEND_FIRST),
    ],
)
def test_a_run_that_is_stopped_saves(tmp_path: Path, reason: Exception, status: int) -> None:
    """What starts a run again at status 75 would go on for ever with one that ends so each time."""
    stand = Stand(tmp_path, reason)
    assert end(stand) == status and stand.done == ["checkpoint", "adapter", "judge"]
    assert stand.notes == [f"stopped: {reason}" if str(reason) else "stopped on request"]


def test_workers_that_a_signal_took_along_are_no_reason_to_give_up(tmp_path: Path) -> None:
    assert end(Stand(tmp_path, Stranded("no worker"), stopping=True)) == run.RESUME_ME


@pytest.mark.parametrize("reason", [Interrupted(), DEAD, LOST], ids=["wait", "update", "object"])
def test_a_signal_that_took_the_learner_along_leaves_the_last_checkpoint(tmp_path: Path, reason: Exception) -> None:
    stand = Stand(tmp_path, reason, stopping=True, learner=False)
    assert end(stand) == run.RESUME_ME and stand.done == []
    assert stand.notes == ["stopped on request", "the learner has ended too; the last checkpoint stands"]


def test_a_process_that_dies_by_itself_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a process of the run died(.|\n)*--resume"):
        end(Stand(tmp_path, DEAD))


def test_what_is_lost_with_its_node_for_good_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a node has ended with something on it(.|\n)*--resume"):
        end(Stand(tmp_path, RayTaskError("generate", "trace", LOST)))


@pytest.mark.parametrize(("version", "ahead"), [(3, [1, 2]), (4, [2, 3])], ids=["in a step", "after its update"])
def test_a_checkpoint_carries_the_step_that_the_learners_are_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, ahead: list[int]
) -> None:
    """Even if something failed between an update and the end of its step, whose line is written then."""
    monkeypatch.setattr(ray, "get", lambda adapters: adapters)
    trainer: Any = object.__new__(Trainer)
    trainer.cluster = SimpleNamespace(learner_state=lambda: {"version": version})
    every = SimpleNamespace(every=5)
    trainer.config = SimpleNamespace(
        checkpoint=Checkpoint(), sampling=SimpleNamespace(lookahead=2), evaluation=every, steps=9
    )
    trainer.console = SimpleNamespace(phase=lambda name: None)
    lines: list[Any] = []
    trainer.log = SimpleNamespace(run_dir=tmp_path, last_step=3, log=lambda *line: lines.append(line))
    trainer.mirror, trainer.basis, trainer._numbers = None, {}, {"reward/mean": 0.5}
    trainer.step, trainer._adapters = 3, [Adapters(version=v, tensors={}) for v in (1, 2, 3)]
    trainer.save()
    step, state = checkpoint.load(tmp_path)
    assert step == trainer.step == version and [v for v, _ in state["ahead"]] == ahead
    assert lines == ([(4, {"reward/mean": 0.5})] if version == 4 else [])


def test_a_task_that_fails_is_an_error_after_a_checkpoint(tmp_path: Path) -> None:
    stand = Stand(tmp_path, RayTaskError("update", "trace", RuntimeError("CUDA is out of memory")))
    with pytest.raises(ValueError, match=r"RuntimeError: CUDA is out of memory(.|\n)*--resume"):
        end(stand)
    assert stand.done == ["checkpoint"]


def test_a_fault_of_the_experiments_own_code_loses_no_step(tmp_path: Path) -> None:
    stand = Stand(tmp_path, ZeroDivisionError("in somebody's reward"))
    with pytest.raises(ZeroDivisionError):  # with its traceback: whoever wrote it needs that
        end(stand)
    assert stand.done == ["checkpoint"] and "--resume" in stand.notes[-1]
    stand = Stand(tmp_path, ZeroDivisionError("at once"))
    stand.step = 0
    with pytest.raises(ZeroDivisionError):
        end(stand)
    assert stand.done == [] and stand.notes == []


def test_a_report_that_cannot_be_written_changes_no_status_and_the_copy_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cut_off(run_dir: Path) -> None:
        raise OSError("image file is truncated")

    monkeypatch.setattr(report, "write_report", cut_off)
    monkeypatch.setattr(status, "summary", lambda *_, **__: None)
    done: list[str] = []
    mirror: Any = SimpleNamespace(finish=lambda: done.append("copied"))
    run._finish(tmp_path, cast(Any, SimpleNamespace(steps=3)), run.RESUME_ME, mirror)
    assert done == ["copied"] and "image file is truncated" in capsys.readouterr().out


FULL = OSError(errno.ENOSPC, "No space left on device", "runs/tiny/samples/step_00003.png")


def test_a_file_that_cannot_be_written_is_an_error_after_a_checkpoint(tmp_path: Path) -> None:
    stand = Stand(tmp_path, FULL)
    with pytest.raises(ValueError, match=r"OSError: .*No space.*step_00003(.|\n)*are kept;.*--resume"):
        end(stand)
    assert stand.done == ["checkpoint"]
    stand.log.last_step = 2  # it was the file of the numbers
    with pytest.raises(ValueError, match=r"are kept \(the line of step 3 in metrics.jsonl is lost\)"):
        end(stand)
    stand.evaluates_on_resume = True
    with pytest.raises(ValueError, match=r"are kept \(step 3 is still to be evaluated\)"):
        end(stand)


def test_where_no_checkpoint_can_be_written_either_the_last_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand = Stand(tmp_path, FULL)
    checkpoint.save(tmp_path, 2, {}, keep=1)

    def full(*_: object, **__: object) -> None:
        raise FULL

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(ValueError, match=r"could be saved; the last checkpoint stands; .*--resume"):
        end(stand)


def test_before_the_first_step_there_is_nothing_to_resume(tmp_path: Path) -> None:
    stand = Stand(tmp_path, FULL)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"no step was saved; .* start the run anew"):
        end(stand)


def test_an_adapter_that_cannot_be_exported_is_an_error_after_a_checkpoint(tmp_path: Path) -> None:
    stand = Stand(tmp_path, None)

    def full(folder: Path) -> None:
        raise FULL

    stand.cluster.save_adapter = full
    with pytest.raises(ValueError, match=r"No space(.|\n)*--resume"):
        end(stand)
    assert stand.done == ["checkpoint"]


@pytest.mark.parametrize(
    ("updates", "learners", "given", "groups", "begun"),
    [(1, 1, 31, 32, 31), (3, 1, 31, 32, 11), (3, 2, 31, 32, 10), (4, 1, 0, 8, 0), (4, 2, 5, 8, 2), (8, 1, 2, 2, 1)],
)
def test_only_groups_that_the_learners_could_begin_with_count_as_begun(
    updates: int, learners: int, given: int, groups: int, begun: int
) -> None:
    trainer: Any = object.__new__(Trainer)
    trainer.config = SimpleNamespace(
        optimizer=Optimizer(updates_per_rollout=updates), placement=SimpleNamespace(learners=learners)
    )
    assert trainer._begun_early(given, groups) == begun
