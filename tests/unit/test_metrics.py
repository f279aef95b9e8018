"""metrics.jsonl, samples/ and W&B's offline file, read back."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from grpo_flex import pictures
from grpo_flex.config import Wandb
from grpo_flex.metrics import RunLog, VerdictRow, _WandbRun, read_metrics, wandb_mode
from tests.unit.run_stand_in import StandInConfig, make_run, sample

QUIET = StandInConfig()
OFFLINE = StandInConfig(wandb=Wandb(mode="offline"))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "grpo_flex.metrics"]


# ---------------------------------------------------------------- metrics.jsonl


def test_a_full_disk_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = RunLog(tmp_path, QUIET)
    with pytest.raises(OSError, match="No space left"):
        log.log(0, {"heldout/oracle": 0.5})
    log.close()  # what is said at the end must not take the place of what went wrong


def test_one_line_per_step_that_is_valid_json_even_for_nan(tmp_path: Path) -> None:
    with RunLog(tmp_path, QUIET) as log:
        log.log(0, {"heldout/oracle": 0.5})
        log.log(1, {"reward/mean": math.nan, "policy/kl": math.inf, "judge/asked": 4})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert [json.loads(line, parse_constant=refuse) for line in lines] == [
        {"step": 0, "heldout/oracle": 0.5},
        {"step": 1, "reward/mean": None, "policy/kl": None, "judge/asked": 4.0},
    ]


def test_a_line_can_be_read_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    with RunLog(tmp_path, QUIET) as log:
        log.log(3, {"reward/mean": 0.5})
        assert read_metrics(tmp_path) == [{"step": 3, "reward/mean": 0.5}]


def test_a_step_has_one_line(tmp_path: Path) -> None:
    with RunLog(tmp_path, QUIET) as log:
        log.log(1, {})
        with pytest.raises(ValueError, match="step 1 is already in metrics"):
            log.log(1, {})


def test_resume_drops_the_steps_after_the_checkpoint_and_goes_on(tmp_path: Path) -> None:
    with RunLog(tmp_path, QUIET) as log:
        for step in range(6):
            log.log(step, {"reward/mean": step / 10})
    with RunLog(tmp_path, QUIET, resume_step=3) as log:
        log.log(4, {"reward/mean": 9.0})
    assert [(row["step"], row["reward/mean"]) for row in read_metrics(tmp_path)] == [
        (0, 0.0), (1, 0.1), (2, 0.2), (3, 0.3), (4, 9.0),
    ]  # fmt: skip


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2, "rew')
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]
    RunLog(tmp_path, QUIET, resume_step=5).close()
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'


@pytest.mark.parametrize(("lines", "missing"), [(8, "8 to 10"), (10, "10"), (0, "0 to 10"), (11, ""), (13, "")])
def test_a_resume_says_which_lines_are_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lines: int, missing: str
) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(lines)))
    with RunLog(tmp_path, QUIET, resume_step=10) as log:
        log.log(11, {})
    assert [f"metrics.jsonl has no line of step {missing}: " in said for said in warnings(caplog)] == [True] * bool(
        missing
    )


def test_every_line_is_on_the_disk_when_it_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, int]] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        synced.append((Path(os.readlink(f"/proc/self/fd/{handle}")).name, os.fstat(handle).st_size))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with RunLog(tmp_path, QUIET) as log:
        log.log(0, {})
        log.log(1, {})
    RunLog(tmp_path, QUIET, resume_step=0).close()
    assert synced == [("metrics.jsonl", 12), ("metrics.jsonl", 24), (".metrics.jsonl.part", 12)]


def test_a_new_run_does_not_write_over_an_old_one(tmp_path: Path) -> None:
    with RunLog(tmp_path, QUIET) as log:
        log.log(0, {})
    with pytest.raises(ValueError, match="holds a run already; resume it"):
        RunLog(tmp_path, QUIET)


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2, is not JSON"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("missing", [True, False])
def test_a_folder_that_is_no_run(tmp_path: Path, missing: bool) -> None:
    folder = tmp_path / "nothing" if missing else tmp_path
    with pytest.raises(ValueError, match="no such directory" if missing else "is not a run"):
        read_metrics(folder)


# ---------------------------------------------------------------- samples


def test_the_first_samples_stand_for_the_base_model_and_survive_a_resume(tmp_path: Path) -> None:
    before, after = [sample(k, 0.4) for k in range(3)], [sample(k, 0.9) for k in range(3)]
    with RunLog(tmp_path, QUIET) as log:
        log.samples(0, before)
        assert not (tmp_path / "samples" / "before_after.png").exists()
    with RunLog(tmp_path, QUIET, resume_step=0) as log:
        log.samples(5, after)
    folder = tmp_path / "samples"
    assert {p.name for p in folder.glob("*.png")} == {"step_00000.png", "step_00005.png", "before_after.png"}
    for name, given in (("before", before), ("after", after)):
        kept = pictures.load_set(folder, name)
        assert [s.prompt for s in kept] == [s.prompt for s in given]
        assert [s.scores for s in kept] == [s.scores for s in given]
        assert all(np.array_equal(k.media, s.media) for k, s in zip(kept, given, strict=True))


def test_a_given_baseline_is_used_and_the_grid_is_limited(tmp_path: Path) -> None:
    with RunLog(tmp_path, QUIET) as log:
        log.samples(5, [sample(k, 0.9) for k in range(9)], [sample(k, 0.1) for k in range(9)])
    kept = pictures.load_set(tmp_path / "samples", "before")
    assert [s.scores["oracle"] for s in kept] == [0.1] * QUIET.evaluation.grid


def test_small_pictures_are_enlarged_by_whole_numbers_and_large_ones_reduced() -> None:
    assert pictures.scaled(np.zeros((64, 64, 3), np.uint8)).size == (192, 192)
    assert pictures.scaled(np.zeros((32, 32, 3), np.uint8)).size == (192, 192)
    assert pictures.scaled(np.zeros((720, 1440, 3), np.uint8)).size == (384, 192)


def test_more_motion_is_no_better_score() -> None:
    assert pictures.main_score({"motion": 0.1}) is None
    assert pictures.main_score({"motion": 0.1, "win_rate": 0.5}) == "win_rate"


def test_clips_become_an_mp4_that_plays_beside_a_strip(tmp_path: Path) -> None:
    import imageio.v2 as imageio

    run = make_run(tmp_path, upto=5, frames=9)
    film = list(imageio.get_reader(run / "samples" / "before_after.mp4").iter_data())
    assert len(film) >= 9 and film[0].shape[1] > 2 * 192
    assert np.abs(film[0].astype(int) - film[8].astype(int)).max() > 100  # the disc has moved
    assert (run / "samples" / "before_after.png").is_file()


@pytest.mark.parametrize("side", [(480, 832), (240, 416), (48, 48)])
def test_a_sheet_of_clips_is_no_wider_than_a_report_shows_readably(tmp_path: Path, side: tuple[int, int]) -> None:
    """Large clips too, as a strip and as a film, of which two pairs stand beside each other."""
    from PIL import Image

    clips = [replace(sample(k, 0.5), media=np.zeros((7, *side, 3), np.uint8)) for k in range(4)]
    film, still = pictures.write_before_after(tmp_path / "clips", list(zip(clips, clips, strict=True)), "title", 8)
    assert Image.open(still).width <= pictures.WIDEST
    import imageio.v2 as imageio

    height, width, _ = np.asarray(imageio.mimread(str(film))[0]).shape
    assert width <= pictures.WIDEST and height < width


def test_siblings_of_one_prompt_meet_in_order() -> None:
    before, after = [sample(0, 0.1), sample(1, 0.2), sample(0, 0.3)], [sample(0, 0.5), sample(0, 0.6)]
    pairs = [(a.scores["oracle"], b.scores["oracle"]) for a, b in pictures.match(before, after)]
    assert pairs == [(0.1, 0.5), (0.3, 0.6)]


@pytest.mark.parametrize("text", ["short", "a prompt with many words " * 9, "x" * 300, "ein Kreis 圆 ◯", ""])
def test_wrapped_lines_fit(text: str) -> None:
    face = pictures.font(13)
    lines = pictures.wrap(text, face, 150)
    assert len(lines) <= 4 and all(face.getlength(line) <= 150 for line in lines)
    assert text.startswith(lines[0].rstrip("…")) if lines else not text


# ---------------------------------------------------------------- Weights & Biases


def test_mode_auto_needs_a_key_to_go_online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert wandb_mode(Wandb()) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert wandb_mode(Wandb()) == "online"
    assert wandb_mode(Wandb(mode="offline")) == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode(Wandb()) == "disabled"


def offline_records(run_dir: Path) -> list[list[Any]]:
    """The protobuf records of every offline run file, oldest first.

    The file is LevelDB's log format after 7 bytes of W&B's own header: blocks of 32 KiB, in them chunks of
    (crc 4, length 2, type 1), type 1 a whole record, 2, 3 and 4 the first, middle and last part of one.
    """
    import wandb
    from wandb.proto import wandb_internal_pb2 as records_pb2

    wandb.teardown()  # finishing a run does not wait until its file is written out; ending the service does
    runs = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        data, at, part, records = path.read_bytes(), 7, b"", []
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:  # no room for a chunk's header: the rest of the block is padding
                at += 32768 - at % 32768
                continue
            length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            part += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):
                record = getattr(records_pb2, "Record")()  # noqa: B009 (made at run time, unseen by type checkers)
                record.ParseFromString(part)
                records.append(record)
                part = b""
        runs.append(records)
    return runs


def history(records: list[Any]) -> list[dict[str, Any]]:
    rows = [r.history for r in records if r.WhichOneof("record_type") == "history"]
    return [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in row.item} for row in rows]


def media_types(records: list[Any]) -> dict[str, str]:
    """A medium is spread over keys of its own, one of which says what it is."""
    items = [item for row in history(records) for item in row.items()]
    return {key.removesuffix("/_type"): value for key, value in items if key.endswith("/_type")}


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, killed after its checkpoint at step 2 and resumed."""
    run_dir = tmp_path_factory.mktemp("offline") / "shapes"
    with RunLog(run_dir, OFFLINE) as log:
        log.samples(0, [sample(k, 0.4) for k in range(2)])
        for step in range(4):
            log.log(step, {"heldout/oracle": 0.5 + step / 10, "reward/mean": math.nan, "perf/step_s": 1.5})
    begun = int(time.time())
    while int(time.time()) == begun:  # W&B names a run's folder after the second of its start
        pass
    with RunLog(run_dir, OFFLINE, resume_step=2) as log:
        for step in (3, 4):
            log.log(step, {"heldout/oracle": 0.5 + step / 10})
        log.samples(4, [sample(k, 0.9) for k in range(2)])
        row = VerdictRow(prompt="a disc", media=sample(0, 0.9).media, score=1.0, verdict="Image 1 is rounder")
        log.verdict_table(4, [row])
    return run_dir


