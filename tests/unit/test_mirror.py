"""Copies of a run elsewhere: whole at any moment, incremental, and never at the run's expense."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from grpo_flex import checkpoint, copied_run
from grpo_flex.config import ConfigError, RunConfig
from grpo_flex.copied_run import MANIFEST, RECORD, Copy, Manifest, MirrorError, check_writable, locked
from grpo_flex.mirror import Mirror, _Snapshot
from grpo_flex.run_dir import new_run_dir
from grpo_flex.status import status


def advance(run_dir: Path, step: int, keep: int = 2) -> None:
    """What a run writes in a step: files that grow, that are new, that are written again, and a checkpoint."""
    run_dir.mkdir(parents=True, exist_ok=True)
    for name, text in (("config.json", "{}"), ("status.json", "here and now"), (".half.part", "x")):
        (run_dir / name).write_text(text)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step}) + "\n")
    (run_dir / "samples").mkdir(exist_ok=True)
    (run_dir / "samples" / f"step_{step}.png").write_bytes(bytes(step))
    (run_dir / "placement.txt").write_text(f"as of step {step}")
    checkpoint.save(run_dir, step, {"w": torch.full((64,), float(step))}, keep)


def content(run_dir: Path) -> dict[str, bytes]:
    """What a copy has to bring back."""
    files = (p for p in run_dir.rglob("*") if p.is_file() and not p.name.startswith(".") and p.name != "status.json")
    return {p.relative_to(run_dir).as_posix(): p.read_bytes() for p in files}


def brought_back(place: Path, folder: Path) -> dict[str, bytes]:
    shutil.rmtree(folder, ignore_errors=True)
    Copy.at(f"file://{place}/one").bring_back(folder / "one")
    return content(folder / "one")


def there(place: Path) -> set[str]:
    return {p.relative_to(place / "one").as_posix() for p in (place / "one").rglob("*") if p.is_file()}


def described(place: Path) -> set[str]:
    return {MANIFEST, *(f.at for f in Copy.at(f"{place}/one").described().files.values())}


class Told(list[str]):
    def __call__(self, text: str) -> None:
        self.append(text)


def mirrored(tmp_path: Path, steps: int = 1) -> tuple[Path, Path, Mirror, Told]:
    """A run of some steps, the place of its copy, and its mirror after the first copy."""
    run_dir, place, told = tmp_path / "runs" / "one", tmp_path / "mirror", Told()
    for step in range(1, steps + 1):
        advance(run_dir, step)
    mirror = Mirror(f"file://{place}", run_dir, told)
    mirror.finish()
    assert not told
    return run_dir, place, mirror, told


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that were written to a copy, in order."""
    names: list[str] = []
    real = Copy.write

    def write(self: Copy, at: str, source: BinaryIO, size: int) -> int:
        names.append(at)
        return real(self, at, source, size)

    monkeypatch.setattr(Copy, "write", write)
    return names


def test_a_copy_writes_what_is_new_or_changed_and_drops_what_was_thinned_out(
    tmp_path: Path, written: list[str]
) -> None:
    run_dir, place, mirror, _ = mirrored(tmp_path, steps=2)
    assert brought_back(place, tmp_path / "back") == content(run_dir)
    written.clear()
    advance(run_dir, 3)
    mirror.finish()
    new = ("checkpoints/step_000003/learner.pt", "checkpoints/step_000003/checkpoint.json", "samples/step_3.png")
    assert sorted(written) == sorted((*new, "config.json.copy2", "metrics.jsonl.copy2", "placement.txt.copy2"))
    assert brought_back(place, tmp_path / "back") == content(run_dir)
    assert there(place) == described(place) and Copy.at(f"{place}/one").described().step == 3
    assert not (place / "one" / "checkpoints" / "step_000001").exists()


def test_a_run_that_was_brought_back_is_not_written_again(tmp_path: Path, written: list[str]) -> None:
    run_dir, place, _, _ = mirrored(tmp_path)
    shutil.rmtree(run_dir)
    Copy.at(str(place / "one")).bring_back(run_dir)
    written.clear()
    Mirror(str(place), run_dir, Told()).finish()
    assert not written


