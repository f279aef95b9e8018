"""Samples as people look at them: PNG grids with prompt and score, mp4 of clips, before beside after.

A *set* of samples ("before" or "after") is also kept picture by picture, losslessly, so that a report or a
comparison can be drawn from the run's directory alone::

    samples/before/000.png   frames side by side, as they were sampled
    samples/before.json      [{"id", "text", "scores", "frames", "file"}, ...]
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_flex.types import Prompt, Sample

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

PICTURE = 192
"""Pixels that a grid gives to the longer side of a small picture, so that 64 x 64 can be looked at."""
LARGEST = 384
"""Longer side, in pixels, to which large pictures are reduced in a grid."""
WIDEST = 1280
"""Pixels that a sheet of clips is wide at the most: a report shows it 1040 wide, and its text is to be read there."""
STRIP_FRAMES = 6
"""Frames of a clip that its still strip shows."""
CLIP_SECONDS = 3.0
"""An mp4 repeats its clip until it lasts about this long; nine frames would be over before one looks."""
FPS = 8.0
"""Frames per second where the generator does not say."""
PAUSE_SECONDS = 0.5
"""For which an mp4 rests on a clip's last frame, so that its end is told from its beginning."""
MOTION = "motion"
"""The held-out figure that says how much moves; more of it is not better."""

_GAP = 14
_TEXT = "#1d1d1b"
_QUIET = "#6f6e69"
_GOOD, _BAD = "#1a7f4b", "#b3402a"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One prompt's place in a grid: rows of pictures, the prompt and the score below."""

    rows: Sequence[Sequence[np.ndarray]]
    """uint8 [H, W, 3] pictures."""
    text: str
    score: str
    labels: Sequence[str] = ()
    """Written above the columns of pictures, or above the rows where there are several rows."""
    color: str = _TEXT
    """Of the score."""


def fps_of(generator: Any) -> float:
    """Frames per second at which a generator's clips are shown."""
    return float(getattr(generator, "fps", FPS))


# ---------------------------------------------------------------- scores


def main_score(scores: Mapping[str, float]) -> str | None:
    """The score that stands for a sample or a run: "oracle" if there is one, else the first but ``MOTION``."""
    return "oracle" if "oracle" in scores else next((name for name in scores if name != MOTION), None)


def score_text(sample: Sample) -> str:
    """E.g. "oracle 0.75"; empty for a sample that nobody scored."""
    name = main_score(sample.scores)
    return f"{name} {sample.scores[name]:.2f}" if name is not None else ""


def match(before: Sequence[Sample], after: Sequence[Sample]) -> list[tuple[Sample, Sample]]:
    """Pairs of samples of one prompt, in the order of ``after``; the k-th sample meets the k-th."""
    waiting: dict[str, list[Sample]] = {}
    for sample in before:
        waiting.setdefault(sample.prompt.id, []).append(sample)
    return [(waiting[s.prompt.id].pop(0), s) for s in after if waiting.get(s.prompt.id)]


# ---------------------------------------------------------------- cells


def sample_cell(sample: Sample, frame: int | None = None) -> Cell:
    """One sample; ``frame`` of a clip, or its strip when that is None."""
    return Cell(rows=[shown(sample, frame)], text=sample.prompt.text, score=score_text(sample))


def pair_cell(before: Sample, after: Sample, frame: int | None = None) -> Cell:
    """Before beside after; the strips of clips stand one above the other."""
    a, b = shown(before, frame), shown(after, frame)
    stacked = max(len(a), len(b)) > 1
    name = main_score(after.scores)
    change = 0.0 if name is None else after.scores[name] - before.scores.get(name, math.nan)
    return Cell(
        rows=[a, b] if stacked else [[*a, *b]],
        labels=("before", "after"),
        text=after.prompt.text,
        score=f"{score_text(before)} → {after.scores[name]:.2f}" if name is not None else "",
        color=_GOOD if change > 0 else _BAD if change < 0 else _TEXT,
    )


def shown(sample: Sample, frame: int | None) -> list[np.ndarray]:
    """``frame`` of a sample (past its end: it begins anew), or its strip when that is None; a picture's only frame."""
    count = len(sample.media)
    if frame is not None:
        return [sample.media[frame % count]]
    length = min(count, STRIP_FRAMES)
    last = max(length - 1, 1)
    return [sample.media[round(k * (count - 1) / last)] for k in range(length)]


# ---------------------------------------------------------------- drawing


