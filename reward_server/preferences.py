"""Preference instances: a prompt, two candidates and, where somebody said so, which one is better.

Our own files are JSON lines, or Parquet with the same columns (as `datasets.Dataset.to_parquet` writes them):

    {"id": "7", "prompt": "a red bus", "candidates": ["a.png", "b.png"], "label": 0, "category": "colour"}

A candidate is a picture, a video file, or the list of a video's frames; relative paths start at the file's folder. In
Parquet a picture may stand in the file itself; it is then written to a folder beside it. ``label`` is 0, 1, "tie"
(people saw no difference) or null (nobody said). ``medium``, "image" or "video", is found out where it is left out;
``source`` is the picture that the candidates are edits of. Published layouts: ``readers.py``.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from reward_server.ask import VIDEO_ENDINGS, open_picture, read_video
from reward_server.families.base import Medium
from reward_server.families.chat import data_url, frame_indices

if TYPE_CHECKING:
    from PIL import Image

FRAMES = 8
"""Frames shown of a video where a judge compares two."""
Label = Literal[0, 1] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """Two candidates for one prompt, as the data gives them (not yet in the order in which they are shown)."""

    id: str
    prompt: str
    candidates: tuple[tuple[str, ...], tuple[str, ...]]
    """Paths: one picture, one video file, or a video's frames in order."""
    label: Label = None
    """Which of the two as given is better; None where that is not known, and for a tie."""
    tie: bool = False
    """People saw the two as equally good, or equally bad."""
    medium: Medium = "image"
    category: str = ""
    source: str = ""
    """The picture that the candidates are edits of."""

    def __post_init__(self) -> None:
        if self.tie and self.label is not None:
            raise ValueError(f"{self.id}: a tie has no label, and this one has {self.label}")


def shown_order(preference: Preference, seed: int) -> tuple[int, int]:
    """(0, 1) or (1, 0): which candidate is shown first, at random and the same for the same seed and id."""
    return (0, 1) if random.Random(f"order {seed} {preference.id}").random() < 0.5 else (1, 0)


# ---------------------------------------------------------------- pictures


def pictures(paths: Sequence[str], frames: int = FRAMES) -> list[Image.Image]:
    """A candidate's RGB pictures: one of a picture, at most ``frames`` uniformly spaced ones of a video.

    Raises:
        ValueError: a file that is missing or cannot be read, by name.
    """
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"the file {path!r} is not there")
    if len(paths) == 1 and is_video(paths[0]):
        return read_video(paths[0], frames)
    return [open_picture(paths[k]) for k in frame_indices(len(paths), frames)]


def picture_urls(paths: Sequence[str], frames: int = FRAMES) -> list[str]:
    """The same as data URLs, as a judge's request carries them."""
    return [data_url(picture) for picture in pictures(paths, frames)]


def is_video(path: str) -> bool:
    """Whether the file's name ends like a video's."""
    return path.lower().endswith(VIDEO_ENDINGS)


# ---------------------------------------------------------------- files


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the media of a file's rows are found, and put if they stand in the rows themselves."""

    folder: Path
    """Relative paths start here."""
    written: Path
    """Pictures out of Parquet rows go here, named by their content."""

    def of(self, value: object) -> str:
        """The path of a picture or video: a path, or a struct with "bytes". Raises ValueError for anything else."""
        if isinstance(value, Mapping):
            if value.get("bytes"):
                return self._put(value["bytes"])
            value = value.get("path")
        if not isinstance(value, str) or not value:
            raise ValueError(f"{str(value)[:60]!r} is no path of a picture or video")
        return str(self.folder / value)

    def _put(self, content: bytes) -> str:
        path = self.written / f"{hashlib.blake2b(content, digest_size=16).hexdigest()}.png"
        if not path.exists():
            self.written.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_bytes(content)
            part.replace(path)
        return str(path)


Layout = Callable[[Mapping[str, Any], Place], Preference | str]
"""One row of a file to its instance, or to the reason why it is none. Raises ValueError, KeyError or TypeError for a
row of another layout. An empty id stands for the row's number."""


@dataclass(frozen=True, kw_only=True)
class Collection:
    """What was read from a file."""

    preferences: tuple[Preference, ...]
    left_out: Mapping[str, int]
    """Reason -> rows."""


