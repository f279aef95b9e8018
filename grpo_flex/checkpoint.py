"""Checkpoints: written aside, synced, renamed. A kill at any byte leaves the previous one valid."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

_STATE, _INFO = "learner.pt", "checkpoint.json"
PENDING = "pending"
"""In a state: the figures of a step that was not evaluated yet, and so has no line of metrics."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message says which file, and the way out."""


def save(
    run_dir: Path, step: int, state: dict[str, Any], keep: int, score: float | None = None, keep_best: bool = False
) -> Path:
    """Write checkpoints/step_<n>/ atomically and drop all but the newest ``keep``, and first what kills left half done.

    Args:
        step: training steps completed.
        state: the learner's state, tensors on the CPU.
        score: the held-out score at this step, where it was measured.
        keep_best: keep the one with the highest score too, however old it is.

    Raises:
        CheckpointError: no space or no permission; older checkpoints stay as they are.
    """
    import torch

    folder = run_dir / "checkpoints" / f"step_{step:06d}"
    if folder in complete(run_dir):  # the same step has the same state
        if score is not None and _score(folder) is None:  # its evaluation was made up for
            _note_score(folder, score)
        return folder
    aside = folder.with_name(f".{folder.name}.partial")
    try:
        for half in folder.parent.glob(".step_*.partial"):  # of any step: a full one may be as large as the disk's rest
            shutil.rmtree(half, ignore_errors=True)
        aside.mkdir(parents=True)
        torch.save(state, aside / _STATE)
        info = {"step": step, "sha256": _digest(aside / _STATE), "score": score}
        (aside / _INFO).write_text(json.dumps(info))
        for path in (aside / _STATE, aside / _INFO, aside):
            _sync(path)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        _sync(folder.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {folder}: {error}; earlier checkpoints are untouched: free space or fix permissions, then --resume"
        ) from error
    for old in complete(run_dir)[:-keep]:
        if not (keep_best and old == best(run_dir)):
            _remove(old)
    return folder


def best(run_dir: Path) -> Path | None:
    """The finished checkpoint with the highest held-out score; the newest of equals, None where none was measured."""
    scored = [(score, folder) for folder in complete(run_dir) if (score := _score(folder)) is not None]
    return max(scored)[1] if scored else None


def _score(folder: Path) -> float | None:
    try:
        score = json.loads((folder / _INFO).read_text()).get("score")
        return score if score == score else None  # NaN: nobody could score it
    except (OSError, ValueError, AttributeError):  # damaged, which ``load`` says when it is to be read
        return None


def _note_score(folder: Path, score: float) -> None:
    """Write a score into a finished checkpoint, in whole or not at all; without it only the best one may be thinned out."""
    aside = folder / f".{_INFO}.partial"
    with suppress(OSError, ValueError, TypeError):
        aside.write_text(json.dumps(json.loads((folder / _INFO).read_text()) | {"score": score}))
        _sync(aside)
        aside.replace(folder / _INFO)


def _remove(folder: Path) -> None:
    """Under a name that no longer counts first: a kill half way leaves nothing that looks complete."""
    doomed = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def complete(run_dir: Path) -> list[Path]:
    """The finished checkpoints, oldest first. Partial ones have another name and do not count."""
    found = (p for p in (run_dir / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", p.name))
    return sorted(p for p in found if (p / _INFO).is_file())


def load(run_dir: Path) -> tuple[int, dict[str, Any]]:
    """(steps completed, learner state) of the newest checkpoint.

    Raises:
        CheckpointError: none there, or the newest one is damaged (with the way back to the one before).
    """
    import torch

    there = complete(run_dir)
    if not there:
        raise CheckpointError(f"{run_dir} has no checkpoint to resume from; start the run anew, without --resume")
    newest = there[-1]
    try:
        info = json.loads((newest / _INFO).read_text())
        intact = info["sha256"] == _digest(newest / _STATE)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(_damaged(newest, there, str(error))) from error
    if not intact:
        raise CheckpointError(_damaged(newest, there, "its checksum does not match"))
    try:
        return int(info["step"]), torch.load(newest / _STATE, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, TypeError, KeyError) as error:
        raise CheckpointError(_damaged(newest, there, _first_line(error))) from error


def _damaged(newest: Path, there: list[Path], why: str) -> str:
    way_out = (
        f"remove it to resume from {there[-2].name}"
        if len(there) > 1
        else "no older one is kept, so the run has to start anew"
    )
    return f"the checkpoint {newest} is damaged ({why}); {way_out}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
