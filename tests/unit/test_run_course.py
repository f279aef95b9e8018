"""Whole runs that take another course than to the end: scorers that fail, a held-out score that falls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from grpo_flex import checkpoint, run
from grpo_flex.__main__ import main
from grpo_flex.advantages import BestAndWorst, WeightedSum
from grpo_flex.config import ConfigError, Evaluation, RunConfig
from grpo_flex.metrics import read_metrics
from grpo_flex.rewards import Pointwise
from grpo_flex.types import Prompt
from tests.configs import judge_of, tiny_config
from tests.one_process import OneProcess, StandInJudge, in_one_process


@dataclass(frozen=True, kw_only=True)
class Moody:
    """The picture's mean brightness, or an exception where that is an even number (``always``: anyhow)."""

    always: bool = False
    name: str = "moody"

    def __call__(self, media: np.ndarray, prompt: Prompt) -> Mapping[str, float]:
        if self.always or int(media.sum()) % 2 == 0:
            raise RuntimeError("not in the mood")
        return {"mood": float(media.mean())}


@dataclass(frozen=True, kw_only=True)
class Light:
    name: str = "light"

    def __call__(self, media: np.ndarray, prompt: Prompt) -> Mapping[str, float]:
        return {"mood": float(media.mean())}


@dataclass(frozen=True, kw_only=True)
class Shade:
    def __call__(self, media: np.ndarray, prompt: Prompt) -> Mapping[str, float]:
        return {"shade": 255 - float(media.mean())}


@dataclass(frozen=True, kw_only=True)
class Falling:
    """A held-out score that is lower each time it is asked for."""

    path: str

    def __call__(self, media: np.ndarray, prompt: Prompt) -> dict[str, float]:
        with Path(self.path).open("a") as file:
            file.write("x")
        return {"falling": -float(Path(self.path).stat().st_size)}


@dataclass(frozen=True, kw_only=True)
class OnTheFirstGpu:
    """A judge of the run's own."""

    def gpus_here(self) -> list[tuple[str, ...]]:
        return [("0",)]

    def start(self, log_dir: Path) -> Any:
        LOADED.append(len(RUNS))
        return SimpleNamespace(endpoints=("http://judge/v1",), reserved=("GPU 0, beside Ray",), stop=lambda: None)


RUNS: list[OneProcess] = []
"""Those of the present test whose models were asked to load."""
LOADED: list[int] = []
"""How many these were when a judge was started."""


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    LOADED.clear()
    monkeypatch.setattr(f"{__name__}.RUNS", in_one_process(monkeypatch, StandInJudge(lambda _: 6)))


@pytest.mark.parametrize(("gpus", "loaded"), [("0", 0), ("0,1", 1)])
def test_models_load_beside_a_judge_that_starts_unless_they_share_its_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gpus: str, loaded: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    config = tiny_config(tmp_path, steps=1)
    placement = replace(config.placement, rollout_gpus=0.5, learner_gpus=0.5)
    judge = replace(judge_of(config), server=OnTheFirstGpu())
    evaluation = replace(config.evaluation, versus_base=0)
    assert run.train(replace(config, judge=judge, placement=placement, evaluation=evaluation)) == 0
    (before,) = LOADED
    assert before == loaded
    assert ("warning: the judge that this run started has GPU 0" in capsys.readouterr().out) == (loaded == 0)
    assert "http://judge/v1  GPU 0, beside Ray" in (tmp_path / "runs" / "tiny" / "placement.txt").read_text()


def scored(folder: Path, **changes: Any) -> RunConfig:
    return tiny_config(folder, judge=None, reward=Pointwise(criteria=("mood",)), **changes)


def test_a_scorer_that_raises_masks_its_siblings_and_the_run_goes_on(tmp_path: Path) -> None:
    assert run.train(scored(tmp_path, scorers=(Moody(),))) == 0
    rows = read_metrics(tmp_path / "runs" / "tiny")[1:]
    assert len(rows) == 3
    failed = [row["scorer/problem/RuntimeError"] or 0 for row in rows if "scorer/problem/RuntimeError" in row]
    assert 0 < sum(failed) < 24
    for row in rows:
        assert row["reward/masked_share"] == row["advantage/masked_share"] == row["scorer/masked_share"]
        assert None not in row.values()


