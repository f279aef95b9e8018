"""What the tiny judge learns from: pictures of two kinds, in pairs with a prompt, read and compared by the oracle.

Pictures are the tiny FLUX's own samples and renders, partly wrong and partly spoilt. Both are made once and kept in
`testbed/.build`. All chance comes from the generator that is passed in, so a training step can be repeated.
Held-out descriptions appear in no prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from scipy import ndimage

from testbed import oracle
from testbed import scenes as world
from testbed.judge_trace import Judged, winner_of
from testbed.preference import Score
from testbed.render import render
from testbed.scenes import Description, Obj, Thing

SIBLINGS = 4
CHUNK = 250  # prompts in one file of a bank
SIDE = world.CANVAS
Draw = Callable[[np.random.Generator, Sequence[str]], np.ndarray]
"""Texts [n] to images uint8 [n, 64, 64, 3], or to clips uint8 [n, 8, 48, 48, 3]."""


class Scored(Protocol):
    """What an oracle finds in one candidate for one prompt."""

    @property
    def score(self) -> Score: ...


J = TypeVar("J", bound=Scored)


@dataclass(frozen=True, kw_only=True)
class Pair(Generic[J]):
    """Two pictures uint8 [64, 64, 3], or clips, in the order shown, and what the oracle finds; one of them is better."""

    text: str
    reference: Mapping[str, Any]
    images: tuple[np.ndarray, np.ndarray]
    judged: tuple[J, J]

    def swapped(self) -> Pair[J]:
        return replace(self, images=self.images[::-1], judged=self.judged[::-1])


@dataclass(frozen=True, kw_only=True)
class MediaBank(Generic[J]):
    """Pictures or clips for P prompts, uint8 [P, SIBLINGS, …]; the oracle reads one when it is first asked for."""

    texts: Sequence[str]
    images: np.ndarray
    _judged: dict[tuple[int, int], J] = field(default_factory=dict, repr=False)

    def reference(self, prompt: int) -> dict[str, Any]:
        raise NotImplementedError

    def judge(self, image: np.ndarray, reference: Mapping[str, Any]) -> J:
        raise NotImplementedError

    def judged(self, prompt: int, sibling: int) -> J:
        """The oracle's findings about a candidate and its own prompt."""
        key = (prompt, sibling)
        if key not in self._judged:
            self._judged[key] = self.judge(self.images[key], self.reference(prompt))
        return self._judged[key]


class Bank(MediaBank[Judged]):
    """Pictures: uint8 [P, SIBLINGS, 64, 64, 3]."""

    def reference(self, prompt: int) -> dict[str, Any]:
        return world.reference(world.parse(self.texts[prompt]))

    def judge(self, image: np.ndarray, reference: Mapping[str, Any]) -> Judged:
        return judge(image, reference)


def judge(image: np.ndarray, reference: Mapping[str, Any]) -> Judged:
    return Judged(reading=oracle.read(image), score=oracle.score(image, reference))


# ---------------------------------------------------------------- banks


def load_bank(folder: Path, texts: Sequence[str], draw: Draw, seed: int) -> Bank:
    """The bank of pictures kept in `folder`; what is missing is drawn and kept."""
    return Bank(texts=texts, images=load_images(folder, texts, draw, seed))


