"""Runs made of nothing but files, for the tests of everything that shows a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from grpo_flex.config import Wandb
from grpo_flex.config_file import to_json
from grpo_flex.metrics import RunLog
from grpo_flex.types import Prompt, Sample


@dataclass(frozen=True)
class Pencil:
    """Stands in for a generator."""

    path: str = "models/<pencil>"


def scorer(media: np.ndarray, prompt: Prompt) -> dict[str, float]:
    return {"oracle": 0.5}


@dataclass(frozen=True)
class StandInEvaluation:
    every: int = 5
    grid: int = 4


@dataclass(frozen=True)
class StandInOptimizer:
    lr: float = 1e-3


@dataclass(frozen=True)
class StandInConfig:
    """The fields of a RunConfig that showing a run needs."""

    name: str = "shapes"
    steps: int = 20
    generator: Pencil = Pencil()
    optimizer: StandInOptimizer = StandInOptimizer()
    evaluation: StandInEvaluation = StandInEvaluation()
    wandb: Wandb = field(default_factory=lambda: Wandb(mode="disabled"))


def sample(k: int, score: float, frames: int = 1, size: int = 64) -> Sample:
    """A disc (of another colour for every k) that moves to the right; ``score`` makes it rounder."""
    y, x = np.mgrid[:size, :size] / size
    palette = np.array([[214, 60, 50], [52, 110, 200], [40, 150, 90], [230, 170, 30]])
    pictures = []
    for frame in range(frames):
        cx = 0.35 + 0.3 * frame / max(frames - 1, 1)
        wobble = 0.09 * (1 - score) * np.sin(5 * np.arctan2(y - 0.5, x - cx) + k)
        inside = np.hypot(x - cx, y - 0.5) < 0.24 + wobble
        pictures.append(np.where(inside[..., None], palette[k % 4], 245))
    names = ["red", "blue", "green", "yellow"]
    text = f"a {names[k % 4]} circle left of a small <white> square, on a light background"
    scores = {"exact": float(score > 0.8), "oracle": score}
    return Sample(prompt=Prompt(id=f"held/{k}", text=text), media=np.stack(pictures).astype(np.uint8), scores=scores)


def numbers(step: int, steps: int = 20) -> dict[str, float]:
    """One step's metrics, rising a little."""
    done = step / steps
    noise = math.sin(step * 12.9898) * 0.04
    return {
        "reward/mean": 0.5 + noise,
        "judge/consistency": 0.8 + 0.1 * done + noise,
        "judge/unparsed": max(0.0, 0.05 - 0.04 * done),
        "policy/grad_norm": 0.3 + 4 * noise * noise,
        "policy/kl": 1e-3 * step,
        "advantage/zero_std": 0.1,
        "perf/rollout_s": 2.0 + noise,
        "perf/judge_s": 1.0 + noise,
        "perf/update_s": 0.6,
        "perf/step_s": 3.4 + noise,
    }


def make_run(root: Path, config: Any = None, upto: int | None = None, frames: int = 1, gain: float = 0.3) -> Path:
    """A run's directory as training leaves it after ``upto`` steps (all, if None)."""
    config = StandInConfig() if config is None else config
    run_dir = root / config.name
    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_text(to_json(config))
    last = config.steps if upto is None else upto
    with RunLog(run_dir, config) as log:
        for step in range(last + 1):
            row = numbers(step, config.steps) if step else {}
            if step % config.evaluation.every == 0 or step == last:
                score = 0.5 + gain * step / config.steps
                row |= {
                    "heldout/oracle": score,
                    "heldout/exact": score / 2,
                    "heldout/motion_px": 1 + 3 * score,
                }
                samples = [sample(k, min(1.0, score + 0.07 * k), frames) for k in range(4)]
                log.samples(step, samples)
            log.log(step, row)
    return run_dir
