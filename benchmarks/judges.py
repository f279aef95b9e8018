"""The same run under different judges: what the oracle, whom nobody optimises, says of each on held-out prompts.

Every run is that of `experiments/shapes_image.py`, with real Ray and, but for the oracle's own, real vLLM; only the judge,
or how its verdicts are read, changes. A run that is finished is not run again, and one that was stopped goes on, so the
script can be stopped and started as one likes.

    python -m benchmarks.judges --seeds 0 1 2          # everything; hours
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

from benchmarks.plots import plot


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


def run_name(variant: str, seed: int) -> str:
    return f"judges_{variant}_s{seed}"


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


def curves(runs: Path) -> dict[str, list[list[tuple[int, float]]]]:
    """(step, held-out score) of every run that there is, by variant."""
    found: dict[str, list[list[tuple[int, float]]]] = {}
    for variant in VARIANTS:
        for folder in sorted(runs.glob(run_name(variant, 0)[:-1] + "*")):
            scored = [(p["step"], p[SCORE]) for p in points(folder / "metrics.jsonl") if SCORE in p]
            if len(scored) > 1:
                found.setdefault(variant, []).append(scored)
    return found


def table(found: Mapping[str, Sequence[Sequence[tuple[int, float]]]]) -> str:
    """Markdown: the held-out score of every seed, before and after, and the mean gain; best first."""
    rows = []
    for variant, runs in found.items():
        ends = ", ".join(f"{run[0][1]:.3f} → {run[-1][1]:.3f}" for run in runs)
        gains = [run[-1][1] - run[0][1] for run in runs]
        steps = sorted({run[-1][0] for run in runs})
        last = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]}–{steps[-1]}"
        rows.append(
            (float(np.mean(gains)), f"| {variant} | {last} | {ends} | {np.mean(gains):+.3f} | {min(gains):+.3f} |")
        )
    head = "| judge | steps | held-out oracle, each seed | mean gain | least |"
    return "\n".join([head, "|---" * 5 + "|", *(row for _, row in sorted(rows, reverse=True))])


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.judges", description=(__doc__ or "").split("\n")[0])
    made.add_argument("--runs", type=Path, default=Path("runs"))
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--only", nargs="+", choices=sorted(VARIANTS), default=list(VARIANTS))
    made.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="an override for every new run")
    made.add_argument("--table", action="store_true", help="run nothing")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if not options.table:
        for seed in options.seeds:  # outermost, so that a table fills evenly
            for variant in options.only:
                words = command(variant, seed, options.runs, options.set)
                if words is not None:
                    subprocess.run(words, check=True)
    found = curves(options.runs)
    if not found:
        raise SystemExit(f"{options.runs} holds no run of this comparison yet")
    print(table(found))
    plot(found, options.runs / "judges.png", "training step")
    print(f"plot: {options.runs / 'judges.png'}")


if __name__ == "__main__":
    main()
