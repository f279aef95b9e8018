"""Scenes of one or two flat shapes, their captions and their machine-readable references.

Lengths are pixels of a 64 x 64 canvas, x to the right and y downwards. A *description* is what a caption
says (shapes, colours, a size word, a relation, a background); a *scene* adds the exact geometry. Many scenes
share one description. `NOVEL_PAIRS` never occur in training, neither in an image nor in a caption.

`python -m testbed.scenes` rewrites `prompts/shapes_train.jsonl` and `prompts/shapes_heldout.jsonl`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

CANVAS = 64
MARGIN = 4.0  # pixels kept free at the border
GAP = 4.0  # pixels kept free between the bounding boxes of two objects

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 50, 190),
    "cyan": (50, 200, 220),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
    "black": (15, 15, 15),
}
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
NOVEL_PAIRS = frozenset({("purple", "cross"), ("green", "triangle")})

# Objects stand at a few places, on multiples of 8 pixels (the autoencoder's stride), in a few sizes (half extents in
# pixels). Places are so far apart that a tiny generator does not blend neighbours: with free positions, or with every
# multiple of 8, a third of its single objects came out stretched between two places.
CENTRE, NEAR, FAR = 32.0, 16.0, 48.0
RADII: dict[str | None, float] = {"small": 8.0, None: 12.0, "large": 16.0}
PAIR_RADIUS = 10.0

PROMPT_DIR = Path(__file__).parent / "prompts"
PROMPT_SEED = 2024
TRAIN_PROMPTS, HELDOUT_SINGLE, HELDOUT_PAIR, HELDOUT_NOVEL = 2000, 18, 54, 24
PLAIN_WORDS = ("a", "on", "background", "of", "left", "right", "above", "below")
WORDS = (*PLAIN_WORDS, *SIZES, *SHAPES, *COLOURS, *BACKGROUNDS)


@dataclass(frozen=True, kw_only=True)
class Obj:
    """A flat shape: `size` is half the side of its bounding box, (`x`, `y`) the box's centre, in pixels."""

    shape: str
    colour: str
    size: float
    x: float
    y: float


@dataclass(frozen=True, kw_only=True)
class Thing:
    """An object as a caption describes it; `size` is "small", "large" or None (not said)."""

    colour: str
    shape: str
    size: str | None = None

    @property
    def novel(self) -> bool:
        return (self.colour, self.shape) in NOVEL_PAIRS


