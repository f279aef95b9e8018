"""A run as one HTML page: drawn from the run's directory alone, at any time, with nothing to fetch."""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_flex import pictures
from grpo_flex.metrics import (
    Row,
    check_run,
    curve,
    headline_key,
    keys_of,
    phase_seconds,
    read_metrics,
    read_settings,
    step_seconds,
)
from grpo_flex.terminal import duration
from grpo_flex.types import Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REPORT = "report.html"
SERIES = 8
"""Curves that one chart can carry; each has its own colour in both themes (--s1 ... --s8)."""
SMOOTH_FROM = 24
"""Points from which a curve is drawn faint, with its moving average over it."""

SECTIONS = ("reward/", "judge/", "scorer/", "advantage/", "policy/")
"""Metric sections with a small chart for every figure, in this order."""


def write_report(run_dir: str | Path) -> Path:
    """Write ``run_dir``/report.html from config.json, metrics.jsonl and samples/; return its path.

    The page holds its pictures and clips itself and follows the reader's light or dark theme. It can be
    written while the run goes on, and again later.

    Raises:
        ValueError: ``run_dir`` is no run's directory, or its metrics are damaged.
    """
    run_dir = check_run(run_dir)
    rows = read_metrics(run_dir)
    config = read_settings(run_dir)
    body = [
        _headline(run_dir.name, config, rows),
        _samples(run_dir / "samples"),
        _heldout(rows),
        _training(rows),
        _timing(rows),
        _last_metrics(rows),
        _configuration(config),
    ]
    path = run_dir / REPORT
    half = path.with_name(f".{REPORT}.part")
    half.write_text(_page(run_dir.name, "\n".join(filter(None, body))), encoding="utf-8")
    os.replace(half, path)
    return path


# ---------------------------------------------------------------- headline


def _headline(name: str, config: Mapping[str, Any], rows: Sequence[Row]) -> str:
    key = headline_key(rows)
    total = config.get("steps")
    done = int(rows[-1]["step"] or 0) if rows else 0
    goes_on = total is not None and done < total
    state = f"step {done} of {total}, not finished" if goes_on else f"{done} steps"
    parts = [f"<header><p class=kicker>GRPO-Flex · {escape(state)}</p><h1>{escape(name)}</h1>"]
    parts.append(_hero(rows, key) if key else "<p class=remark>No held-out evaluation yet.</p>")
    parts.append(f"<dl class=tiles>{''.join(_tile(*t) for t in _tiles(config, rows, key))}</dl></header>")
    return "".join(parts)


def _hero(rows: Sequence[Row], key: str) -> str:
    _, values = curve(rows, key)
    label = f"<p class=lead>Held-out {escape(key.removeprefix('heldout/'))} score"
    if len(values) < 2:
        return f"{label}, before training</p><p class=hero><b>{values[0]:.3f}</b></p>" if values else ""
    change = values[-1] - values[0]
    tone = "up" if change > 0 else "down" if change < 0 else ""
    return (
        f"{label}, before → after</p><p class=hero><span>{values[0]:.3f}</span><i>→</i><b>{values[-1]:.3f}</b>"
        f"<em class='{tone}'>{change:+.3f}</em></p>"
    )


def _tiles(config: Mapping[str, Any], rows: Sequence[Row], headline: str | None) -> Iterable[tuple[str, str]]:
    for key in keys_of(rows, "heldout/"):
        _, values = curve(rows, key)
        if key != headline and values:
            shown = " → ".join(f"{v:.3g}" for v in values[:: max(1, len(values) - 1)])
            yield f"held-out {key.removeprefix('heldout/')}", shown
    seconds = [s for row in rows if (s := step_seconds(row)) is not None]
    if seconds:
        yield "time in steps", duration(sum(seconds))
        yield "a step takes", f"{_median(seconds):.1f} s"
    generator = config.get("generator")
    if isinstance(generator, Mapping):
        yield "generator", _short_type(generator)
    objective = config.get("objective")
    if isinstance(objective, Mapping):
        yield "objective", _short_type(objective)


def _tile(label: str, value: str) -> str:
    return f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>"


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


# ---------------------------------------------------------------- samples


