"""The two main jobs with the repository's own models, cut down to one step each, and the judges that they learn from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest

from experiments import shapes_image, shapes_video
from grpo_flex.__main__ import main
from grpo_flex.config import RunConfig
from grpo_flex.config_file import load_experiment
from grpo_flex.metrics import read_metrics
from grpo_flex.verdicts import FILE_NAME, read_verdicts
from reward_server.asking import Endpoint
from reward_server.families.base import ChatFamily
from reward_server.machine import gpu_build
from reward_server.serve import RunningJudge, VllmJudge
from testbed import judge_data, measure_judge, video_judge_data
from testbed.judge_data import SIBLINGS
from tests.configs import judge_of

HELDOUT = 4
CUT_DOWN = (
    "steps=1",
    "prompts.per_step=2",
    "sampling.group_size=4",
    "optimizer.updates_per_rollout=2",
    f"evaluation.versus_base={HELDOUT}",
)
PYTHON = Path(".venv-judge/bin/python")
QUESTIONS = 2 * 3
"""Half of the six pairs of each group."""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON.exists() or gpu_build(str(PYTHON)),
        reason="needs the judge's environment for CPUs: make setup-judge JUDGE=cpu",
    ),
]


def served(config: RunConfig, log_dir: Path) -> RunningJudge:
    """A recipe's judge, as the recipe serves it."""
    server = judge_of(config).server
    assert isinstance(server, VllmJudge)
    return replace(server, device="cpu", ray_address="none", start_s=400.0).start(log_dir)


@pytest.fixture(scope="module")
def clip_judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningJudge]:
    with served(shapes_video.config(), tmp_path_factory.mktemp("clip_judge")) as running:
        yield running


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


def test_a_tiny_flux_learns_from_the_tiny_judge_that_the_run_starts_in_vllm(tmp_path: Path) -> None:
    """As `make` starts it."""
    run_dir, (before, after) = train("shapes_image", tmp_path, "judge.server.device=cpu", "judge.server.start_s=400")
    assert after["judge/verdicts"] == QUESTIONS and after["judge/parse_rate"] == 1 and after["judge/masked_share"] == 0
    assert 0 < before["heldout/oracle"] < 1 and 0 < after["heldout/oracle"] < 1 and 0 <= after["heldout/win_rate"] <= 1
    assert after["policy/grad_norm"] > 0
    asked = [*read_verdicts(run_dir / FILE_NAME)]
    assert len(asked) == QUESTIONS + HELDOUT and {entry.verdict.status for entry in asked} == {"ok"}
    assert all(entry.verdict.dimensions.keys() >= {"alignment", "quality", "aesthetics"} for entry in asked)
    assert (run_dir / "judge_0.log").stat().st_size > 0


def test_a_tiny_wan_learns_and_its_clips_are_shown(clip_judge: RunningJudge, tmp_path: Path) -> None:
    """From a judge that is there already, because its start is what takes the time."""
    endpoints = json.dumps(clip_judge.endpoints)
    run_dir, (before, after) = train("shapes_video", tmp_path, "judge.server=None", f"judge.endpoints={endpoints}")
    assert after["judge/verdicts"] == QUESTIONS and after["judge/parse_rate"] == 1 and after["judge/masked_share"] == 0
    for row in (before, after):
        assert {"heldout/oracle", "heldout/exact"} <= row.keys()
    assert after["policy/grad_norm"] > 0
    clips = sorted((run_dir / "samples").glob("*.mp4"))
    assert clips and all(iio.imread(clip).shape[0] >= 9 for clip in clips)
    assert "<video" in (run_dir / "report.html").read_text()
    assert json.loads((run_dir / "config.json").read_text())["steps"] == 1


def clearly_right(config: RunConfig, data: Any, bank: type[judge_data.MediaBank[Any]], running: RunningJudge) -> float:
    """The share of right verdicts where the oracle's margin is clear, on renders for held-out prompts; all are read."""
    judge = judge_of(config)
    assert isinstance(judge.family, ChatFamily)
    texts = data.heldout_texts()[:8]
    drawn = data.draw_renders(
        np.random.default_rng(measure_judge.SEED), [text for text in texts for _ in range(SIBLINGS)]
    )
    images = drawn.reshape(len(texts), SIBLINGS, *drawn.shape[1:])
    pairs = measure_judge.all_pairs(bank(texts=texts, images=images))[:40]
    endpoint = Endpoint(url=running.endpoints[0], max_tokens=judge.max_tokens, concurrency=judge.concurrency)
    found = measure_judge.summary(measure_judge.ask(endpoint, judge.family, pairs))
    assert (found["pairs"], found["parsed"]) == (40, 1.0) and found["clear_pairs"] >= 25
    return found["accuracy_clear"]


def test_the_tiny_judge_of_clips_is_mostly_right(clip_judge: RunningJudge) -> None:
    """Its card has .858."""
    assert clearly_right(shapes_video.config(), video_judge_data, video_judge_data.ClipBank, clip_judge) >= 0.75


def test_the_tiny_judge_of_pictures_is_mostly_right(tmp_path: Path) -> None:
    """Its card has .913."""
    with served(shapes_image.config(), tmp_path) as running:
        assert clearly_right(shapes_image.config(), judge_data, judge_data.Bank, running) >= 0.8
