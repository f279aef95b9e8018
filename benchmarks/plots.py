"""The plot of a comparison: held-out scores of several runs of each contestant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = Sequence[tuple[float, float]]
"""(steps or seconds, score), in order."""
Curves = Mapping[str, Sequence[Curve]]
"""Contestant -> its runs."""
LINES = ("-", "--", ":", "-.")
COLOURS = 10
POINTS = 60


def plot(panels: Mapping[str, Curves], path: Path, xlabel: str) -> None:
    """One panel beside the other, by title, on the same scales.

    Of each contestant the mean over its runs, as far as all of them have come, and their range; how many in brackets.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (max(9, 6 * len(panels)), 5.5)
    figure, row = plt.subplots(
        1, len(panels), figsize=size, layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    for axes, (title, curves) in zip(row[0], panels.items(), strict=True):
        _panel(axes, curves)
        axes.set(xlabel=xlabel, title=title)
    row[0][0].set_ylabel("held-out oracle score")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _panel(axes: Axes, curves: Curves) -> None:
    for k, (name, runs) in enumerate(curves.items()):
        grid = np.linspace(0, min(run[-1][0] for run in runs), POINTS)
        scores = [np.interp(grid, [at for at, _ in run], [score for _, score in run]) for run in runs]
        colour, line = f"C{k % COLOURS}", LINES[k // COLOURS % len(LINES)]
        axes.plot(grid, np.mean(scores, axis=0), label=f"{name} ({len(runs)})", color=colour, linestyle=line)
        axes.fill_between(grid, np.min(scores, axis=0), np.max(scores, axis=0), color=colour, alpha=0.12)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="upper left")
