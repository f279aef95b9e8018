"""Clips of one or two moving shapes, their captions, their machine-readable references, and their frames.

A clip has 9 frames (4k + 1, k = 2) of 48 x 48 pixels. Lengths are pixels of that canvas, x to the right and y
downwards. A *description* is what a caption says; a *clip* adds the exact geometry. The shapes, colours,
backgrounds and `NOVEL_PAIRS` (never trained) are those of `testbed.scenes`.

`python -m testbed.clips` rewrites `prompts/shapes_video_train.jsonl` and `prompts/shapes_video_heldout.jsonl`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from testbed import scenes as world
from testbed.render import render
from testbed.scenes import BACKGROUNDS, CANVAS, COLOURS, NOVEL_PAIRS, SHAPES, Obj, Scene, shuffled, write_prompts

SIDE = 48
FRAMES = 9
RADIUS = 7.0

# Everything begins and ends at one of three places of an axis. They are the centres of the 16-pixel squares that one
# token of the tiny Wan covers, so that a tiny generator has few and crisp modes to learn.
PLACES = (8.0, 24.0, 40.0)
LANES = (PLACES[0], PLACES[2])  # of two objects that pass each other
SPEEDS = {"slowly": 1, "quickly": 2}  # places passed in the whole clip: 2 and 4 pixels a frame


class Direction(NamedTuple):
    """`axis` 0 is x, 1 is y; `names` are the places along it, from low to high coordinates."""

    axis: int
    sign: int
    opposite: str
    names: tuple[str, str, str]


_ACROSS, _DOWN = ("left", "middle", "right"), ("top", "middle", "bottom")
DIRECTIONS = {
    "right": Direction(0, 1, "left", _ACROSS),
    "left": Direction(0, -1, "right", _ACROSS),
    "down": Direction(1, 1, "up", _DOWN),
    "up": Direction(1, -1, "down", _DOWN),
}

PROMPT_SEED = 4096
TRAIN_PROMPTS, HELDOUT_SINGLE, HELDOUT_PAIR, HELDOUT_NOVEL = 2000, 36, 36, 24
PLAIN_WORDS = ("a", "on", "background", "moving", "past", "from", "to", "the", "middle", "top", "bottom")
WORDS = (*PLAIN_WORDS, *SPEEDS, *DIRECTIONS, *SHAPES, *COLOURS, *BACKGROUNDS)

Kind = tuple[str, str]
"""(colour, shape)."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """One thing that moves, or two that pass each other: the second goes the other way, equally fast.

    `route` is the (start, end) that a caption says instead of direction and speed, which follow from it.
    """

    things: tuple[Kind, ...]
    direction: str
    speed: str
    background: str
    route: tuple[str, str] | None = None

    @property
    def novel(self) -> bool:
        return any(thing in NOVEL_PAIRS for thing in self.things)

    @property
    def directions(self) -> tuple[str, ...]:
        """Where each thing goes."""
        return (self.direction, DIRECTIONS[self.direction].opposite)[: len(self.things)]


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A description with its exact geometry: each thing's centre in every frame, pixels."""

    description: Description
    paths: tuple[tuple[tuple[float, float], ...], ...]


# ---------------------------------------------------------------- words


def caption(description: Description, background_first: bool = False) -> str:
    """The English text of a description, in one of two word orders."""
    first, *others = (f"a {colour} {shape}" for colour, shape in description.things)
    if description.route:
        subject = f"{first} moving from the {description.route[0]} to the {description.route[1]}"
    else:
        subject = f"{first} {description.speed} moving {description.direction}"
    for other, direction in zip(others, description.directions[1:], strict=True):
        subject += f" past {other} moving {direction}"
    place = f"on a {description.background} background"
    return f"{place} {subject}" if background_first else f"{subject} {place}"


def parse(text: str) -> Description:
    """The description that a caption of this module states. Raises ValueError for any other text."""
    head, found, tail = text.partition("on a ")
    if not found:
        raise ValueError(f"no background in {text!r}")
    background, _, rest = tail.partition(" background")
    subject = (head or rest).strip()
    stated = _parse_route(subject, background) if " from the " in subject else _parse_motion(subject, background)
    if stated is None or text not in (caption(stated), caption(stated, background_first=True)):
        raise ValueError(f"not a caption of this world: {text!r}")
    return stated


def _parse_motion(subject: str, background: str) -> Description | None:
    first, _, second = subject.partition(" past ")
    words = first.split()
    if len(words) != 6 or words[3] not in SPEEDS or words[5] not in DIRECTIONS:
        return None
    kinds = [_kind(words), *([_kind(second.split())] if second else [])]
    things = tuple(kind for kind in kinds if kind)
    if len(things) < len(kinds) or background not in BACKGROUNDS:
        return None
    return Description(things=things, direction=words[5], speed=words[3], background=background)


def _parse_route(subject: str, background: str) -> Description | None:
    words = subject.split()
    kind = _kind(words)
    if kind is None or len(words) != 10 or background not in BACKGROUNDS:
        return None
    return _routed(kind, background, (words[6], words[9]))


