"""Steps whose judge says too little: what is left out of the update, and how a run that gives its judge up goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from grpo_flex import checkpoint, run
from grpo_flex.__main__ import main
from grpo_flex.config import RunConfig
from grpo_flex.learner import Learner
from grpo_flex.metrics import read_metrics
from tests.configs import judge_of
from tests.one_process import AWAY, StandInJudge, in_one_process

LACKING = f"3 of 3 groups lack verdicts (mostly: {AWAY})"
ADAPTER = "adapter/pytorch_lora_weights.safetensors"


def own(config: RunConfig, folder: Path, **judge: Any) -> RunConfig:
    """Two steps of three groups, saved at the end only."""
    given = replace(judge_of(config), server=None, endpoints=("http://judge/v1",), **judge)
    return replace(
        config,
        steps=2,
        runs_dir=str(folder),
        judge=given,
        prompts=replace(config.prompts, per_step=3),
        evaluation=replace(config.evaluation, versus_base=0),
        checkpoint=replace(config.checkpoint, every=100),
    )


def test_a_group_with_too_few_verdicts_has_no_part_in_the_update(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of the second group's six pairs are judged, which gives rewards, but less than half."""
    config = replace(own(config, tmp_path), steps=1)
    judge = StandInJudge(lambda _: 2 if judge.asked == 2 else 6)
    runs = in_one_process(monkeypatch, judge)
    assert run.train(config) == 0
    (process,) = runs
    (batch,) = process.updates
    assert [bool(np.isnan(a).all()) for a in batch.advantages] == [False, True, False]
    assert judge.asked == 3  # the step can do without it, so nobody is asked again
    assert process.begun == 1  # the head start ends before the group
    alone = Learner(config)
    result = alone.update([batch.groups[i] for i in (0, 2)], [batch.advantages[i] for i in (0, 2)], 0)
    assert all(map(torch.equal, process.learner.parameters, alone.parameters))
    assert not all(map(torch.equal, alone.parameters, Learner(config).parameters))
    row = read_metrics(tmp_path / config.name)[1]
    assert row["judge/failed"] == row["judge/problem/cannot_connect"] == 4
    assert row["judge/dropped_groups"] == 1 and row["judge/masked_share"] == pytest.approx(4 / 18)
    assert row["policy/loss"] == result.metrics["policy/loss"]
    assert "step 1: 1 of 3 groups got too few verdicts and are left out of the update" in capsys.readouterr().out


def test_a_run_that_gives_its_judge_up_is_saved_and_resumes_as_if_nothing_had_been(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = own(config, tmp_path, give_up_s=0.1)
    in_one_process(monkeypatch, judge := StandInJudge(lambda group: 0 if group.step == 1 else 6, healthy=False))
    assert run.train(config) == run.RESUME_ME
    run_dir, out = tmp_path / config.name, capsys.readouterr().out
    assert f"step 2: {LACKING}; waiting for the judge" in out
    assert f"stopped: {LACKING} for longer than judge.give_up_s=0.1; bring the judge back, then resume" in out
    assert f"python -m grpo_flex train --resume {run_dir}" in out
    assert judge.asked == 6  # while its health probe fails it is not asked again
    assert checkpoint.load(run_dir)[0] == 1 and (run_dir / ADAPTER).is_file()
    judge.answers = lambda _: 6
    assert main(["train", "--resume", str(run_dir)]) == 0
    assert run.train(replace(config, name="whole")) == 0
    ended, whole = (read_metrics(folder)[-1] for folder in (run_dir, tmp_path / "whole"))
    same = [key for key in whole if not key.startswith("perf/")]
    assert [ended[key] for key in same] == [whole[key] for key in same]
    one, two = (load_file(folder / ADAPTER) for folder in (run_dir, tmp_path / "whole"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_judge_that_would_give_the_same_useless_answers_again_is_not_asked_for_long(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_one_process(monkeypatch, judge := StandInJudge(lambda _: 0, problem="HTTP 400", said="the context is too short"))
    assert run.train(replace(own(config, tmp_path, give_up_s=1000.0), steps=1)) == run.MEND_FIRST
    out = capsys.readouterr().out
    assert '3 of 3 groups lack verdicts (mostly: HTTP 400, "the context is too short"), however often' in out
    assert "--max-model-len" in out and judge.asked == 9


def test_a_judge_that_answers_its_health_probe_and_no_question_is_given_up_too(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_one_process(monkeypatch, judge := StandInJudge(lambda _: 0))
    assert run.train(replace(own(config, tmp_path, give_up_s=0.1), steps=1)) == run.RESUME_ME
    assert f"stopped: {LACKING} for longer than judge.give_up_s=0.1" in capsys.readouterr().out
    assert judge.asked > 3 and checkpoint.load(tmp_path / config.name)[0] == 0
