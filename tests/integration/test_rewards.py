"""Whole runs whose reward comes from in-process scorers: alone, beside a judge, and when one cannot be loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_flex.__main__ import main
from grpo_flex.advantages import Gdpo
from grpo_flex.config import RunConfig
from grpo_flex.metrics import read_metrics
from grpo_flex.rewards import Pointwise, Several, WinRate
from grpo_flex.scorers import ClipScore
from grpo_flex.types import Prompt
from grpo_flex.verdicts import FILE_NAME, read_verdicts
from testbed.oracle import ShapesOracle
from tests.configs import tiny_config
from tests.integration.processes import experiment_file
from tests.tiny import save_tiny_clip


@dataclass(frozen=True, kw_only=True)
class Attributes:
    """The oracle's share of a prompt's attributes; the tiny prompts' words are read instead of a reference."""

    name: str = "oracle"

    def __call__(self, media: np.ndarray, prompt: Prompt) -> Mapping[str, float]:
        from testbed.scenes import parse, reference

        scene = Prompt(id=prompt.id, text=prompt.text, reference=reference(parse(prompt.text)))
        found = ShapesOracle()(media, scene)
        return {"oracle": found["oracle"], "light": float(media.mean() / 255)}


def run(config: RunConfig, folder: Path, *words: str) -> tuple[int, Path]:
    status = main(["train", experiment_file(config, folder), *words])
    return status, folder / "runs" / config.name


def entries(run_dir: Path) -> Counter[tuple[str, int, str]]:
    found = read_verdicts(run_dir / FILE_NAME)
    return Counter((e.verdict.scorer, len(e.verdict.members), e.verdict.status) for e in found)


def scored(folder: Path, **changes: Any) -> RunConfig:
    reward = Pointwise(criteria=("oracle", "light"), weights=(1.0, 1.0))
    return tiny_config(folder, **({"judge": None, "scorers": (Attributes(),), "reward": reward} | changes))


def test_a_judge_and_two_scorers_give_one_advantage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = ClipScore(model=save_tiny_clip(tmp_path / "clip"))
    reward = Several(
        names=("judge", "oracle", "clip"),
        rewards=(WinRate(), Pointwise(criteria=("oracle", "light")), Pointwise(criteria=("clip",))),
    )
    config = scored(
        tmp_path,
        steps=2,
        judge=tiny_config(tmp_path).judge,
        scorers=(Attributes(), clip),
        reward=reward,
        advantage=Gdpo(parts=reward.names, weights=(0.5, 0.3, 0.2)),
    )
    status, run_dir = run(config, tmp_path)
    assert status == 0
    for row in read_metrics(run_dir)[1:]:
        assert row["judge/verdicts"] == 12 and row["scorer/verdicts"] == 16  # 6 pairs and 2 × 4 scores of 2 groups
        assert row["judge/parse_rate"] == 1 and row["judge/masked_share"] == 0 and row["advantage/masked_share"] == 0
        assert {"reward/judge/dim_std", "reward/clip_std", "scorer/clip_mean", "advantage/abs_mean"} <= row.keys()
    # Two steps of two groups, and three held-out samples beside the base model's.
    assert entries(run_dir) == {("", 2, "ok"): 24 + 3, ("oracle", 1, "ok"): 16, ("clip", 1, "ok"): 16}
    capsys.readouterr()
    assert main(["status", str(run_dir)]) == 0
    shown = capsys.readouterr().out
    for part in ("step 2 of 2", " · score ", "oracle: alive", "rollout-0: alive", "learner: alive", "step_000002"):
        assert part in shown
    assert main(["verdicts", str(run_dir), "--limit", "30", "--full"]) == 0
    assert "0, by oracle" in capsys.readouterr().out


def test_a_scorer_whose_model_is_not_there_stops_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = scored(tmp_path, scorers=(ClipScore(model="somebody/not-here"),), reward=Pointwise(criteria=("clip",)))
    status, run_dir = run(config, tmp_path)
    message = capsys.readouterr().err
    assert status == 2 and not run_dir.exists()
    assert "error: the CLIP model 'somebody/not-here' cannot be loaded" in message and "Traceback" not in message


def test_a_dry_run_without_a_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(scored(tmp_path), tmp_path, "--dry-run")[0] == 0
    assert "2 prompts × 4 siblings, scores of oracle; 10 training" in capsys.readouterr().out
    assert main(["train", experiment_file(scored(tmp_path), tmp_path), "scorers=()", "--dry-run"]) == 2
    assert "judge is none and scorers is empty" in capsys.readouterr().err