class Broken:
    """A place that fails at its nth operation and, until it is mended, at all that follow; a write leaves half a file."""

    def __init__(self, at: int, error: type[Exception]) -> None:
        self.left, self.error = at, error

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("write", "describe", "remove"):
            monkeypatch.setattr(Copy, name, self.counted(getattr(Copy, name)))

    def counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(copy: Copy, at: Any, *rest: Any) -> Any:
            self.left -= 1
            if self.left >= 0:
                return real(copy, at, *rest)
            if rest:
                Path(copy.path(at)).parent.mkdir(parents=True, exist_ok=True)
                Path(copy.path(at)).write_bytes(rest[0].read(3))
            raise self.error("the line\nis cut")

        return call


@pytest.mark.parametrize("at", range(12))
def test_an_upload_that_is_cut_anywhere_leaves_the_copy_before_it_and_is_made_up_for(tmp_path: Path, at: int) -> None:
    run_dir, place, mirror, told = mirrored(tmp_path, steps=2)
    before = content(run_dir)
    advance(run_dir, 3)
    with pytest.MonkeyPatch.context() as monkeypatch:
        Broken(at, RuntimeError).patch(monkeypatch)
        mirror.finish()
    whole = at > 6  # six files are written before the manifest
    assert brought_back(place, tmp_path / "back") == (content(run_dir) if whole else before)
    (text,) = told or [""]  # with enough operations nothing fails
    if told:
        assert f"failed (RuntimeError: the line); it is of step {3 if whole else 2} until" in text
    for again in (mirror, Mirror(str(place), run_dir, told)):  # in this process, or after a resume
        again.finish()
        assert brought_back(place, tmp_path / "back") == content(run_dir)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_copy_removes_what_those_that_failed_have_left_and_nothing_else(tmp_path: Path, resumed: bool) -> None:
    run_dir, place, mirror, told = mirrored(tmp_path, steps=2)
    for step in (3, 4, 5):  # the first of them is thinned out before a copy succeeds
        advance(run_dir, step)
        with pytest.MonkeyPatch.context() as monkeypatch:
            Broken(6, RuntimeError).patch(monkeypatch)
            mirror.finish()
    assert {"checkpoints/step_000003/learner.pt", "metrics.jsonl.copy2", "metrics.jsonl.copy4"} <= there(place)
    others = {"notes.txt", "notes.txt.copy1", "two/metrics.jsonl.copy1", "two/checkpoints/step_000001/learner.pt"}
    for name in others:
        (place / "one" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "one" / name).write_text("of somebody else")
    (Mirror(str(place), run_dir, told) if resumed else mirror).finish()
    assert len(told) == 3 and there(place) == described(place) | others
    assert brought_back(place, tmp_path / "back") == content(run_dir)
    assert not (place / "one" / "checkpoints" / "step_000003").exists()


def test_the_cut_above_covers_every_operation(tmp_path: Path) -> None:
    run_dir, _, mirror, told = mirrored(tmp_path, steps=2)
    advance(run_dir, 3)
    with pytest.MonkeyPatch.context() as monkeypatch:
        (broken := Broken(12, RuntimeError)).patch(monkeypatch)
        mirror.finish()
    assert broken.left == 0 and not told


def test_a_checkpoint_that_is_thinned_out_while_it_is_copied_is_copied_and_only_the_newest_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, place = tmp_path / "runs" / "one", tmp_path / "mirror"
    go, steps, real = threading.Event(), [], Copy.write

    def slow(self: Copy, at: str, source: BinaryIO, size: int) -> int:
        assert go.wait(60)
        return real(self, at, source, size)

    def describe(self: Copy, manifest: Manifest) -> None:
        learner = manifest.files[f"checkpoints/step_{manifest.step:06d}/learner.pt"]
        steps.append((manifest.step, torch.load(self.path(learner.at))["w"][0].item()))

    monkeypatch.setattr(Copy, "write", slow)
    monkeypatch.setattr(Copy, "describe", describe)
    told = Told()
    advance(run_dir, 1, keep=1)
    mirror = Mirror(str(place), run_dir, told)
    mirror.copy()
    for step in (2, 3):
        advance(run_dir, step, keep=1)
        mirror.copy()
    go.set()
    mirror.finish()
    assert list(dict.fromkeys(steps)) == [(1, 1.0), (3, 3.0)] and not told