def read(path: str | Path, layout: Layout | None = None, media: str | Path = "") -> Collection:
    """All instances of a file.

    Args:
        path: JSON lines, JSON (a list, or an object with "pairs"), Parquet, or a folder of Parquet files.
        layout: How a row is read; None: ours.
        media: Folder in which relative paths start; empty: the file's own.

    Raises:
        ValueError: a file or row that cannot be read, or an id given twice; names the row.
    """
    path, layout = Path(path), layout or our_layout
    home = path if path.is_dir() else path.parent
    place = Place(folder=Path(media or home).absolute(), written=home.absolute() / f"{path.stem}.media")
    found: dict[str, Preference] = {}
    left_out: Counter[str] = Counter()
    for number, row in enumerate(rows(path)):
        try:
            made = layout(row, place)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            said = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path}, row {number + 1}: {said}; is it of another layout?") from error
        if isinstance(made, str):
            left_out[made] += 1
            continue
        made = made if made.id else replace(made, id=str(number))
        if made.id in found:
            raise ValueError(f"{path}, row {number + 1}: the id {made.id!r} was there before; ids need to differ")
        found[made.id] = made
    return Collection(preferences=tuple(found.values()), left_out=left_out)


def rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """The file's records. Raises ValueError for a file that is missing or is none of the kinds that are read."""
    if not path.exists():
        raise ValueError(f"there is no file {str(path)!r}")
    if path.is_dir() or path.suffix == ".parquet":
        yield from _parquet(path)
        return
    try:
        if path.suffix == ".json":
            listed = json.loads(path.read_text(encoding="utf-8"))
            yield from listed["pairs"] if isinstance(listed, Mapping) else listed
            return
        with path.open(encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.strip())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as preferences: {error}") from error


def _parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{str(path)!r} is Parquet, which needs pyarrow: pip install pyarrow") from error
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"the folder {str(path)!r} holds no Parquet files")
    for file in files:
        try:
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=16):  # rows may hold whole pictures
                yield from batch.to_pylist()
        except (arrow.ArrowException, OSError) as error:
            raise ValueError(f"{str(file)!r} cannot be read as Parquet: {error}") from error


def our_layout(row: Mapping[str, Any], place: Place) -> Preference:
    """A row of our own files (see above)."""
    one, two = (_candidate(c, place) for c in row["candidates"])
    label = row.get("label")
    if label not in (0, 1, "0", "1", "tie", None):
        raise ValueError(f"label is {label!r}; it needs to be 0, 1, 'tie' or null")
    told = row.get("medium")
    if told not in ("image", "video", None, ""):
        raise ValueError(f"medium is {told!r}; it needs to be image or video")
    if not isinstance(row["prompt"], str):
        raise ValueError(f"prompt is {row['prompt']!r}; it needs to be a text")
    seen = "video" if len(one) > 1 or any(map(is_video, one)) else "image"
    return Preference(
        id="" if row.get("id") is None else str(row["id"]),
        prompt=row["prompt"],
        candidates=(one, two),
        label=None if label in ("tie", None) else cast(Label, int(label)),
        tie=label == "tie",
        medium=told or seen,
        category=row.get("category") or "",
        source=place.of(row["source"]) if row.get("source") else "",
    )


def _candidate(given: object, place: Place) -> tuple[str, ...]:
    frames = tuple(place.of(frame) for frame in (given if isinstance(given, list) else [given]))
    if not frames:
        raise ValueError("a candidate has no picture")
    return frames


def write(path: str | Path, preferences: Sequence[Preference]) -> None:
    """Writes JSON lines of our own, with paths relative to the file's folder where they lie below it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:  # half a surrogate pair: its JSON escape
        for p in preferences:
            record = {
                "id": p.id,
                "prompt": p.prompt,
                "candidates": [[_relative(frame, path.parent) for frame in c] for c in p.candidates],
                "label": "tie" if p.tie else p.label,
                "medium": p.medium,
                "category": p.category,
                "source": _relative(p.source, path.parent) if p.source else None,
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _relative(path: str, folder: Path) -> str:
    whole, home = Path(path).absolute(), folder.absolute()
    return str(whole.relative_to(home)) if whole.is_relative_to(home) else str(whole)
