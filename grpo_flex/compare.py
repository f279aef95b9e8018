"""Runs side by side: a table, their held-out curves in one chart, and what each makes of the same prompts."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_flex import pictures
from grpo_flex.metrics import Row, check_run, curve, headline_key, keys_of, read_metrics, read_settings, step_seconds
from grpo_flex.report import flatten
from grpo_flex.terminal import duration
from grpo_flex.types import Sample

if TYPE_CHECKING:
    from PIL.Image import Image

COLORS = ("#2a78d6", "#eb6834", "#1baf7a", "#eda100", "#e87ba4", "#008300", "#4a3aa7", "#e34948")
"""One for each run; more runs than colours are refused, for nobody could tell their curves apart."""
PROMPTS_SHOWN = 8
WHERE = ("name", "runs_dir")
"""Configuration fields in which runs differ without being different experiments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    label: str
    rows: list[Row]
    config: dict[str, str]
    """Dotted field names and values."""
    before: list[Sample]
    after: list[Sample]


def compare(run_dirs: Sequence[str | Path], picture: str | Path = "comparison.png") -> str:
    """Tables of results and of configuration differences; the picture's path is the last line.

    Args:
        run_dirs: Run directories, 1 to 8. Runs may be unfinished.
        picture: Where to write the held-out curves and the grid of final samples (PNG; clips play in an mp4 beside it).

    Raises:
        ValueError: a directory that is no run, or more runs than can be told apart.
    """
    if not 1 <= len(run_dirs) <= len(COLORS):
        raise ValueError(f"compare takes 1 to {len(COLORS)} runs, not {len(run_dirs)}")
    runs = _load_all(run_dirs)
    key = _shared_headline(runs)
    text = _results(runs, key) + _differences(runs)
    drawn = _draw(runs, key)
    if drawn is None:
        return text + "No picture: no run has a held-out score or samples yet.\n"
    picture = Path(picture)
    picture.parent.mkdir(parents=True, exist_ok=True)
    pictures.save_png(drawn, picture)
    film = _film(runs, picture.with_suffix(".mp4"))
    return f"{text}{f'Clips: {film}{chr(10)}' if film else ''}Curves and samples: {picture}\n"


def _load_all(run_dirs: Sequence[str | Path]) -> list[_Run]:
    paths = [check_run(path) for path in run_dirs]
    names = [path.resolve().name for path in paths]
    unique = len(set(names)) == len(names)
    return [_load(path, name if unique else str(path)) for path, name in zip(paths, names, strict=True)]


def _load(path: Path, label: str) -> _Run:
    samples = path / "samples"
    return _Run(
        label=label,
        rows=read_metrics(path),
        config=dict(flatten(read_settings(path))),
        before=pictures.load_set(samples, "before"),
        after=pictures.load_set(samples, "after"),
    )


def _shared_headline(runs: Sequence[_Run]) -> str | None:
    """The held-out score by which the runs are compared: one that as many of them as possible have."""
    having = {key: 0 for run in runs for key in keys_of(run.rows, "heldout/")}
    for run in runs:
        for key in keys_of(run.rows, "heldout/"):
            having[key] += 1
    common = [key for key, count in having.items() if count == max(having.values())]
    return headline_key([dict.fromkeys(common, 0.0)])


# ---------------------------------------------------------------- tables


def _results(runs: Sequence[_Run], key: str | None) -> str:
    name = (key or "held-out").replace("heldout/", "held-out ")
    columns = ["run", f"{name}: first", "last", "change", "best", "at step"]
    columns += ["steps", "time in steps", "s/step", "reward, last"]
    return _table("", columns, [_result(run, key) for run in runs])


def _result(run: _Run, key: str | None) -> list[str]:
    steps, values = curve(run.rows, key) if key else ([], [])
    score = ["-"] * 5
    if values:
        best = max(values)
        change = f"{values[-1] - values[0]:+.3f}" if len(values) > 1 else "-"
        score = [
            f"{values[0]:.3f}",
            f"{values[-1]:.3f}",
            change,
            f"{best:.3f}",
            str(steps[values.index(best)]),
        ]
    seconds = [s for row in run.rows if (s := step_seconds(row)) is not None]
    time = [duration(sum(seconds)), f"{sum(seconds) / len(seconds):.1f}"] if seconds else ["-", "-"]
    _, rewards = curve(run.rows, "reward/mean")
    done = str(run.rows[-1]["step"]) if run.rows else "0"
    return [run.label, *score, done, *time, f"{rewards[-1]:.3f}" if rewards else "-"]


