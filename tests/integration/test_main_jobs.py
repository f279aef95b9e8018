"""The two main jobs as `make` starts them, with the repository's own models, cut down to one step each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import pytest

from grpo_flex.__main__ import main
from grpo_flex.config_file import load_experiment
from grpo_flex.metrics import read_metrics
from grpo_flex.verdicts import FILE_NAME, read_verdicts

HELDOUT = 4
CUT_DOWN = (
    "steps=1",
    "prompts.per_step=2",
    "sampling.group_size=4",
    "optimizer.updates_per_rollout=2",
    f"evaluation.versus_base={HELDOUT}",
)
JUDGE = ("judge.server.device=cpu", "judge.server.start_s=400")
QUESTIONS = 2 * 3
"""Half of the six pairs of each group."""
pytestmark = pytest.mark.slow
with_vllm = pytest.mark.skipif(
    not Path(".venv-judge/bin/python").exists(), reason="needs the judge's environment: make setup-judge"
)


def train(recipe: str, folder: Path, *words: str) -> tuple[Path, list[dict[str, Any]]]:
    """Runs the recipe's one step on four held-out prompts; the run's directory and its metrics."""
    experiment, heldout = f"experiments/{recipe}.py", folder / "heldout.jsonl"
    prompts = Path(load_experiment(experiment).prompts.heldout).read_text().splitlines()[:HELDOUT]
    heldout.write_text("\n".join(prompts) + "\n")
    assert (
        main(["train", experiment, f"runs_dir={folder}", "name=cut", f"prompts.heldout={heldout}", *CUT_DOWN, *words])
        == 0
    )
    return folder / "cut", [dict(row) for row in read_metrics(folder / "cut")]


@with_vllm
def test_a_tiny_flux_learns_from_the_tiny_judge_that_the_run_starts_in_vllm(tmp_path: Path) -> None:
    run_dir, (before, after) = train("shapes_image", tmp_path, *JUDGE)
    assert after["judge/verdicts"] == QUESTIONS and after["judge/parse_rate"] == 1 and after["judge/masked_share"] == 0
    assert 0 < before["heldout/oracle"] < 1 and 0 < after["heldout/oracle"] < 1 and 0 <= after["heldout/win_rate"] <= 1
    assert after["policy/grad_norm"] > 0
    asked = [*read_verdicts(run_dir / FILE_NAME)]
    assert len(asked) == QUESTIONS + HELDOUT and {entry.verdict.status for entry in asked} == {"ok"}
    assert all(entry.verdict.dimensions.keys() >= {"alignment", "quality", "aesthetics"} for entry in asked)
    assert (run_dir / "judge_0.log").stat().st_size > 0


@pytest.mark.parametrize(
    ("recipe", "words", "questions"),
    (pytest.param("shapes_video", JUDGE, QUESTIONS, marks=with_vllm), ("shapes_video_oracle", (), 2 * QUESTIONS)),
    ids=("judge", "oracle"),
)
def test_a_tiny_wan_learns_and_its_clips_are_shown(
    recipe: str, words: tuple[str, ...], questions: int, tmp_path: Path
) -> None:
    run_dir, (before, after) = train(recipe, tmp_path, *words)
    assert after["judge/verdicts"] == questions and after["judge/parse_rate"] == 1 and after["judge/masked_share"] == 0
    for row in (before, after):
        assert {"heldout/oracle", "heldout/exact"} <= row.keys()
    assert after["policy/grad_norm"] > 0
    clips = sorted((run_dir / "samples").glob("*.mp4"))
    assert clips and all(iio.imread(clip).shape[0] >= 9 for clip in clips)
    assert "<video" in (run_dir / "report.html").read_text()
    assert json.loads((run_dir / "config.json").read_text())["steps"] == 1
