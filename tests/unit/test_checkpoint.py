"""Checkpoints: atomic, checked, and clear about what is wrong with them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_flex import checkpoint
from grpo_flex.checkpoint import CheckpointError


def state(value: float) -> dict[str, Any]:
    return {
        "version": 3,
        "adapter": {"w": torch.full((2, 3), value)},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
    }


def test_round_trip_and_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, state(step), keep=2)
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step_000002", "step_000003"]
    step, loaded = checkpoint.load(tmp_path)
    assert step == 3 and torch.equal(loaded["adapter"]["w"], state(3)["adapter"]["w"])
    assert loaded["optimizer"] == state(3)["optimizer"]


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint to resume from"):
        checkpoint.load(tmp_path)


def test_the_best_one_stays_too(tmp_path: Path) -> None:
    for step, score in ((1, 0.5), (2, 0.9), (3, None), (4, 0.7), (5, None)):
        checkpoint.save(tmp_path, step, state(step), keep=1, score=score, keep_best=True)
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step_000002", "step_000005"]
    best = checkpoint.best(tmp_path)
    assert best is not None and best.name == "step_000002" and checkpoint.load(tmp_path)[0] == 5
    checkpoint.save(tmp_path, 6, state(6), keep=1, score=0.9, keep_best=True)  # as good, and newer
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step_000006"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("operation", ["fsync", "rename", "write_text"])
def test_a_kill_at_any_point_leaves_the_previous_one_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    checkpoint.save(tmp_path, 1, state(1), keep=2)
    owner = os if operation == "fsync" else Path

    def die(*_: object, **__: object) -> None:
        raise Killed

    monkeypatch.setattr(owner, operation, die)
    with pytest.raises(Killed):
        checkpoint.save(tmp_path, 2, state(2), keep=2)
    monkeypatch.undo()
    assert checkpoint.load(tmp_path)[0] == 1
    checkpoint.save(tmp_path, 2, state(2), keep=2)  # what the kill left behind is no obstacle
    assert checkpoint.load(tmp_path)[0] == 2


def test_what_a_kill_left_of_another_step_makes_room_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint.save(tmp_path, 1, state(1), keep=2).parent
    half = folder / ".step_000013.partial"
    half.mkdir()
    (half / "learner.pt").write_bytes(b"half")
    real = torch.save

    def save(*arguments: Any) -> None:
        assert not half.exists()  # before its space is needed
        real(*arguments)

    monkeypatch.setattr(torch, "save", save)
    checkpoint.save(tmp_path, 10, state(10), keep=2)
    assert sorted(p.name for p in folder.iterdir()) == ["step_000001", "step_000010"]


def test_a_kill_at_any_byte_leaves_the_previous_one_valid(tmp_path: Path) -> None:
    """What a kill leaves behind is a folder under another name, with any part of its files."""
    checkpoint.save(tmp_path, 1, state(1), keep=2)
    newest = checkpoint.save(tmp_path, 2, state(2), keep=2)
    whole = (newest / "learner.pt").read_bytes()
    partial = newest.with_name(f".{newest.name}.partial")
    newest.rename(partial)
    for size in (0, 1, len(whole) // 2, len(whole) - 1, len(whole)):
        (partial / "learner.pt").write_bytes(whole[:size])
        assert checkpoint.load(tmp_path)[0] == 1
    checkpoint.save(tmp_path, 2, state(2), keep=2)
    assert checkpoint.load(tmp_path)[0] == 2 and not partial.exists()


def test_a_kill_while_an_old_one_is_removed_leaves_whole_ones_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, 1, state(1), keep=1)
    real = shutil.rmtree

    def die(path: Path, ignore_errors: bool = False) -> None:
        if Path(path).exists():
            (Path(path) / "learner.pt").unlink(missing_ok=True)
            raise Killed
        real(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(Killed):
        checkpoint.save(tmp_path, 2, state(2), keep=1)
    monkeypatch.undo()
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step_000002"]


def test_no_permission_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 1, state(1), keep=2)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CheckpointError, match=r"Permission denied.*fix permissions, then --resume"):
        checkpoint.save(tmp_path, 2, state(2), keep=2)
    monkeypatch.undo()
    assert checkpoint.load(tmp_path)[0] == 1


def test_a_full_disk_is_reported_and_earlier_ones_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 1, state(1), keep=2)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        CheckpointError, match=r"step 2 could not be written .*No space left.*earlier checkpoints are untouched"
    ):
        checkpoint.save(tmp_path, 2, state(2), keep=2)
    assert checkpoint.load(tmp_path)[0] == 1
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.parametrize("damage", [b"", b"x"])
def test_a_damaged_one_is_named_with_the_way_back(tmp_path: Path, damage: bytes) -> None:
    checkpoint.save(tmp_path, 1, state(1), keep=2)
    newest = checkpoint.save(tmp_path, 2, state(2), keep=2)
    content = (newest / "learner.pt").read_bytes()
    (newest / "learner.pt").write_bytes(content[:-5] + damage)
    with pytest.raises(CheckpointError, match=r"step_000002 is damaged .*remove it to resume from step_000001"):
        checkpoint.load(tmp_path)
    (newest / "checkpoint.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.load(tmp_path)