def _differences(runs: Sequence[_Run]) -> str:
    names = dict.fromkeys(name for run in runs for name in run.config if name not in WHERE)
    rows = [[name, *(run.config.get(name, "-") for run in runs)] for name in names]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    if not rows:
        return "The configurations are the same.\n" if len(runs) > 1 else ""
    return _table("Configurations differ in", ["field", *(run.label for run in runs)], rows)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    from rich import box
    from rich.console import Console as Terminal
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold")
    for k, column in enumerate(columns):
        table.add_column(escape(column), justify="right" if k and not title else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    out = io.StringIO()
    Terminal(file=out, width=150).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


# ---------------------------------------------------------------- the picture


def _draw(runs: Sequence[_Run], key: str | None) -> Image | None:
    parts = [part for part in (_curves(runs, key), _grid(runs)) if part is not None]
    if not parts:
        return None
    from PIL import Image

    sheet = Image.new("RGB", (max(p.width for p in parts), sum(p.height for p in parts)), "white")
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    return sheet


def _curves(runs: Sequence[_Run], key: str | None) -> Image | None:
    """The runs' held-out curves."""
    if key is None:
        return None
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    from PIL import Image

    figure = Figure(figsize=(9.6, 4.2), dpi=110, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    for run, color in zip(runs, COLORS, strict=False):
        steps, values = curve(run.rows, key)
        axes.plot(steps, values, color=color, linewidth=2, marker="o", markersize=4, label=run.label)
    axes.set_title(key.replace("heldout/", "held-out "), loc="left", fontweight="bold")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color="#e3e2dc")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.margins(x=0.02)
    axes.legend(frameon=False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _grid(runs: Sequence[_Run]) -> Image | None:
    cells = _cells(runs, None)
    return pictures.draw_grid(cells, "The same prompts", pictures.WIDEST) if cells else None


def _film(runs: Sequence[_Run], path: Path) -> Path | None:
    """The same prompts as clips that play side by side; None where there are only pictures."""
    frames = max((len(sample.media) for run in runs for sample in (*run.before, *run.after)), default=1)
    if frames == 1 or not _cells(runs, 0):
        return None
    sheets = (pictures.draw_grid(_cells(runs, k), "The same prompts", pictures.WIDEST) for k in range(frames))
    pictures.write_mp4(path, list(sheets), float(runs[0].config.get("generator.fps", pictures.FPS)))
    return path


def _cells(runs: Sequence[_Run], frame: int | None) -> list[pictures.Cell]:
    """For each prompt that every run with samples has: the base model's picture, then each run's."""
    drawn = [run for run in runs if run.after or run.before]
    if not drawn:
        return []
    by_run = [_by_prompt(run.after or run.before) for run in drawn]
    base = _by_prompt(drawn[0].before)
    ids = [prompt for prompt in by_run[0] if all(prompt in found for found in by_run)][:PROMPTS_SHOWN]
    return [_cell(drawn, [found[prompt] for found in by_run], base.get(prompt), frame) for prompt in ids]


def _by_prompt(samples: Sequence[Sample]) -> Mapping[str, Sample]:
    found: dict[str, Sample] = {}
    for sample in samples:
        found.setdefault(sample.prompt.id, sample)  # of several samples of one prompt, the first
    return found


def _cell(runs: Sequence[_Run], samples: Sequence[Sample], base: Sample | None, frame: int | None) -> pictures.Cell:
    """``frame`` of every clip, or their strips one above the other when that is None."""
    given = [("before", base), *((run.label, s) for run, s in zip(runs, samples, strict=True))]
    named: list[tuple[str, Any]] = [(label, sample) for label, sample in given if sample is not None]
    score = "  ·  ".join(_score(sample) for _, sample in named)
    shown = [pictures.shown(sample, frame) for _, sample in named]
    rows = shown if max(map(len, shown)) > 1 else [[picture for row in shown for picture in row]]
    return pictures.Cell(rows=rows, labels=[label for label, _ in named], text=samples[0].prompt.text, score=score)


def _score(sample: Sample) -> str:
    name = pictures.main_score(sample.scores)
    return "-" if name is None else f"{sample.scores[name]:.2f}"
