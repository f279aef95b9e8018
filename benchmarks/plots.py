"""The plot of a comparison: held-out scores of several runs of each contestant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

Curve = Sequence[tuple[float, float]]
"""(steps or seconds, score), in order."""
LINES = ("-", "--", ":", "-.")
COLOURS = 10
POINTS = 60


def plot(curves: Mapping[str, Sequence[Curve]], path: Path, xlabel: str) -> None:
    """Each contestant's mean over its runs, as far as all of them have come, and their range; how many in brackets."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for k, (name, runs) in enumerate(curves.items()):
        grid = np.linspace(0, min(run[-1][0] for run in runs), POINTS)
        scores = [np.interp(grid, [at for at, _ in run], [score for _, score in run]) for run in runs]
        colour, line = f"C{k % COLOURS}", LINES[k // COLOURS % len(LINES)]
        axes.plot(grid, np.mean(scores, axis=0), label=f"{name} ({len(runs)})", color=colour, linestyle=line)
        axes.fill_between(grid, np.min(scores, axis=0), np.max(scores, axis=0), color=colour, alpha=0.12)
    axes.set(xlabel=xlabel, ylabel="held-out oracle score")
    axes.legend(fontsize=8, ncols=1 + len(curves) // 8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