@dataclass(frozen=True, kw_only=True)
class Description:
    """One thing, or two with the relation of the first to the second, on a background."""

    things: tuple[Thing, ...]
    background: str
    relation: str | None = None

    @property
    def novel(self) -> bool:
        return any(thing.novel for thing in self.things)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A description with its exact geometry; `objects` follow the order of `description.things`."""

    objects: tuple[Obj, ...]
    background: str
    description: Description


def caption(description: Description, background_first: bool = False) -> str:
    """The English text of a description, in one of two word orders."""
    names = [" ".join(w for w in ("a", t.size, t.colour, t.shape) if w) for t in description.things]
    subject = f" {description.relation} ".join(names)
    place = f"on a {description.background} background"
    return f"{place} {subject}" if background_first else f"{subject} {place}"


def reference(description: Description) -> dict[str, Any]:
    """The JSON-able truth that the oracle scores against."""
    return {
        "objects": [asdict(thing) for thing in description.things],
        "relation": description.relation,
        "background": description.background,
    }


def from_reference(record: dict[str, Any]) -> Description:
    """The description of a `reference` (its inverse). Raises KeyError or TypeError for a malformed one."""
    things = tuple(Thing(**thing) for thing in record["objects"])
    return Description(things=things, background=record["background"], relation=record["relation"])


def canonical(description: Description) -> Description:
    """One description for all that say the same: "A right of B" becomes "B left of A"."""
    mirror = {"right of": "left of", "below": "above"}.get(description.relation or "")
    if mirror is None:
        return description
    return replace(description, things=description.things[::-1], relation=mirror)


def parse(text: str) -> Description:
    """The description that a caption of this module states. Raises ValueError for any other text."""
    head, found, tail = text.partition("on a ")
    if not found:
        raise ValueError(f"no background in {text!r}")
    background, _, rest = tail.partition(" background")
    subject = (head or rest).strip()
    relation = next((r for r in RELATIONS if f" {r} " in subject), None)
    parts = subject.split(f" {relation} ") if relation else [subject]
    stated = Description(things=tuple(map(_parse_thing, parts)), background=background, relation=relation)
    if text not in (caption(stated), caption(stated, background_first=True)):
        raise ValueError(f"not a caption of this world: {text!r}")
    return stated


def _parse_thing(text: str) -> Thing:
    words = text.split()[1:]
    known = len(words) in (2, 3) and words[-1] in SHAPES and words[-2] in COLOURS
    if not known or not set(words[:-2]) <= set(SIZES):
        raise ValueError(f"not an object: {text!r}")
    return Thing(colour=words[-2], shape=words[-1], size=words[0] if len(words) == 3 else None)


def all_descriptions(count: int) -> Iterator[Description]:
    """Every canonical description of `count` (1 or 2) things, the novel ones included, in a fixed order."""
    kinds = list(product(COLOURS, SHAPES))
    if count == 1:
        for (colour, shape), size, background in product(kinds, (None, *SIZES), BACKGROUNDS):
            yield Description(things=(Thing(colour=colour, shape=shape, size=size),), background=background)
        return
    for one, two, relation, background in product(kinds, kinds, ("left of", "above"), BACKGROUNDS):
        if one != two:  # two equal things would make the relation true either way
            things = (Thing(colour=one[0], shape=one[1]), Thing(colour=two[0], shape=two[1]))
            yield Description(things=things, background=background, relation=relation)


def sample_description(rng: np.random.Generator, *, pair_fraction: float = 0.7) -> Description:
    """A random description without novel pairs; two things with probability `pair_fraction`."""
    count = 2 if rng.random() < pair_fraction else 1
    kinds: list[tuple[str, str]] = []
    while len(kinds) < count:
        kind = (_pick(rng, tuple(COLOURS)), _pick(rng, SHAPES))
        if kind not in NOVEL_PAIRS and kind not in kinds:
            kinds.append(kind)
    size = _pick(rng, (None, *SIZES)) if count == 1 else None
    things = tuple(Thing(colour=c, shape=s, size=size) for c, s in kinds)
    relation = _pick(rng, RELATIONS) if count == 2 else None
    return Description(things=things, background=_pick(rng, tuple(BACKGROUNDS)), relation=relation)


def _pick(rng: np.random.Generator, options: tuple[Any, ...]) -> Any:
    return options[int(rng.integers(len(options)))]


def sample_scene(rng: np.random.Generator, description: Description) -> Scene:
    """Random geometry that makes `description` true, inside the margins and without overlap."""
    things = description.things
    if len(things) == 1:
        radius = RADII[things[0].size]
        corners = tuple(product((NEAR, FAR), repeat=2)) if NEAR - radius >= MARGIN else ()
        places = [(radius, *_pick(rng, ((CENTRE, CENTRE), *corners)))]
    else:
        places = _place_pair(rng, description.relation or "")
    objects = tuple(
        Obj(shape=t.shape, colour=t.colour, size=r, x=x, y=y) for t, (r, x, y) in zip(things, places, strict=True)
    )
    return Scene(objects=objects, background=description.background, description=description)


def _place_pair(rng: np.random.Generator, relation: str) -> list[tuple[float, float, float]]:
    """(radius, x, y) of two objects, the first in `relation` to the second."""
    along, across = (NEAR, FAR), _pick(rng, (NEAR, CENTRE, FAR))
    if relation in ("right of", "below"):
        along = along[::-1]
    if relation in ("left of", "right of"):
        return [(PAIR_RADIUS, place, across) for place in along]
    return [(PAIR_RADIUS, across, place) for place in along]


def _spoken(rng: np.random.Generator, description: Description) -> tuple[Description, str]:
    """A canonical description turned round half of the time, and its caption in a random word order."""
    if description.relation and rng.random() < 0.5:
        turned = {"left of": "right of", "above": "below"}[description.relation]
        description = replace(description, things=description.things[::-1], relation=turned)
    return description, caption(description, background_first=bool(rng.random() < 0.5))


def _record(kind: str, index: int, description: Description, text: str) -> dict[str, Any]:
    tags = ["single" if len(description.things) == 1 else "pair"]
    tags += [f"relation:{description.relation}"] if description.relation else []
    tags += ["size"] if description.things[0].size else []
    tags += ["novel"] if description.novel else []
    return {"id": f"{kind}-{index:04d}", "text": text, "reference": reference(description), "tags": tags}


def shuffled(rng: np.random.Generator, items: Iterable[Any]) -> list[Any]:
    pool = list(items)
    return [pool[i] for i in rng.permutation(len(pool))]


@lru_cache(maxsize=1)
def heldout_descriptions() -> tuple[Description, ...]:
    """The canonical descriptions of the held-out prompts: one in four has a never-trained pair."""
    rng = np.random.default_rng(PROMPT_SEED)
    singles, pairs = (shuffled(rng, all_descriptions(count)) for count in (1, 2))
    known = [d for d in singles if not d.novel][:HELDOUT_SINGLE] + [d for d in pairs if not d.novel][:HELDOUT_PAIR]
    few = HELDOUT_NOVEL // 4
    novel = [d for d in singles if d.novel][:few] + [d for d in pairs if d.novel][: HELDOUT_NOVEL - few]
    return tuple(shuffled(rng, known + novel))


def build_prompts() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The training and held-out prompt records; deterministic, all texts distinct, no shared description."""
    heldout = heldout_descriptions()
    closed = set(heldout)
    rng = np.random.default_rng(PROMPT_SEED + 1)
    held_records = [_record("heldout", i, *_spoken(rng, d)) for i, d in enumerate(heldout)]
    open_ = [[d for d in all_descriptions(c) if d not in closed and not d.novel] for c in (1, 2)]
    # There are few one-object descriptions, so each is used in both word orders.
    spoken = [(d, caption(d, background_first=first)) for d in open_[0] for first in (False, True)]
    spoken += [_spoken(rng, d) for d in shuffled(rng, open_[1])[: TRAIN_PROMPTS - len(spoken)]]
    order = rng.permutation(len(spoken))
    return [_record("train", i, *spoken[j]) for i, j in enumerate(order)], held_records


def load_prompts(name: str) -> list[dict[str, Any]]:
    """The records of `prompts/<name>.jsonl`. Raises FileNotFoundError."""
    return [json.loads(line) for line in (PROMPT_DIR / f"{name}.jsonl").read_text().splitlines()]


def write_prompts(name: str, records: Sequence[dict[str, Any]]) -> None:
    """Writes `prompts/<name>.jsonl`."""
    PROMPT_DIR.mkdir(exist_ok=True)
    path = PROMPT_DIR / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    print(f"{path.name}: {len(records)} prompts")


if __name__ == "__main__":
    for name, records in zip(("shapes_train", "shapes_heldout"), build_prompts(), strict=True):
        write_prompts(name, records)