def test_a_file_that_grows_while_it_is_copied_has_the_size_of_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, place = tmp_path / "runs" / "one", tmp_path / "mirror"
    advance(run_dir, 1)
    before, real = content(run_dir), Copy.write

    def write(self: Copy, at: str, source: BinaryIO, size: int) -> int:
        with (run_dir / "metrics.jsonl").open("a") as file:
            file.write("more\n")
        return real(self, at, source, size)

    monkeypatch.setattr(Copy, "write", write)
    Mirror(str(place), run_dir, Told()).finish()
    monkeypatch.undo()
    assert brought_back(place, tmp_path / "back") == before


def test_a_picture_that_is_replaced_while_it_is_copied_is_copied_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the next evaluation's is larger than what there was to begin with."""
    run_dir, place = tmp_path / "runs" / "one", tmp_path / "mirror"
    advance(run_dir, 1)
    picture, real = run_dir / "samples" / "after.png", _Snapshot.open
    picture.parent.mkdir(exist_ok=True)
    picture.write_bytes(b"small")

    def replaced(self: _Snapshot, name: str) -> Any:
        if name == "samples/after.png":
            picture.with_suffix(".part").write_bytes(b"a larger one")
            picture.with_suffix(".part").replace(picture)
        return real(self, name)

    monkeypatch.setattr(_Snapshot, "open", replaced)
    Mirror(str(place), run_dir, Told()).finish()
    back = brought_back(place, tmp_path / "back")
    assert back["samples/after.png"] == b"a larger one"


def spoil(name: str, text: bytes | None) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        (place / name).unlink() if text is None else (place / name).write_bytes(text)

    return change


def renamed(place: Path) -> None:
    read = json.loads((place / MANIFEST).read_text())
    read["files"]["../../escaped"] = read["files"].pop("placement.txt")
    (place / MANIFEST).write_text(json.dumps(read))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (spoil("metrics.jsonl", b"{"), "metrics.jsonl has 1 bytes, but mirror.json says 12; nothing was changed here"),
        (spoil("placement.txt", None), r"placement.txt cannot be read \(FileNotFoundError.*nothing was changed here"),
        (spoil(MANIFEST, None), r"no copy of a run at .*/one \(no mirror.json\); give one like"),
        (spoil(MANIFEST, b"{"), "mirror.json cannot be read"),
        (spoil(MANIFEST, b'{"files": {"a": 1}}'), "mirror.json cannot be read"),
        (renamed, "'../../escaped' lies outside of the run"),
    ],
)
def test_a_damaged_copy_brings_nothing_back(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    run_dir, place, _, _ = mirrored(tmp_path)
    shutil.rmtree(run_dir)
    damage(place / "one")
    with pytest.raises(MirrorError, match=message):
        Copy.at(str(place / "one")).bring_back(run_dir)
    assert not list(run_dir.parent.iterdir()) and not (tmp_path / "escaped").exists()


def test_two_processes_do_not_bring_a_run_back_at_once(tmp_path: Path) -> None:
    run_dir, place, _, _ = mirrored(tmp_path)
    whole = content(run_dir)
    shutil.rmtree(run_dir)
    (aside := run_dir.with_name(".one.partial")).mkdir(parents=True)
    (aside / "metrics.jsonl").write_text("half of")
    copy, other = Copy.at(str(place / "one")), os.open(aside, os.O_RDONLY)
    assert locked(other)
    with pytest.raises(MirrorError, match=r"another process is bringing .*/one back; stop it first"):
        copy.bring_back(run_dir)
    assert (aside / "metrics.jsonl").read_text() == "half of" and not run_dir.exists()
    os.close(other)  # it was killed, and has left a half
    (aside / "left").mkdir()
    copy.bring_back(run_dir)
    assert content(run_dir) == whole and not aside.exists()
    copy.bring_back(run_dir)  # another process had it a moment before
    assert content(run_dir) == whole and not aside.exists()


@pytest.mark.parametrize("taken", [True, False], ids=["another has the folder now", "nobody has"])
def test_a_lock_on_a_folder_that_is_gone_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: bool) -> None:
    run_dir, place, _, _ = mirrored(tmp_path)
    shutil.rmtree(run_dir)
    aside = run_dir.with_name(".one.partial")

    def late(handle: int) -> bool:
        shutil.rmtree(aside)  # whose process had failed, between its name and its lock
        if taken:
            aside.mkdir()
        return True

    monkeypatch.setattr(copied_run, "locked", late)
    with pytest.raises(MirrorError, match="another process"):
        Copy.at(str(place / "one")).bring_back(run_dir)
    assert not run_dir.exists()