@lru_cache(maxsize=8)
def font(size: int, bold: bool = False) -> FreeTypeFont:
    """DejaVu Sans from matplotlib's own files: the same on every machine, and it knows more than Latin."""
    from importlib.resources import as_file, files

    from PIL import ImageFont

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    with as_file(files("matplotlib") / "mpl-data" / "fonts" / "ttf" / name) as path:
        return ImageFont.truetype(str(path), size)


def scaled(picture: np.ndarray, small: int = PICTURE, largest: int = LARGEST) -> Image:
    """A picture uint8 [H, W, 3] at a size for people: small ones show their pixels, large ones are reduced."""
    from PIL import Image

    image = Image.fromarray(picture)
    longer = max(image.size)
    factor = max(1, round(small / longer)) if longer <= largest else largest / longer
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    if size == image.size:
        return image
    return image.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS)


def wrap(text: str, face: FreeTypeFont, width: int, lines: int = 4) -> list[str]:
    """Break ``text`` into at most ``lines`` lines of ``width`` pixels; an ellipsis stands for the rest."""
    out, line = [], ""
    for word in text.split():
        while face.getlength(word) > width and len(word) > 1:  # one word wider than the picture: cut it
            cut = max(k for k in range(1, len(word)) if k == 1 or face.getlength(word[:k]) <= width)
            out, line, word = [*out, line] if line else out, word[:cut], word[cut:]
            out, line = [*out, line], ""
        longer = f"{line} {word}".strip()
        if face.getlength(longer) <= width:
            line = longer
        else:
            out, line = [*out, line], word
    out = [*out, line] if line else out
    if len(out) <= lines:
        return out
    last = out[lines - 1]
    while last and face.getlength(last + "…") > width:
        last = last[:-1]
    return [*out[: lines - 1], last + "…"]