def test_a_scorer_alone_is_a_reward_and_a_resume_goes_on_with_it(tmp_path: Path) -> None:
    assert run.train(scored(tmp_path, steps=2, scorers=(Light(),))) == 0
    run_dir = tmp_path / "runs" / "tiny"
    assert main(["train", "--resume", str(run_dir), "steps=3"]) == 0
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for row in rows[1:]:
        assert row["scorer/verdicts"] == 8 and row["scorer/failed"] == 0 and row["reward/masked_share"] == 0
        assert {"scorer/mood_mean", "reward/mood_std", "perf/score_s", "policy/ratio"} <= row.keys()
        assert not [key for key in row if key.startswith("judge/")] and None not in row.values()
        assert row["policy/grad_norm"]


def test_scorers_that_always_fail_stop_the_run_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.train(scored(tmp_path, steps=9, scorers=(Moody(always=True),))) == run.MEND_FIRST
    rows = read_metrics(tmp_path / "runs" / "tiny")
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[1]["policy/skipped_updates"] == 1
    assert rows[0]["heldout/oracle"] == rows[2]["heldout/oracle"]  # nothing was learnt from nothing
    out = capsys.readouterr().out
    assert "the scorer moody failed for every sibling (RuntimeError: not in the mood)" in out
    assert "no sibling got a reward in 3 steps running" in out and "then resume" in out
    assert f"python -m grpo_flex train --resume {tmp_path / 'runs' / 'tiny'}" in out


def test_a_run_whose_held_out_score_falls_stops_early(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scorer = Falling(path=str(tmp_path / "calls"))
    evaluation = Evaluation(every=1, scorer=scorer, stop_after=2, versus_base=0)
    assert run.train(scored(tmp_path, steps=9, scorers=(Moody(),), evaluation=evaluation)) == 0
    run_dir = tmp_path / "runs" / "tiny"
    assert [row["step"] for row in read_metrics(run_dir)] == [0, 1, 2] and checkpoint.load(run_dir)[0] == 2
    out = capsys.readouterr().out
    assert "stopping early: heldout/falling" in out and "for 2 evaluations running" in out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"evaluation": Evaluation(scorer=Light(), stop_after=2, stop_on="heldout/nonsense", versus_base=0)},
            "evaluation.stop_on is 'heldout/nonsense', which evaluation.scorer does not give: it gives heldout/mood",
        ),
    ],
)
def test_a_name_that_nothing_has_ends_the_run_before_it_learns(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run.train(scored(tmp_path, scorers=(Light(),), **changes))
    run_dir = tmp_path / "runs" / "tiny"
    assert not run_dir.is_dir() or not [row for row in read_metrics(run_dir) if row["step"]]


@pytest.mark.parametrize(
    ("advantage", "said"),
    [
        (
            BestAndWorst(score="nonsense"),
            "advantage reads 'nonsense', which no sibling has; the reward gives mood, overall",
        ),
        (WeightedSum(parts=("overall", "of")), "advantage reads 'of', which no sibling has"),
        (WeightedSum(parts=("overall", "mood")), ""),
    ],
    ids=str,
)
def test_a_part_of_the_reward_that_nobody_has_is_told(
    tmp_path: Path, advantage: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.train(scored(tmp_path, scorers=(Light(),), advantage=advantage)) == 0
    out = capsys.readouterr().out
    assert said in out and bool(said) == ("advantage reads" in out)


def test_a_figure_that_nobody_gives_is_refused_before_a_resumed_run_takes_a_step(tmp_path: Path) -> None:
    assert run.train(scored(tmp_path, steps=2, scorers=(Light(),))) == 0
    run_dir = tmp_path / "runs" / "tiny"
    words = ["steps=9", "evaluation.stop_after=2", "evaluation.stop_on=heldout/nonsense"]
    assert main(["train", "--resume", str(run_dir), *words]) == 2
    assert [row["step"] for row in read_metrics(run_dir)] == [0, 1, 2]


def test_a_resume_may_bring_the_scorer_of_the_figure_to_stop_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.train(scored(tmp_path, steps=2, scorers=(Light(),))) == 0
    run_dir = tmp_path / "runs" / "tiny"
    config = json.loads((run_dir / "config.json").read_text())
    config["evaluation"]["scorer"] = {"type": f"{Shade.__module__}:Shade"}
    (run_dir / "config.json").write_text(json.dumps(config))
    words = ["steps=3", "evaluation.stop_after=2", "evaluation.stop_on=heldout/shade"]
    assert main(["train", "--resume", str(run_dir), *words]) == 0
    assert "heldout/shade" in read_metrics(run_dir)[-1]