def _kind(words: Sequence[str]) -> Kind | None:
    known = len(words) > 2 and words[1] in COLOURS and words[2] in SHAPES
    return (words[1], words[2]) if known else None


def routes(thing: Kind, background: str) -> Iterator[Description]:
    """Every description of one thing that names start and end."""
    for (name, direction), (speed, hops) in product(DIRECTIONS.items(), SPEEDS.items()):
        names = direction.names[:: direction.sign]
        for start, end in zip(names, names[hops:], strict=False):
            yield Description(things=(thing,), direction=name, speed=speed, background=background, route=(start, end))


def _routed(thing: Kind, background: str, route: tuple[str, str]) -> Description | None:
    return next((d for d in routes(thing, background) if d.route == route), None)


def reference(description: Description) -> dict[str, Any]:
    """The JSON-able truth that the oracle scores against; None where the caption does not say it."""
    start, end = description.route or (None, None)
    said = {"speed": None if description.route else description.speed, "start": start, "end": end}
    objects = [
        {"colour": colour, "shape": shape, "direction": direction} | (said if i == 0 else dict.fromkeys(said))
        for i, ((colour, shape), direction) in enumerate(zip(description.things, description.directions, strict=True))
    ]
    return {"objects": objects, "passing": len(objects) == 2, "background": description.background}


def from_reference(record: dict[str, Any]) -> Description:
    """The description of a `reference` (its inverse). Raises KeyError or ValueError for a malformed one."""
    first, background = record["objects"][0], record["background"]
    things = tuple((thing["colour"], thing["shape"]) for thing in record["objects"])
    if first["start"]:
        told = _routed(things[0], background, (first["start"], first["end"]))
        if told is None:
            raise ValueError(f"no way leads from {first['start']!r} to {first['end']!r}")
        return told
    return Description(things=things, direction=first["direction"], speed=first["speed"], background=background)


def gist(description: Description) -> tuple[Any, ...]:
    """What happens, without where it starts or who is named first: equal for all that tell of the same event."""
    moving = frozenset(zip(description.things, description.directions, strict=True))
    return moving, description.speed, description.background


# ---------------------------------------------------------------- descriptions


def all_descriptions(count: int) -> Iterator[Description]:
    """Every description of `count` (1 or 2) things, the novel ones included, in a fixed order.

    Of two things that pass each other, the one that goes right or down is named first.
    """
    kinds = list(product(COLOURS, SHAPES))
    if count == 1:
        for kind, background in product(kinds, BACKGROUNDS):
            for direction, speed in product(DIRECTIONS, SPEEDS):
                yield Description(things=(kind,), direction=direction, speed=speed, background=background)
            yield from routes(kind, background)
        return
    for one, two, direction, speed, background in product(kinds, kinds, ("right", "down"), SPEEDS, BACKGROUNDS):
        if one != two:  # two equal things could not be told apart
            yield Description(things=(one, two), direction=direction, speed=speed, background=background)


def sample_description(rng: np.random.Generator, *, pair_fraction: float = 0.5) -> Description:
    """A random description without novel pairs; two things with probability `pair_fraction`, else half name a route."""
    count = 2 if rng.random() < pair_fraction else 1
    kinds: list[Kind] = []
    while len(kinds) < count:
        kind = (pick(rng, tuple(COLOURS)), pick(rng, SHAPES))
        if kind not in NOVEL_PAIRS and kind not in kinds:
            kinds.append(kind)
    background = pick(rng, tuple(BACKGROUNDS))
    if count == 1 and rng.random() < 0.5:
        return pick(rng, tuple(routes(kinds[0], background)))
    direction, speed = pick(rng, tuple(DIRECTIONS)), pick(rng, tuple(SPEEDS))
    return Description(things=tuple(kinds), direction=direction, speed=speed, background=background)


def pick(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))]


def training_clips(rng: np.random.Generator, count: int) -> list[Clip]:
    """Random clips without novel pairs and without anything that a held-out prompt tells of."""
    closed, clips = heldout_gists(), []
    while len(clips) < count:
        description = sample_description(rng)
        if gist(description) not in closed:
            clips.append(sample_clip(rng, description))
    return clips


# ---------------------------------------------------------------- geometry and frames


def sample_clip(rng: np.random.Generator, description: Description) -> Clip:
    """Random geometry that makes `description` true, inside the canvas and without overlap."""
    if len(description.things) == 1:
        lanes = [pick(rng, PLACES)]
        begins = [_begin(rng, description)]
    else:
        lanes = list(LANES if rng.random() < 0.5 else LANES[::-1])
        # Two objects are side by side in the middle of the clip, so they have passed each other at its end.
        way = SPEEDS[description.speed] * (PLACES[1] - PLACES[0])
        begins = [PLACES[1] - DIRECTIONS[d].sign * way / 2 for d in description.directions]
    paths = (
        _path(DIRECTIONS[d], description.speed, begin, lane)
        for d, begin, lane in zip(description.directions, begins, lanes, strict=True)
    )
    return Clip(description=description, paths=tuple(paths))


