"""The same run under different judges: what the oracle, whom nobody optimises, says of each on held-out prompts.

Every run is that of `experiments/shapes_image.py`, with real Ray and, but for the oracle's own, real vLLM; only the judge,
or how its verdicts are read, changes. What a finished run measured is kept in ``benchmarks/results/judges`` and not measured again; a run that was
stopped goes on, so the script can be stopped and started as one likes.

    python -m benchmarks.judges                        # everything; hours
    python -m benchmarks.judges --only flex oracle --seeds 0
    python -m benchmarks.judges --table                # what there is so far, and the plot
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import kept
from benchmarks.plots import plot
from grpo_flex.config import RunConfig
from grpo_flex.config_file import load_experiment
from grpo_flex.metrics import step_seconds
from grpo_flex.overrides import override


class Variant(NamedTuple):
    """An experiment and overrides on top of it."""

    experiment: str
    overrides: tuple[str, ...] = ()


VARIANTS: dict[str, Variant] = {
    "flex": Variant("experiments/shapes_image.py"),
    "flex-overall": Variant("experiments/shapes_image.py", ("advantage.alpha=0",)),
    "flex-dimensions": Variant("experiments/shapes_image.py", ("advantage.alpha=1",)),
    "pointwise": Variant("experiments/shapes_image_pointwise.py"),
    "oracle": Variant("experiments/shapes_image_same_oracle.py"),
    "oracle-noisy": Variant("experiments/shapes_image_same_oracle.py", ("judge.server.noise=0.2",)),
}
"""Flex combines the ratings by the dimensions and the overall one, 0.7 to 0.3; the two beside it take one alone.
Pointwise asks the same judge about single pictures, so the rating differs too (see the experiment). The two oracles answer
the questions that the tiny judge is asked; one in five of the noisy one's verdicts is a coin toss."""
SCORE = "heldout/oracle"
BESIDE = ("composition", "exact")
"""Other held-out figures that the table shows, at the end and in the mean."""
RESULTS = Path("benchmarks/results/judges")


# ---------------------------------------------------------------- runs


def run_name(variant: str, seed: int) -> str:
    return f"judges_{variant}_s{seed}"


def configuration(variant: str, overrides: Sequence[str]) -> RunConfig:
    """What all seeds of a variant train."""
    experiment, changes = VARIANTS[variant]
    return override(load_experiment(experiment), [*changes, *overrides])


def command(variant: str, seed: int, runs: Path, overrides: Sequence[str]) -> list[str] | None:
    """The command line that begins or goes on with a run; None where it is finished."""
    start = [sys.executable, "-m", "grpo_flex", "train"]
    folder = runs / run_name(variant, seed)
    if (folder / "config.json").is_file():
        steps = json.loads((folder / "config.json").read_text())["steps"]
        logged = points(folder / "metrics.jsonl")
        return None if logged and logged[-1]["step"] >= steps else [*start, "--resume", str(folder)]
    experiment, changes = VARIANTS[variant]
    return [*start, experiment, f"name={folder.name}", f"runs_dir={runs}", f"seed={seed}", *changes, *overrides]