def _samples(folder: Path) -> str:
    before, after = pictures.load_set(folder, "before"), pictures.load_set(folder, "after")
    pairs = pictures.match(before, after)
    if not before:
        return ""
    title = "Before and after" if pairs else "Samples before training"
    remark = "The same held-out prompt and the same initial noise" if pairs else "Held-out prompts"
    film = folder / "before_after.mp4"
    if pairs and film.is_file() and len(pairs[0][1].media) > 1:
        body = _film(film, folder / "before_after.png")
    else:
        cards = [_pair_card(a, b) for a, b in pairs] or [_card(s) for s in before]
        body = f"<div class='cards {'pairs' if pairs else ''}'>{''.join(cards)}</div>"
    return _section(title, body, f"{remark}; the score stands below.")


def _film(film: Path, strip: Path) -> str:
    source = f"data:video/mp4;base64,{base64.b64encode(film.read_bytes()).decode()}"
    out = f"<video src='{source}' autoplay loop muted playsinline controls></video>"
    if strip.is_file():
        data = base64.b64encode(strip.read_bytes()).decode()
        out += "<details><summary>Frame by frame</summary>"
        out += f"<img class=sheet alt='frames of every clip' src='data:image/png;base64,{data}'></details>"
    return out


def _pair_card(before: Sample, after: Sample) -> str:
    cell = pictures.pair_cell(before, after)
    change = _change(before, after)
    tone = "up" if change > 0 else "down" if change < 0 else ""
    images = "".join(
        f"<span>{_image(s)}<small>{label}</small></span>" for label, s in (("before", before), ("after", after))
    )
    return _figure(images, after.prompt.text, cell.score, tone)


def _change(before: Sample, after: Sample) -> float:
    name = pictures.main_score(after.scores)
    return 0.0 if name is None else after.scores[name] - before.scores.get(name, math.nan)


def _card(sample: Sample) -> str:
    return _figure(f"<span>{_image(sample)}</span>", sample.prompt.text, pictures.score_text(sample), "")


def _figure(images: str, text: str, score: str, tone: str) -> str:
    caption = f"{escape(text)}<b class='{tone}'>{escape(score)}</b>"
    return f"<figure><div>{images}</div><figcaption>{caption}</figcaption></figure>"


