"""Whole runs over a real local Ray cluster with a real judge process, through the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grpo_flex import checkpoint
from grpo_flex.__main__ import main
from grpo_flex.config import RunConfig
from grpo_flex.config_file import to_json
from grpo_flex.metrics import read_metrics
from grpo_flex.run import RESUME_ME
from grpo_flex.verdicts import FILE_NAME, read_verdicts
from tests.configs import judge_of, tiny_config
from tests.integration.processes import experiment_file, rows, start_training, wait_for

VOLATILE = ("perf/", "judge/latency", "judge/requests", "judge/retries", "scorer/seconds")
"""Figures of the clock and the network; everything else has to repeat."""


def experiment(folder: Path, **changes: Any) -> str:
    """An experiment file for the command line, which imports a file and not an object."""
    return experiment_file(tiny_config(folder, **changes), folder)


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith(VOLATILE)} for row in read_metrics(run_dir)]


def test_a_complete_run_leaves_what_it_promises(straight: Path) -> None:
    run_dir = straight / "runs" / "tiny"
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    for step in (0, 2, 4):
        assert {"heldout/oracle", "heldout/exact"} <= rows[step].keys()
    for row in rows[1:]:
        assert {"reward/mean", "perf/rollout_s", "perf/judge_s", "perf/update_s", "judge/parse_rate"} <= row.keys()
        assert all(v is not None for v in row.values())
    assert [step for step, row in enumerate(rows) if "heldout/win_rate" in row] == [2, 4]  # step 0 is the base itself
    assert rows[1]["policy/ratio"] == 1 and rows[1]["policy/log_ratio_abs"] == 0
    for name in (
        "config.json",
        "report.html",
        "verdicts.jsonl.gz",
        "adapter/pytorch_lora_weights.safetensors",
        "samples/before_after.png",
    ):
        assert (run_dir / name).stat().st_size > 0, name
    assert [p.name for p in checkpoint.complete(run_dir)][-2:] == ["step_000003", "step_000004"]
    best = max((2, 4), key=lambda step: (rows[step]["heldout/oracle"], step))
    assert checkpoint.best(run_dir) == run_dir / "checkpoints" / f"step_{best:06d}"


def test_a_run_that_is_stopped_twice_and_brought_back_from_its_mirror_equals_the_run_never_stopped(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By SIGTERM in its first step, after which its node is gone, and by Ctrl-C in a later one; with fewer workers."""
    mirror, run_dir = f"file://{tmp_path}/mirror", tmp_path / "runs" / "tiny"
    rarely = replace(tiny_config(tmp_path).checkpoint, every=1000, mirror=mirror)
    process = start_training(experiment(tmp_path, steps=4, checkpoint=rarely))
    wait_for(lambda: run_dir.is_dir() and len(rows(run_dir)) >= 1, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == RESUME_ME, out
    assert f"{mirror}/tiny, of step {len(rows(run_dir)) - 1}" in out
    shutil.rmtree(run_dir)

    process = start_training("--resume", f"{mirror}/tiny")
    wait_for(lambda: len(rows(run_dir)) >= 2, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole process group
    out, _ = process.communicate(timeout=120)
    done = len(rows(run_dir)) - 1
    assert process.returncode == RESUME_ME, out
    assert "--resume" in out and checkpoint.load(run_dir)[0] == done < 4
    # Overrides may stand behind --resume, as `make … RESUME=… ARGS=…` writes them.
    assert main(["train", "exp.py", "--resume", str(run_dir)]) == 0
    assert f"{mirror}/tiny, of step 4" in capsys.readouterr().out
    assert numbers(run_dir) == numbers(straight / "runs" / "tiny")
    assert [e.step for e in read_verdicts(run_dir / FILE_NAME)] == [
        e.step for e in read_verdicts(straight / "runs" / "tiny" / FILE_NAME)
    ]
    assert main(["train", "--resume", f"{mirror}/tiny"]) == 2
    out, err = capsys.readouterr()
    assert "nothing has to be brought back" in out and "has completed its 4 steps" in err


def test_a_configuration_that_does_not_fit_the_checkpoint_changes_nothing(
    straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = straight / "runs" / "tiny"
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert main(["train", "--resume", str(run_dir), "steps=9", "adapter.rank=2"]) == 2
    message = capsys.readouterr().err
    assert "adapter.rank is now 2, and was 4" in message and "Traceback" not in message
    assert main(["train", "--resume", str(run_dir), "steps=9", "seed=5"]) == 2
    assert "seed is now 5, and was 7" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def test_evaluate_and_compare_read_a_run(straight: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = straight / "runs" / "tiny"
    assert main(["evaluate", str(run_dir)]) == 0
    table = capsys.readouterr().out
    assert "oracle" in table and (run_dir / "samples" / "evaluate.png").is_file()
    last = read_metrics(run_dir)[-1]["heldout/oracle"]
    assert last is not None and f"{last:.3f}" in table
    assert main(["compare", str(run_dir), str(run_dir)]) == 0
    assert main(["status", str(run_dir)]) == 0
    assert "finished" in capsys.readouterr().out


def refused(config: RunConfig, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one message of a run that cannot start; nothing may be left behind."""
    saved = folder / "bad.json"
    saved.write_text(to_json(config))
    file = folder / "bad.py"
    file.write_text(
        f"from pathlib import Path\nfrom grpo_flex.config_file import from_json\ndef config(): return from_json(Path({str(saved)!r}).read_text())\n"
    )
    capsys.readouterr()  # what making the tiny model printed
    assert main(["train", str(file)]) == 2
    assert not list(Path(config.runs_dir).glob("*"))
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "Traceback" not in message
    return message


def test_a_judge_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path)
    message = refused(
        replace(config, judge=replace(judge_of(config), server=None, endpoints=("http://127.0.0.1:9/v1",))),
        tmp_path,
        capsys,
    )
    assert "the judge cannot be reached" in message and "127.0.0.1:9" in message and "judge.endpoints" in message


def test_a_group_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path)
    assert "sampling.group_size is 1" in refused(
        replace(config, sampling=replace(config.sampling, group_size=1)), tmp_path, capsys
    )


def test_unreadable_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path)
    (tmp_path / "heldout.jsonl").write_text("nonsense\n")
    assert "prompts.heldout" in refused(config, tmp_path, capsys)


def test_no_space(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 2**30, 2**20))  # pyright: ignore
    assert "has 1 MB free" in refused(tiny_config(tmp_path), tmp_path, capsys)


def test_a_runs_dir_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    config = tiny_config(tmp_path, runs_dir=str(tmp_path / "file" / "runs"))
    assert "runs_dir" in refused(config, tmp_path, capsys)


def test_a_mirror_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    config = tiny_config(tmp_path)
    for place in (tmp_path / "file" / "mirror", Path(config.runs_dir)):
        message = refused(replace(config, checkpoint=replace(config.checkpoint, mirror=str(place))), tmp_path, capsys)
        assert "checkpoint.mirror" in message and "give another place" in message


def test_a_mirror_without_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", f"file://{tmp_path}/tiny"]) == 2
    assert "there is no copy of a run at" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_resuming_what_is_no_run(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", folder]) == 2
    assert "is no run directory" in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path)
    index = tmp_path / "tiny_flux" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "WanPipeline"}))
    assert "generator.model" in (message := refused(config, tmp_path, capsys)) and "WanPipeline" in message


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_model_whose_download_was_cut_off(kept: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path)
    (weights,) = (tmp_path / "tiny_flux" / "vae").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:kept])
    message = refused(config, tmp_path, capsys)
    assert "generator.model" in message and f"vae/{weights.name} is damaged or was cut off" in message


def test_a_ray_cluster_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path)
    message = refused(replace(config, placement=replace(config.placement, ray_address="127.0.0.1:1")), tmp_path, capsys)
    assert "no Ray cluster answers at '127.0.0.1:1'" in message and "placement.ray_address" in message


def test_a_prompt_that_is_too_long_is_refused_before_anything_is_started(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = replace(config, runs_dir=str(tmp_path / "runs"), generator=replace(config.generator, max_sequence_length=2))  # pyright: ignore[reportArgumentType]
    for words in ([], ["--dry-run"]):
        assert main(["train", experiment_file(short, tmp_path), *words]) != 0
        said = capsys.readouterr()
        assert "more than generator.max_sequence_length=2" in said.err + said.out
        assert "starting" not in said.out
    assert not (tmp_path / "runs").exists()