def test_wandb_has_the_same_numbers_once_each_under_one_run_id(offline: Path) -> None:
    first, second = offline_records(offline)
    ids = {r.run.run_id for r in [*first, *second] if r.WhichOneof("record_type") == "run"}
    assert ids == {(offline / "wandb_id").read_text()}
    rows = [row for row in history(first) + history(second) if "heldout/oracle" in row]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["heldout/oracle"] for row in rows] == [row["heldout/oracle"] for row in read_metrics(offline)]
    assert not any("reward/mean" in row for row in rows)  # NaN is absent, not zero


def test_wandb_axis_is_the_step_and_summaries_are_defined(offline: Path) -> None:
    metrics = {
        r.metric.name or r.metric.glob_name: r.metric
        for r in offline_records(offline)[0]
        if r.WhichOneof("record_type") == "metric"
    }
    sections = ("reward", "advantage", "policy", "judge", "heldout", "perf", "media")
    assert all(metrics[f"{section}/*"].step_metric == "step" for section in sections)
    assert metrics["heldout/*"].summary.max and metrics["heldout/*"].summary.last
    assert metrics["perf/*"].summary.mean


def test_wandb_shows_grids_and_the_verdict_table(offline: Path) -> None:
    assert media_types(offline_records(offline)[1]) == {
        "media/samples": "image-file",
        "media/before_after": "image-file",
        "media/verdicts": "table-file",
    }
    (table,) = offline.glob("wandb/offline-run-*/files/media/table/**/*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["prompt", "picture", "score", "verdict"]
    assert content["data"][0][2:] == [1.0, "Image 1 is rounder"]


def test_wandb_stays_in_the_run_directory_and_off_the_console(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run_dir = tmp_path / "run"
    with RunLog(run_dir, OFFLINE) as log:
        log.samples(1, [sample(0, 0.9, frames=3)], [sample(0, 0.4, frames=3)])
        row = VerdictRow(prompt="a disc", media=sample(0, 0.9, frames=3).media, score=math.nan, verdict="-")
        log.verdict_table(1, [row])
    assert capfd.readouterr() == ("", "")
    assert not [p for p in (tmp_path / "home").rglob("*") if p.is_file() and "logs" not in p.parts]
    types = media_types(offline_records(run_dir)[0])
    assert types == {
        "media/samples": "video-file",
        "media/before_after": "video-file",
        "media/verdicts": "table-file",
    }


def test_wandb_that_cannot_start_costs_a_warning_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb
    from wandb.errors import CommError

    def refuse(**_: object) -> None:
        raise CommError("no route to host")

    monkeypatch.setattr(wandb, "init", refuse)
    with RunLog(tmp_path, replace(QUIET, wandb=Wandb(mode="online"))) as log:
        log.log(0, {"reward/mean": 0.5})
        log.samples(0, [sample(0, 0.4)])
    said = [text.split(" (")[0] for text in warnings(caplog)]
    assert said == ["W&B cannot start online", "W&B cannot start offline"]
    assert "no route to host" in caplog.text
    assert len(read_metrics(tmp_path)) == 1


class Gone:
    """A W&B run whose process has ended: whatever is asked of it raises."""

    def __init__(self, error: Exception) -> None:
        self.error, self.asked = error, 0

    def log(self, values: dict[str, Any]) -> None:
        self.asked += 1
        raise self.error

    def finish(self) -> None:
        self.log({})


@pytest.mark.parametrize("error", [ConnectionResetError("Connection lost"), BrokenPipeError(), RuntimeError("closed")])
def test_wandb_that_fails_later_costs_one_warning_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    gone = Gone(error)
    monkeypatch.setattr(_WandbRun, "start", lambda *_: _WandbRun(replaced(gone), "staging"))
    with RunLog(tmp_path, QUIET) as log:
        for step in range(3):
            log.log(step, {"reward/mean": 0.5})
            log.samples(step, [sample(0, 0.4)])
            log.verdict_table(step, [VerdictRow(prompt="p", media=sample(0, 0.4).media, score=1.0, verdict="v")])
    what = str(error) or type(error).__name__
    assert warnings(caplog) == [f"W&B has failed ({what}); going on without it, see metrics.jsonl for the numbers"]
    assert gone.asked == 1 and len(read_metrics(tmp_path)) == 3 and (tmp_path / "samples/step_00002.png").is_file()


def test_wandb_that_cannot_finish_costs_a_warning_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_WandbRun, "start", lambda *_: _WandbRun(replaced(Gone(OSError("Connection lost"))), "staging"))
    RunLog(tmp_path, QUIET).close()
    assert len(warnings(caplog)) == 1


def replaced(run: Gone) -> Any:
    """With what ``_WandbRun`` asks of a run before it is gone."""
    return SimpleNamespace(log=run.log, finish=run.finish, define_metric=lambda *_, **__: None)


STOPPED = """
import os, signal, sys, time
from pathlib import Path
from tests.unit.test_metrics import OFFLINE, RunLog

with RunLog(Path(sys.argv[1]), OFFLINE) as log:
    log.log(0, {"reward/mean": 0.5})
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    names = {int(child): Path(f"/proc/{child}/cmdline").read_text() for child in children}
    service = [child for child, name in names.items() if "wandb-core" in name]
    for child in service:
        os.kill(child, signal.SIGTERM)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert len(service) == 1
    for step in range(1, int(sys.argv[2])):
        log.log(step, {"reward/mean": 0.5})
"""


@pytest.mark.parametrize("steps", [1, 3])
def test_a_signal_to_all_processes_of_a_job_ends_wandb_and_not_the_run(tmp_path: Path, steps: int) -> None:
    done = subprocess.run([sys.executable, "-c", STOPPED, str(tmp_path), str(steps)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == ""
    (said,) = done.stderr.splitlines()
    assert said.startswith("W&B has failed (") and len(read_metrics(tmp_path)) == steps