def draw_grid(cells: Sequence[Cell], title: str = "", widest: int | None = None) -> Image:
    """All cells on one white sheet, about 1.6 times as wide as high, unless ``widest`` (pixels) has it narrower."""
    from PIL import Image, ImageDraw

    drawn = [_draw_cell(cell, widest) for cell in cells]
    width, height = max(c.width for c in drawn), max(c.height for c in drawn)
    columns = max(1, min(len(drawn), round(math.sqrt(1.6 * len(drawn) * height / width))))
    if widest is not None:
        columns = max(1, min(columns, (widest - _GAP) // (width + _GAP)))
    rows = math.ceil(len(drawn) / columns)
    top = 40 if title else _GAP
    face = font(17, bold=True)
    sheet_width = max(columns * (width + _GAP) + _GAP, int(face.getlength(title)) + 2 * _GAP)
    sheet = Image.new("RGB", (_even(sheet_width), _even(top + rows * (height + _GAP))), "white")
    ImageDraw.Draw(sheet).text((_GAP, 11), title, fill=_TEXT, font=face)
    for k, cell in enumerate(drawn):
        sheet.paste(cell, (_GAP + k % columns * (width + _GAP), top + k // columns * (height + _GAP)))
    return sheet


def _even(size: int) -> int:
    return size + size % 2  # H.264 with 4:2:0 colour needs even sizes


def _draw_cell(cell: Cell, widest: int | None) -> Image:
    """With ``widest``, four large pictures stand beside each other on a sheet, or as many as a row of the cell has."""
    from PIL import Image, ImageDraw

    beside = max(4, *map(len, cell.rows))
    largest = LARGEST if widest is None else min(LARGEST, (widest - 3 * _GAP) // beside - 4)
    small = PICTURE if len(cell.rows[0]) <= 2 else PICTURE * 2 // 3 if len(cell.rows) == 1 else PICTURE // 2
    rows = [[scaled(p, small, largest) for p in row] for row in cell.rows]
    head = 18 if cell.labels else 0
    step_x = max(p.width for row in rows for p in row) + 4
    step_y = max(p.height for row in rows for p in row) + 4 + head
    width = max(step_x * max(map(len, rows)) - 4, 120)
    lines = wrap(cell.text, font(13), width)
    below = step_y * len(rows) + 2
    sheet = Image.new("RGB", (width, below + 17 * len(lines) + 20), "white")
    draw = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            _place(sheet, draw, picture, (x * step_x, head + y * step_y))
    for k, label in enumerate(cell.labels):
        at, room = ((k * step_x, 0), step_x - 8) if len(rows) == 1 else ((0, k * step_y), width)
        draw.text(at, "".join(wrap(label, font(12), room, lines=1)), fill=_QUIET, font=font(12))
    for k, line in enumerate(lines):
        draw.text((0, below + 17 * k), line, fill=_TEXT, font=font(13))
    draw.text((0, below + 17 * len(lines)), cell.score, fill=cell.color, font=font(13, bold=True))
    return sheet


def _place(sheet: Image, draw: ImageDraw, picture: Image, at: tuple[int, int]) -> None:
    sheet.paste(picture, at)  # the hairline keeps a white picture from dissolving into the page
    draw.rectangle((*at, at[0] + picture.width - 1, at[1] + picture.height - 1), outline="#d5d4ce")


# ---------------------------------------------------------------- files

Cells = Callable[[int | None], list[Cell]]
"""All cells at one frame of their clips, or as stills when the frame is None."""


def write_samples(path: Path, samples: Sequence[Sample], title: str, fps: float) -> list[Path]:
    """Write ``path``.png and, for clips, ``path``.mp4; the paths that were written, the one to show first."""
    return _write(path, title, fps, _frames(samples), lambda f: [sample_cell(s, f) for s in samples])


def write_before_after(path: Path, pairs: Sequence[tuple[Sample, Sample]], title: str, fps: float) -> list[Path]:
    """The same for matched pairs, before beside after."""
    frames = _frames([s for pair in pairs for s in pair])
    return _write(path, title, fps, frames, lambda f: [pair_cell(a, b, f) for a, b in pairs])


def _frames(samples: Sequence[Sample]) -> int:
    return max(len(s.media) for s in samples)


def _write(path: Path, title: str, fps: float, frames: int, cells: Cells) -> list[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    still = path.with_name(path.name + ".png")
    widest = WIDEST if frames > 1 else None
    save_png(draw_grid(cells(None), title, widest), still)
    if frames == 1:
        return [still]
    film = path.with_name(path.name + ".mp4")
    write_mp4(film, [draw_grid(cells(frame), title, widest) for frame in range(frames)], fps)
    return [film, still]


def save_png(image: Image, path: Path) -> None:
    """Atomically: whoever looks at the folder while a run writes to it never meets half a picture."""
    half = path.with_name(f".{path.name}.part")
    image.save(half, format="PNG")
    os.replace(half, path)


def write_mp4(path: Path, frames: Sequence[Image] | Sequence[np.ndarray], fps: float) -> None:
    """H.264 of frames with even sizes, repeated, with a rest on the last one, until it lasts about ``CLIP_SECONDS``."""
    import imageio.v2 as imageio
    import numpy as np

    half = path.with_name(f".{path.name}.part.mp4")
    once = [np.asarray(frame) for frame in frames]
    once += once[-1:] * round(PAUSE_SECONDS * fps)
    looped: list[Any] = once * max(1, round(CLIP_SECONDS * fps / len(once)))
    imageio.mimwrite(str(half), looped, format="FFMPEG", fps=fps, codec="libx264", quality=8, macro_block_size=2)
    os.replace(half, path)


def save_set(folder: Path, name: str, samples: Sequence[Sample]) -> None:
    """Keep a set of samples losslessly in ``folder``/``name``/, listed in ``folder``/``name``.json."""
    import numpy as np
    from PIL import Image

    (folder / name).mkdir(parents=True, exist_ok=True)
    entries = []
    for k, sample in enumerate(samples):
        file = f"{name}/{k:03d}.png"
        save_png(Image.fromarray(np.concatenate(list(sample.media), axis=1)), folder / file)
        scores = {key: float(v) if math.isfinite(v) else None for key, v in sample.scores.items()}
        entries.append(
            {"id": sample.prompt.id, "text": sample.prompt.text, "scores": scores}
            | {"frames": len(sample.media), "file": file}
        )
    half = folder / f".{name}.json.part"
    half.write_text(json.dumps(entries, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(half, folder / f"{name}.json")


def load_set(folder: Path, name: str) -> list[Sample]:
    """What ``save_set`` wrote; an empty list if there is no such set yet."""
    index = folder / f"{name}.json"
    if not index.is_file():
        return []
    return [_load(folder, entry) for entry in json.loads(index.read_text(encoding="utf-8"))]


def _load(folder: Path, entry: dict) -> Sample:
    import numpy as np
    from PIL import Image

    with Image.open(folder / entry["file"]) as image:
        strip = np.asarray(image.convert("RGB"))
    media = np.stack(np.split(strip, entry["frames"], axis=1))
    scores = {k: math.nan if v is None else v for k, v in entry["scores"].items()}
    return Sample(prompt=Prompt(id=entry["id"], text=entry["text"]), media=media, scores=scores)
