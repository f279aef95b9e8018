"""How a run ends when something ends it: exit status, what is saved, what the user reads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from grpo_flex import run
from grpo_flex.config import Adapter
from grpo_flex.judge_server import JudgeAway
from grpo_flex.train import Interrupted, Starved, Trainer

DEAD = RayActorError()
LOST = ObjectLostError("ab" * 28, cast(Any, None), "")


class Stand:
    """What ``_run_to_the_end`` sees of a Trainer."""

    def __init__(self, folder: Path, ends: BaseException | None, stopping: bool = False, learner: bool = True) -> None:
        self.ends, self.asked, self.learner = ends, stopping, learner
        self.notes: list[str] = []
        self.done: list[str] = []
        self.console = SimpleNamespace(note=self.notes.append)
        self.log = SimpleNamespace(run_dir=folder)
        self.config = SimpleNamespace(adapter=Adapter())
        self.cluster = SimpleNamespace(
            save_adapter=lambda _: self.done.append("adapter"), close_judge=lambda: self.done.append("judge")
        )

    def run(self) -> None:
        if self.ends is not None:
            raise self.ends

    def save(self) -> None:
        if not self.learner:
            raise RayActorError
        self.done.append("checkpoint")

    def stop(self) -> None:
        self.asked = True

    def stopping(self, within_s: float) -> bool:
        return self.asked


def end(stand: Stand) -> int:
    return run._run_to_the_end(cast(Trainer, stand))


def test_a_run_that_is_done(tmp_path: Path) -> None:
    stand = Stand(tmp_path, None)
    assert end(stand) == 0 and stand.done == ["adapter", "judge"]


@pytest.mark.parametrize("reason", [Interrupted(), JudgeAway("no judge"), Starved("no reward")])
def test_a_run_that_is_stopped_saves(tmp_path: Path, reason: Exception) -> None:
    stand = Stand(tmp_path, reason)
    assert end(stand) == run.RESUME_ME and stand.done == ["checkpoint", "adapter", "judge"]
    assert stand.notes == [f"stopped: {reason}" if str(reason) else "stopped on request"]


@pytest.mark.parametrize("reason", [Interrupted(), DEAD, LOST], ids=["wait", "update", "object"])
def test_a_signal_that_took_the_learner_along_leaves_the_last_checkpoint(tmp_path: Path, reason: Exception) -> None:
    stand = Stand(tmp_path, reason, stopping=True, learner=False)
    assert end(stand) == run.RESUME_ME and stand.done == []
    assert stand.notes == ["stopped on request", "the learner has ended too; the last checkpoint stands"]


def test_a_process_that_dies_by_itself_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a process of the run died(.|\n)*--resume"):
        end(Stand(tmp_path, DEAD))


def test_a_task_that_fails_is_an_error_after_a_checkpoint(tmp_path: Path) -> None:
    stand = Stand(tmp_path, RayTaskError("update", "trace", RuntimeError("CUDA is out of memory")))
    with pytest.raises(ValueError, match=r"RuntimeError: CUDA is out of memory(.|\n)*--resume"):
        end(stand)
    assert stand.done == ["checkpoint"]
