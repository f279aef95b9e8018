"""A completed run's result is written whole, and by a resume if the run did not come to it."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ray.exceptions import RayActorError
from safetensors.torch import load_file

from grpo_flex import checkpoint, run
from grpo_flex.__main__ import main
from grpo_flex.config import RunConfig
from tests.configs import judge_of
from tests.one_process import OneProcess, StandInJudge, in_one_process

FILE = "adapter/pytorch_lora_weights.safetensors"
SAVE = OneProcess.save_adapter


@pytest.fixture
def own(config: RunConfig, tmp_path: Path) -> RunConfig:
    judge = replace(judge_of(config), server=None, endpoints=("http://judge/v1",))
    evaluation = replace(config.evaluation, versus_base=0)
    return replace(config, steps=1, runs_dir=str(tmp_path), judge=judge, evaluation=evaluation)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[OneProcess]:
    return in_one_process(monkeypatch, StandInJudge(lambda _: 6))


def test_a_sigterm_during_the_export_does_not_cut_it_short(
    own: RunConfig, runs: list[OneProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminated(process: OneProcess, folder: Path) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        SAVE(process, folder)

    monkeypatch.setattr(OneProcess, "save_adapter", terminated)
    assert run.train(own) == 0
    assert (Path(own.runs_dir) / own.name / FILE).is_file()


def test_a_learner_that_dies_during_the_export_leaves_it_to_a_resume(
    own: RunConfig, runs: list[OneProcess], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def dies(process: OneProcess, folder: Path) -> None:
        raise RayActorError

    run_dir = Path(own.runs_dir) / own.name
    resume = ["train", "--resume", str(run_dir)]
    with monkeypatch.context() as patch:
        patch.setattr(OneProcess, "save_adapter", dies)
        with pytest.raises(ValueError, match=r"a process of the run died(.|\n)*--resume .* exports the result"):
            run.train(own)
        assert checkpoint.load(run_dir)[0] == 1 and not (run_dir / FILE).exists()
        assert main(resume) == 2
        assert "nothing was exported; once the cause is gone" in capsys.readouterr().err

    before = (run_dir / "metrics.jsonl").read_bytes()
    assert main(resume) == 0
    out = capsys.readouterr().out
    assert "has completed its 1 steps, but its adapter is missing or older; exporting" in out and "finished" in out
    alone = runs[-1].config
    assert alone.placement.rollout_workers == 0 and not alone.scorers and not runs[-1].updates
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    assert run.train(replace(own, name="whole")) == 0
    one, two = (load_file(folder / FILE) for folder in (run_dir, Path(own.runs_dir) / "whole"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)

    assert main(resume) == 2
    assert "has completed its 1 steps; to go on" in capsys.readouterr().err
    os.utime(run_dir / FILE, ns=(0, 0))  # of an earlier checkpoint
    assert main(resume) == 0 and (run_dir / FILE).stat().st_mtime_ns


def test_an_export_that_is_cut_off_leaves_the_one_before(
    own: RunConfig, runs: list[OneProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run.train(own) == 0
    run_dir = Path(own.runs_dir) / own.name
    before = (run_dir / FILE).read_bytes()

    def cut_off(process: OneProcess, folder: Path) -> None:
        SAVE(process, folder)
        (folder / Path(FILE).name).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(OneProcess, "save_adapter", cut_off)
    assert main(["train", "--resume", str(run_dir), "steps=2"]) == 130
    assert (run_dir / FILE).read_bytes() == before
    assert [path.name for path in run_dir.iterdir() if "adapter" in path.name] == ["adapter"]