def load_images(folder: Path, texts: Sequence[str], draw: Draw, seed: int) -> np.ndarray:
    """What a bank shows, [P, SIBLINGS, …]; what `folder` does not hold is drawn, chunk by chunk, and kept there."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for start in range(0, len(texts), CHUNK):
        path = folder / f"{start:06d}.npz"
        if not path.exists():
            _draw_chunk(path, texts[start : start + CHUNK], draw, np.random.default_rng((seed, start)))
        with np.load(path) as kept:
            if kept["texts"].tolist() != list(texts[start : start + CHUNK]):
                raise ValueError(f"{path} holds other prompts; remove {folder} to draw anew")
            parts.append(kept["images"])
    return np.concatenate(parts)


def _draw_chunk(path: Path, texts: Sequence[str], draw: Draw, rng: np.random.Generator) -> None:
    images = draw(rng, [text for text in texts for _ in range(SIBLINGS)])
    scratch = path.with_name("part.tmp.npz")
    np.savez_compressed(scratch, texts=np.array(texts), images=images.reshape(len(texts), SIBLINGS, *images.shape[1:]))
    scratch.replace(path)
    print(f"{path.parent.name}: drew {path.name}", flush=True)


def training_texts(count: int, seed: int, novel: float = 0.0) -> list[str]:
    """Random captions that are not held out; a share `novel` of them names a pair that the tiny FLUX never saw."""
    rng = np.random.default_rng(seed)
    return [_spoken(rng, _fair(rng, lambda: any_description(rng, novel))) for _ in range(count)]


def heldout_texts() -> list[str]:
    return [record["text"] for record in world.load_prompts("shapes_heldout")]


def any_description(rng: np.random.Generator, novel: float = 0.15) -> Description:
    """A random description; with chance `novel` its first thing is of a kind that the tiny FLUX never saw."""
    description = world.sample_description(rng)
    if rng.random() >= novel:
        return description
    colour, shape = sorted(world.NOVEL_PAIRS)[int(rng.integers(len(world.NOVEL_PAIRS)))]
    things = (replace(description.things[0], colour=colour, shape=shape), *description.things[1:])
    return replace(description, things=things)


def _fair(rng: np.random.Generator, propose: Callable[[], Description]) -> Description:
    """The first proposal that may be asked: it is not held out, and its things differ in kind."""
    while True:
        told = propose()
        kinds = {(thing.colour, thing.shape) for thing in told.things}
        if len(kinds) == len(told.things) and world.canonical(told) not in _closed():
            return told


@lru_cache(maxsize=1)
def _closed() -> frozenset[Description]:
    return frozenset(world.canonical(description) for description in world.heldout_descriptions())


def _spoken(rng: np.random.Generator, description: Description) -> str:
    return world.caption(description, background_first=bool(rng.random() < 0.5))


# ---------------------------------------------------------------- renders


def draw_renders(rng: np.random.Generator, texts: Sequence[str]) -> np.ndarray:
    """Renders [n, 64, 64, 3] of captions, most of them with up to three errors, half of them spoilt."""
    told = [misdrawn(rng, world.parse(text), int(rng.choice(4, p=(0.25, 0.3, 0.25, 0.2)))) for text in texts]
    return np.stack([spoilt_render(rng, description) for description in told])


def spoilt_render(rng: np.random.Generator, description: Description) -> np.ndarray:
    """A render of a description, in half of the cases with one or two faults."""
    image = _moved_render(rng, description)
    if rng.random() < 0.5:
        for fault in rng.permutation(len(_FAULTS))[: 1 + int(rng.random() < 0.3)]:
            image = _FAULTS[int(fault)](rng, image)
    return image


def _moved_render(rng: np.random.Generator, description: Description) -> np.ndarray:
    """Draws a scene; in a third of the cases its objects leave their places and take other sizes."""
    scene = world.sample_scene(rng, description)
    if rng.random() < 1 / 3:
        scene = replace(scene, objects=tuple(_nudged(rng, obj) for obj in scene.objects))
    return render(scene)


def _nudged(rng: np.random.Generator, obj: Obj) -> Obj:
    x, y = np.clip(np.array([obj.x, obj.y]) + rng.normal(0, 5, 2), 6, SIDE - 6)
    return replace(obj, x=float(x), y=float(y), size=float(np.clip(obj.size * rng.uniform(0.7, 1.3), 6, 20)))


def _blur(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    return to_bytes(ndimage.gaussian_filter(image.astype(np.float32), (*[rng.uniform(0.4, 2.0)] * 2, 0)))


def _noise(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    return to_bytes(image + rng.normal(0, rng.uniform(2, 35), image.shape))


def _ghost(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Another scene shines through."""
    other = render(world.sample_scene(rng, world.sample_description(rng)))
    share = rng.uniform(0.15, 0.5)
    return to_bytes((1 - share) * image + share * other)