def _begin(rng: np.random.Generator, description: Description) -> float:
    """Where a single object starts along its axis: as told, or anywhere from where its way fits."""
    direction = DIRECTIONS[description.direction]
    if description.route:
        return PLACES[direction.names.index(description.route[0])]
    places = PLACES[:: direction.sign]
    return pick(rng, places[: len(places) - SPEEDS[description.speed]])


def _path(direction: Direction, speed: str, begin: float, lane: float) -> tuple[tuple[float, float], ...]:
    way = direction.sign * SPEEDS[speed] * (PLACES[1] - PLACES[0])
    along = [begin + way * k / (FRAMES - 1) for k in range(FRAMES)]
    return tuple((a, lane) if direction.axis == 0 else (lane, a) for a in along)


def render_clip(clip: Clip, side: int = SIDE) -> np.ndarray:
    """Draws a clip: uint8 [9, side, side, 3]. `side` other than 48 scales the whole canvas."""
    return np.stack([render(_frame(clip, k), side) for k in range(FRAMES)])


def render_clips(clips: Sequence[Clip]) -> np.ndarray:
    """Draws clips in bulk: uint8 [n, 9, 48, 48, 3]."""
    frames = np.empty((len(clips), FRAMES, SIDE, SIDE, 3), np.uint8)
    for i, clip in enumerate(clips):
        frames[i] = render_clip(clip)
    return frames


def _frame(clip: Clip, k: int) -> Scene:
    told = clip.description
    return frame(told.background, told.things, [path[k] for path in clip.paths])


def frame(background: str, things: Sequence[Kind], places: Sequence[tuple[float, float]]) -> Scene:
    """Things at their places as a scene, in the units of the renderer's 64-pixel canvas."""
    unit = CANVAS / SIDE
    objects = tuple(
        Obj(shape=shape, colour=colour, size=RADIUS * unit, x=x * unit, y=y * unit)
        for (colour, shape), (x, y) in zip(things, places, strict=True)
    )
    named = tuple(world.Thing(colour=colour, shape=shape) for colour, shape in things)
    still = world.Description(things=named, background=background)
    return Scene(objects=objects, background=background, description=still)


# ---------------------------------------------------------------- prompts


def _spoken(rng: np.random.Generator, description: Description) -> tuple[Description, str]:
    """A description of two things turned round half of the time, and its caption in a random word order."""
    if len(description.things) == 2 and rng.random() < 0.5:
        turned = description.directions[1]
        description = Description(
            things=description.things[::-1],
            direction=turned,
            speed=description.speed,
            background=description.background,
        )
    return description, caption(description, background_first=bool(rng.random() < 0.5))


def _record(kind: str, index: int, description: Description, text: str) -> dict[str, Any]:
    tags = ["single" if len(description.things) == 1 else "pair"]
    tags += ["route"] if description.route else [f"speed:{description.speed}", f"direction:{description.direction}"]
    tags += ["novel"] if description.novel else []
    return {"id": f"{kind}-{index:04d}", "text": text, "reference": reference(description), "tags": tags}


@lru_cache(maxsize=1)
def heldout_descriptions() -> tuple[Description, ...]:
    """The descriptions of the held-out prompts: one in four has a never-trained pair."""
    rng = np.random.default_rng(PROMPT_SEED)
    singles, pairs = (shuffled(rng, all_descriptions(count)) for count in (1, 2))
    known = [d for d in singles if not d.novel][:HELDOUT_SINGLE] + [d for d in pairs if not d.novel][:HELDOUT_PAIR]
    few = HELDOUT_NOVEL // 2
    novel = [d for d in singles if d.novel][:few] + [d for d in pairs if d.novel][: HELDOUT_NOVEL - few]
    return tuple(shuffled(rng, known + novel))


@lru_cache(maxsize=1)
def heldout_gists() -> frozenset[tuple[Any, ...]]:
    return frozenset(map(gist, heldout_descriptions()))


def build_prompts() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The training and held-out prompt records; deterministic, all texts distinct, no shared event."""
    closed, rng = heldout_gists(), np.random.default_rng(PROMPT_SEED + 1)
    held = [_record("heldout", i, *_spoken(rng, d)) for i, d in enumerate(heldout_descriptions())]
    half = TRAIN_PROMPTS // 2
    picked = []
    for count in (1, 2):
        open_ = (d for d in all_descriptions(count) if gist(d) not in closed and not d.novel)
        picked += shuffled(rng, open_)[:half]
    return [_record("train", i, *_spoken(rng, d)) for i, d in enumerate(shuffled(rng, picked))], held


if __name__ == "__main__":
    for name, records in zip(("shapes_video_train", "shapes_video_heldout"), build_prompts(), strict=True):
        write_prompts(name, records)