def points(metrics: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics; none where there is no file yet."""
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []


def measured(variant: str, seed: int, folder: Path, recipe: str) -> dict[str, Any]:
    """What is kept of a finished run: the figures of its held-out samples, and how long its steps took."""
    logged = points(folder / "metrics.jsonl")
    figures = [{k: v for k, v in p.items() if k == "step" or k.startswith("heldout/")} for p in logged if SCORE in p]
    seconds = [s for p in logged if (s := step_seconds(p)) is not None]
    return {
        "variant": variant,
        "seed": seed,
        "recipe": recipe,
        "step_seconds": float(np.median(seconds)) if seconds else None,
        "curve": figures,
    }


def run_all(variants: Sequence[str], seeds: Sequence[int], runs: Path, out: Path, overrides: Sequence[str]) -> None:
    """What is not measured yet; seeds outermost, so that a table fills evenly."""
    for seed in seeds:
        for variant in variants:
            path, recipe = out / f"{variant}-s{seed}.json", kept.digest(configuration(variant, overrides))
            if kept.same(path, recipe, "recipe"):
                continue
            words = command(variant, seed, runs, overrides)
            _check_same(runs / run_name(variant, seed), recipe)
            if words is not None:
                subprocess.run(words, check=True)
            kept.write(path, measured(variant, seed, runs / run_name(variant, seed), recipe))


def _check_same(folder: Path, recipe: str) -> None:
    """Raises ValueError where a run that is there already was begun with another configuration, or another judge's weights."""
    begun = folder.with_name(f"{folder.name}.recipe")
    if not folder.exists():
        begun.parent.mkdir(parents=True, exist_ok=True)
        begun.write_text(recipe)
    elif not begun.is_file() or begun.read_text() != recipe:
        raise ValueError(f"{folder} is of another configuration or judge: move it away, or give another --runs")


# ---------------------------------------------------------------- table and plot


def curves(out: Path) -> dict[str, list[list[tuple[int, float]]]]:
    """(step, held-out score) of every run that was measured, by variant."""
    found: dict[str, list[list[tuple[int, float]]]] = {}
    for result in kept.read(out):
        found.setdefault(result["variant"], []).append([(p["step"], p[SCORE]) for p in result["curve"]])
    return {variant: found[variant] for variant in VARIANTS if variant in found}


def at_the_end(out: Path) -> dict[str, dict[str, float]]:
    """The other figures after the last step, in the mean over the seeds, by variant."""
    ends: dict[str, list[Mapping[str, float]]] = {}
    for result in kept.read(out):
        ends.setdefault(result["variant"], []).append(result["curve"][-1])
    return {
        variant: {name: float(np.mean([end.get(f"heldout/{name}", np.nan) for end in some])) for name in BESIDE}
        for variant, some in ends.items()
    }


def table(found: Mapping[str, Sequence[Sequence[tuple[int, float]]]], beside: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: the held-out score of every seed, before and after, the mean gain and what else is shown; best first."""
    rows = []
    for variant, runs in found.items():
        ends = ", ".join(f"{run[0][1]:.3f} → {run[-1][1]:.3f}" for run in runs)
        gains = [run[-1][1] - run[0][1] for run in runs]
        steps = sorted({run[-1][0] for run in runs})
        last = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]}–{steps[-1]}"
        others = " | ".join(f"{beside[variant][name]:.3f}" for name in BESIDE)
        row = f"| {variant} | {last} | {ends} | {np.mean(gains):+.3f} | {min(gains):+.3f} | {others} |"
        rows.append((float(np.mean(gains)), row))
    head = f"| judge | steps | held-out oracle, each seed | mean gain | least | {' | '.join(BESIDE)} |"
    return "\n".join([head, "|---" * (5 + len(BESIDE)) + "|", *(row for _, row in sorted(rows, reverse=True))])


# ---------------------------------------------------------------- command line


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.judges", description=(__doc__ or "").split("\n")[0])
    made.add_argument("--runs", type=Path, default=Path("runs"), help="where the runs themselves lie")
    made.add_argument("--out", type=Path, default=RESULTS, help="where what they measured is kept")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--only", nargs="+", choices=sorted(VARIANTS), default=list(VARIANTS))
    made.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="an override for every new run")
    made.add_argument("--table", action="store_true", help="run nothing")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.table:
        run_all(options.only, options.seeds, options.runs, options.out, options.set)
    found = curves(options.out)
    if not found:
        raise SystemExit(f"{options.out} holds nothing of this comparison yet")
    print(table(found, at_the_end(options.out)))
    plot({"the same run under different judges": found}, options.out / "judges.png", "training step")
    print(f"plot: {options.out / 'judges.png'}")


if __name__ == "__main__":
    main()