def _tint(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    return to_bytes(image * rng.uniform(0.8, 1.15, 3) + rng.normal(0, 12, 3))


def _warp(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """A smooth random displacement of up to a few pixels."""
    shifts = [ndimage.gaussian_filter(rng.normal(0, 1, (SIDE, SIDE)), 8) for _ in range(2)]
    rows, cols = np.mgrid[:SIDE, :SIDE]
    scale = rng.uniform(15, 60)
    where = [rows + scale * shifts[0], cols + scale * shifts[1]]
    channels = [
        ndimage.map_coordinates(image[..., c].astype(np.float32), where, order=1, mode="nearest") for c in range(3)
    ]
    return to_bytes(np.stack(channels, -1))


def _hole(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """The background's colour covers a part."""
    top, left = rng.integers(0, SIDE - 12, 2)
    height, width = rng.integers(6, 24, 2)
    image = image.copy()
    image[top : top + height, left : left + width] = image[0, 0]
    return image


_FAULTS = (_blur, _noise, _ghost, _tint, _warp, _hole)


def to_bytes(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def misdrawn(rng: np.random.Generator, description: Description, changes: int) -> Description:
    """A description that differs from the given one in so many random places."""
    for _ in range(changes):
        description = _changed(rng, description)
    return description


def _changed(rng: np.random.Generator, told: Description) -> Description:
    """One random change: background, number, relation, or an object's colour, shape or size."""
    other = world.sample_description(rng, pair_fraction=1.0)
    which = int(rng.integers(len(told.things)))
    place = rng.random()
    if place < 0.15:
        return replace(told, background=other.background)
    if place < 0.3:
        return _recounted(told, other, which)
    if place < 0.45 and told.relation:
        return replace(told, relation=other.relation)
    thing, new = told.things[which], other.things[0]
    kind = ("colour", "shape", "size")[int(rng.integers(3 if len(told.things) == 1 else 2))]
    size = (None, *world.SIZES)[int(rng.integers(3))] if kind == "size" else thing.size
    thing = replace(thing, size=size) if kind == "size" else replace(thing, **{kind: getattr(new, kind)})
    return replace(told, things=tuple(thing if i == which else t for i, t in enumerate(told.things)))


def _recounted(told: Description, other: Description, which: int) -> Description:
    """One object more or less."""
    if len(told.things) == 2:
        return replace(told, things=(told.things[which],), relation=None)
    things = (replace(told.things[0], size=None), other.things[1])
    return replace(told, things=things, relation=other.relation)


# ---------------------------------------------------------------- pairs

SHARES = {"samples": 0.5, "renders": 0.3, "strangers": 0.2}
"""Siblings of the generator, sibling renders, and two samples with a prompt that neither was made for."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """The tiny FLUX's samples and the renders."""

    samples: Bank
    renders: Bank

    def prompted(self, rng: np.random.Generator) -> tuple[str, Mapping[str, Any], np.ndarray, Judged]:
        """A prompt, its reference, a picture [64, 64, 3] made for it, and what the oracle finds."""
        bank = self.samples if rng.random() < 0.5 else self.renders
        prompt, sibling = int(rng.integers(len(bank.texts))), int(rng.integers(SIBLINGS))
        return bank.texts[prompt], bank.reference(prompt), bank.images[prompt, sibling], bank.judged(prompt, sibling)

    def pair(self, rng: np.random.Generator, shares: Mapping[str, float] = SHARES) -> Pair[Judged]:
        """A pair with a better picture, in random order; `shares` are those of the three kinds."""
        while True:
            kind = tuple(shares)[int(rng.choice(len(shares), p=tuple(shares.values())))]
            if kind == "strangers":
                made = strangers(rng, self.samples)
            else:
                bank = self.samples if kind == "samples" else self.renders
                one, two = (int(i) for i in rng.permutation(SIBLINGS)[:2])
                made = siblings(bank, int(rng.integers(len(bank.texts))), one, two)
            if made is not None:
                return made


def siblings(bank: MediaBank[J], prompt: int, one: int, two: int) -> Pair[J] | None:
    """Two candidates for one prompt, in this order; None where neither is better."""
    images = (bank.images[prompt, one], bank.images[prompt, two])
    judged = (bank.judged(prompt, one), bank.judged(prompt, two))
    return pair_of(bank.texts[prompt], bank.reference(prompt), images, judged)


def strangers(rng: np.random.Generator, bank: Bank) -> Pair[Judged] | None:
    """Two pictures of any prompts, for a prompt near to what the first or the second shows."""
    keys = [(int(rng.integers(len(bank.texts))), int(rng.integers(SIBLINGS))) for _ in range(2)]
    near = bank.judged(*keys[int(rng.integers(2))]).reading
    told = _fair(rng, lambda: misdrawn(rng, _told(rng, near), int(rng.integers(3))))
    reference = world.reference(told)
    images = (bank.images[keys[0]], bank.images[keys[1]])
    return pair_of(_spoken(rng, told), reference, images, (judge(images[0], reference), judge(images[1], reference)))


def pair_of(
    text: str,
    reference: Mapping[str, Any],
    images: tuple[np.ndarray, np.ndarray],
    judged: tuple[J, J],
) -> Pair[J] | None:
    """A pair, or None where neither is better."""
    if winner_of(judged[0].score, judged[1].score) is None:
        return None
    return Pair(text=text, reference=reference, images=images, judged=judged)


def _told(rng: np.random.Generator, reading: oracle.Reading) -> Description:
    """A description of what a picture shows, filled up by chance where it cannot be read."""
    chance = any_description(rng)
    objects = reading.objects[:2]
    if not objects:
        return chance
    things = tuple(Thing(colour=seen.colour, shape=seen.shape) for seen in objects)
    background = reading.background or chance.background
    if len(things) == 1:
        size = oracle.size_word(objects[0].size) if rng.random() < 0.5 else None
        return Description(things=(replace(things[0], size=size),), background=background)
    holding = [r for r in world.RELATIONS if oracle.relation_holds(r, objects[0], objects[1])]
    return Description(things=things, background=background, relation=holding[0] if holding else "left of")