def test_a_folder_that_is_there_is_never_overwritten(tmp_path: Path) -> None:
    run_dir, place, mirror, _ = mirrored(tmp_path)
    copy = Copy.at(str(place / "one"))
    assert copy.is_here(run_dir) and not copy.is_here(tmp_path / "nowhere")
    older = shutil.copytree(run_dir, tmp_path / "older" / "one")
    advance(run_dir, 2)
    assert copy.is_here(run_dir)
    mirror.finish()
    newer = (
        rf"at step 1, and its copy {place}/one is newer, of step 2; move that folder away, then .*--resume {place}/one"
    )
    with pytest.raises(MirrorError, match=newer):
        copy.is_here(older)
    with pytest.raises(MirrorError, match=newer):
        Mirror(str(place), older, Told())
    (older / RECORD).unlink()
    with pytest.raises(MirrorError, match="is no copy of it but of another run; move that folder away"):
        Mirror(str(place), older, Told())


def test_a_new_run_leaves_the_copy_of_an_older_one_alone(tmp_path: Path, config: RunConfig) -> None:
    place = tmp_path / "mirror"
    advance(tmp_path / "runs" / "tiny", 1)
    Mirror(str(place), tmp_path / "runs" / "tiny", Told()).finish()
    config = replace(config, runs_dir=str(tmp_path / "other"), checkpoint=replace(config.checkpoint, mirror=str(place)))
    with new_run_dir(config) as run_dir:
        assert run_dir.name == "tiny-2"


def test_status_says_of_which_step_the_copy_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, place, _, _ = mirrored(tmp_path)
    (run_dir / "status.json").unlink()
    status(run_dir)
    assert f"file://{place}/one, of step 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("copies", "checkpoint.mirror is 'copies'; it needs to be a URL such as s3://bucket/runs, or an absolute path"),
        ("s3:/bucket/runs", "checkpoint.mirror is 's3:/bucket/runs'; it needs to be a URL"),
        ("file://copies", "checkpoint.mirror is 'file://copies'; it needs"),
        (
            "nope://bucket",
            "checkpoint.mirror is 'nope://bucket', but fsspec knows no file system called 'nope'; use s3",
        ),
        ("s3://bucket/runs", "what s3:// needs is not installed: pip install s3fs"),
        ("gs://bucket/runs", "what gs:// needs is not installed: pip install gcsfs"),
        ("memory://", "checkpoint.mirror is 'memory://', which names no folder or bucket"),
    ],
)
def test_places_that_nobody_can_copy_to(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, place: str, message: str
) -> None:
    for package in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=message):
        replace(config, checkpoint=replace(config.checkpoint, mirror=place)).validate()


@pytest.mark.parametrize("place", ["{}/file/runs", "http://127.0.0.1:9/runs"])
def test_places_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"checkpoint.mirror '.*' cannot be written to \(.*give another place"):
        check_writable(place.format(tmp_path))


def test_a_copy_inside_of_the_run_itself(tmp_path: Path) -> None:
    advance(tmp_path / "runs" / "one", 1)
    for place in ("runs", "runs/one", "runs/one/deeper"):
        with pytest.raises(ConfigError, match="would put the copy into the run itself"):
            Mirror(str(tmp_path / place), tmp_path / "runs" / "one", Told())


def test_ctrl_c_goes_without_the_last_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advance(tmp_path / "runs" / "one", 1)
    go, told = threading.Event(), Told()

    def stuck(self: Copy, at: str, source: BinaryIO, size: int) -> int:
        assert go.wait(60)
        return 0

    def interrupted(self: threading.Thread, timeout: float | None = None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Copy, "write", stuck)
    mirror = Mirror(str(tmp_path / "mirror"), tmp_path / "runs" / "one", told)
    with pytest.MonkeyPatch.context() as pressed:
        pressed.setattr(threading.Thread, "join", interrupted)
        mirror.finish()
    (text,) = told
    assert text.endswith(
        "is not complete; it holds nothing until the next one, after the next checkpoint or by a resume"
    )
    go.set()
    mirror.finish()