def _image(sample: Sample) -> str:
    """The middle frame; small pictures travel as they are and are enlarged by the page."""
    from PIL import Image

    image = Image.fromarray(sample.media[len(sample.media) // 2])
    image.thumbnail((pictures.LARGEST, pictures.LARGEST))
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    return f"<img alt='' src='data:image/png;base64,{data}'>"


# ---------------------------------------------------------------- charts


@dataclass(frozen=True, slots=True, kw_only=True)
class _Curve:
    label: str
    steps: list[int]
    values: list[float]


def _curves(rows: Sequence[Row], keys: Iterable[str], prefix: str) -> list[_Curve]:
    made = (_Curve(label=key.removeprefix(prefix), steps=s, values=v) for key in keys for s, v in [curve(rows, key)])
    return [c for c in made if c.values]


def _heldout(rows: Sequence[Row]) -> str:
    """Scores between 0 and 1 share one chart; figures of another unit have their own."""
    first = headline_key(rows)
    keys = sorted(keys_of(rows, "heldout/"), key=lambda key: key != first)
    curves = _curves(rows, keys, "heldout/")
    shares = [c for c in curves if min(c.values) >= 0 and max(c.values) <= 1][:SERIES]
    others = [c for c in curves if c not in shares]
    if not curves:
        return ""
    body = f"<div class=wide>{chart(shares, size=(9.6, 3.4), smooth=False)}</div>" if shares else ""
    body += f"<div class=charts>{''.join(_titled(c, smooth=False) for c in others)}</div>" if others else ""
    return _section("Held-out scores", body, "Plain ODE sampling from fixed noise, on prompts never trained on.")


def _training(rows: Sequence[Row]) -> str:
    curves = _curves(rows, [key for section in SECTIONS for key in keys_of(rows, section)], "")
    body = "".join(_titled(c) for c in curves)
    remark = "Faint: every step; strong: moving average. A group's mean win rate is constant by construction."
    return _section("Training", f"<div class=charts>{body}</div>", remark) if curves else ""


def _timing(rows: Sequence[Row]) -> str:
    phases = list(dict.fromkeys(name for row in rows for name in phase_seconds(row)))
    timed = _curves(rows, [f"perf/{name}_s" for name in phases], "perf/")
    curves = [_Curve(label=c.label.removesuffix("_s"), steps=c.steps, values=c.values) for c in timed]
    rest = [k for k in keys_of(rows, "perf/") if k not in {f"perf/{name}_s" for name in phases}]
    body = f"<div class=wide>{chart(curves[:SERIES], size=(9.6, 2.8), unit='s')}</div>" if curves else ""
    small = "".join(_titled(c) for c in _curves(rows, rest, "perf/"))
    body += f"<div class=charts>{small}</div>" if small else ""
    return _section("Time", body, "Seconds of each phase of a step.") if body else ""


def _titled(curve: _Curve, smooth: bool = True) -> str:
    last = f"<span>{_short(curve.values[-1])}</span>"
    drawing = chart([_Curve(label="", steps=curve.steps, values=curve.values)], size=(3.5, 1.7), smooth=smooth)
    prefix, slash, name = curve.label.rpartition("/")
    title = f"<i>{escape(prefix + slash)}</i>{escape(name)}"
    return f"<div class=chart><h3><b>{title}</b>{last}</h3>{drawing}</div>"


def chart(curves: Sequence[_Curve], size: tuple[float, float], smooth: bool = True, unit: str = "") -> str:
    """Curves over the training step as inline SVG whose colours are the page's CSS variables."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": repr(curves), "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        for k, one in enumerate(curves):
            _draw(axes, one, _SENTINELS[k], smooth)
        _dress(axes, unit)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(_SVG_METADATA))
    legend = _legend([c.label for c in curves]) if len(curves) > 1 or (curves and curves[0].label) else ""
    return legend + _inline(file.getvalue())


_SENTINELS = [f"#0102{k:02x}" for k in range(1, SERIES + 1)]
"""Colours that stand for --s1 ... --s8 until the SVG is written: matplotlib knows no CSS variables."""
_INK, _GRID = "#0103aa", "#0103bb"
_SVG_METADATA = ("Date", "Creator", "Format", "Type")


def _draw(axes: Axes, one: _Curve, color: str, smooth: bool) -> None:
    averaged = smooth and len(one.values) >= SMOOTH_FROM
    marker = "o" if len(one.values) <= 40 and not averaged else ""
    axes.plot(one.steps, one.values, color=color, linewidth=1.8, alpha=0.3 if averaged else 1, marker=marker,
              markersize=3.5, solid_joinstyle="round")  # fmt: skip
    if averaged:
        axes.plot(one.steps, _moving_average(one.values), color=color, linewidth=1.8)


def _moving_average(values: Sequence[float]) -> list[float]:
    """Centred, so that it does not lag behind a trend, over about a tenth of the run; shorter at both ends."""
    reach = max(1, len(values) // 20)
    spans = (min(reach, k, len(values) - 1 - k) for k in range(len(values)))
    return [sum(values[k - r : k + r + 1]) / (2 * r + 1) for k, r in enumerate(spans)]


def _dress(axes: Axes, unit: str) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.tick_params(colors=_INK, length=0)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.02, y=0.12)
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel(unit, color=_INK)


def _inline(svg: str) -> str:
    """Only the <svg> element, sized by the page, in the page's colours."""
    svg = svg[svg.index("<svg") :]
    start, end = svg.find("<metadata>"), svg.find("</metadata>")
    if start >= 0:
        svg = svg[:start] + svg[end + len("</metadata>") :]
    for k, sentinel in enumerate(_SENTINELS, start=1):
        svg = svg.replace(sentinel, f"var(--s{k})")
    return svg.replace(_INK, "var(--quiet)").replace(_GRID, "var(--line)")


def _legend(labels: Sequence[str]) -> str:
    items = (f"<li><i style='background:var(--s{k})'></i>{escape(s)}</li>" for k, s in enumerate(labels, start=1))
    return f"<ul class=legend>{''.join(items)}</ul>"


# ---------------------------------------------------------------- tables


def _last_metrics(rows: Sequence[Row]) -> str:
    """First, best-known and last value of every metric: a column each."""
    if not rows:
        return _section("Metrics", "<p>No step has been logged yet.</p>")
    body = []
    for key in sorted(keys_of(rows)):
        steps, values = curve(rows, key)
        cells = [_short(values[0]), _short(min(values)), _short(max(values)), _short(values[-1])] if values else []
        cells = [*cells, str(steps[-1])] if values else ["not a number"] + [""] * 4
        body.append(f"<tr><th>{escape(key)}</th>{''.join(f'<td>{c}</td>' for c in cells)}</tr>")
    head = "<tr><th>metric</th><td>first</td><td>lowest</td><td>highest</td><td>last</td><td>at step</td></tr>"
    return _section("Metrics", f"<div class=scroll><table>{head}{''.join(body)}</table></div>")


def _configuration(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    lines = "".join(
        f"<tr><th>{escape(name)}</th><td class=text>{escape(value)}</td></tr>" for name, value in flatten(config)
    )
    table = f"<div class=scroll><table>{lines}</table></div>"
    return _section("Configuration", f"<details><summary>Every field of config.json</summary>{table}</details>")


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Dotted field names and values of a config.json, as an override would name them.

    >>> list(flatten({"type": "a:Run", "optimizer": {"type": "a:AdamW", "lr": 0.1}}))
    [('optimizer', 'AdamW'), ('optimizer.lr', '0.1')]
    """
    for name, value in config.items():
        if name == "type":
            continue
        if isinstance(value, Mapping):
            yield prefix + name, _short_type(value)
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _short_type(part: Mapping[str, Any]) -> str:
    return str(part.get("type", "")).rpartition(":")[2]


def _short(value: float) -> str:
    return f"{value:.4g}"


# ---------------------------------------------------------------- the page


def _section(title: str, body: str, remark: str = "") -> str:
    note = f"<p class=remark>{escape(remark)}</p>" if remark else ""
    return f"<section><h2>{escape(title)}</h2>{note}{body}</section>"


def _page(title: str, body: str) -> str:
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)} · GRPO-Flex</title><style>{_STYLE}</style></head>\n"
        f"<body><main>{body}</main></body></html>\n"
    )


_STYLE = """
:root { color-scheme: light dark; --page: #f9f9f7; --card: #fcfcfb; --ink: #0b0b0b; --quiet: #6f6e69;
  --line: #e3e2dc; --up: #1a7f4b; --down: #b3402a;
  --s1: #2a78d6; --s2: #eb6834; --s3: #1baf7a; --s4: #eda100; --s5: #e87ba4; --s6: #008300; --s7: #4a3aa7;
  --s8: #e34948; }
@media (prefers-color-scheme: dark) { :root { --page: #0d0d0d; --card: #1a1a19; --ink: #f4f3ef;
  --quiet: #a3a29b; --line: #343431; --up: #5cc98d; --down: #f0876f;
  --s1: #3987e5; --s2: #d95926; --s3: #199e70; --s4: #c98500; --s5: #d55181; --s6: #3f9f3f; --s7: #9085e9;
  --s8: #e66767; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 20px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 20px; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 48px 0 4px; }
h3 { font-size: 13px; font-weight: 600; margin: 0 0 6px; display: flex; justify-content: space-between; }
h3 b { font-weight: 600; } h3 i { font-weight: 400; font-style: normal; color: var(--quiet); }
h3 span { font-weight: 400; color: var(--quiet); font-variant-numeric: tabular-nums; }
.kicker, .remark, .lead { color: var(--quiet); margin: 0 0 12px; }
.kicker { margin-bottom: 4px; }
.lead { margin: 0; }
.hero { font-size: 52px; line-height: 1.15; margin: 0 0 20px; display: flex; flex-wrap: wrap; gap: 14px;
  align-items: baseline; }
.hero span, .hero i { color: var(--quiet); font-weight: 400; font-style: normal; }
.hero em { font-size: 22px; font-style: normal; font-weight: 600; }
.up { color: var(--up); } .down { color: var(--down); }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 0; }
.tiles div, .wide, .chart, figure { background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
.tiles div { padding: 10px 16px; }
.tiles dt { font-size: 13px; color: var(--quiet); }
.tiles dd { margin: 0; font-size: 17px; font-weight: 600; }
.wide, .chart { padding: 14px 16px; margin-bottom: 14px; min-width: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: 14px; }
.chart { margin: 0; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0 0 8px; padding: 0; list-style: none;
  font-size: 13px; }
.legend i { display: inline-block; width: 14px; height: 4px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 14px; }
.cards.pairs { grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); }
figure { margin: 0; padding: 10px; }
figure div { display: flex; gap: 8px; }
figure span { flex: 1; min-width: 0; }
figure img { width: 100%; display: block; border-radius: 4px; border: 1px solid var(--line); }
figure small { color: var(--quiet); }
figcaption { font-size: 14px; margin-top: 6px; overflow-wrap: anywhere; }
figcaption b { display: block; font-variant-numeric: tabular-nums; }
video, .sheet { width: 100%; height: auto; border-radius: 8px; border: 1px solid var(--line);
  display: block; }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--quiet); margin-bottom: 10px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line); font-weight: 400; }
th, td.text { text-align: left; } td.text { overflow-wrap: anywhere; }
tr:first-child td { color: inherit; }
"""
