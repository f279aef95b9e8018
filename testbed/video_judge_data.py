"""What the tiny judge of clips learns from: clips of two kinds, in pairs with a prompt, read and compared by the oracle.

Clips are renders, partly wrong and partly spoilt, and the tiny Wan's own samples where it is there. As in
`testbed.judge_data` both are made once and kept in `testbed/.build`, all chance comes from the generator that is passed
in, and no prompt tells of what a held-out one does. Of a clip only the frames that a judge is shown are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import ndimage

from reward_server.families.chat import frame_indices
from testbed import clips as world
from testbed.clips import DIRECTIONS, FRAMES, SIDE, SPEEDS, Description, Kind, pick
from testbed.judge_data import SIBLINGS, MediaBank, Pair, pair_of, siblings, to_bytes
from testbed.judge_model import CLIPS
from testbed.preference import NEAR, frame_times
from testbed.render import render
from testbed.scenes import BACKGROUNDS, COLOURS, NOVEL_PAIRS, SHAPES, load_prompts
from testbed.video_judge_trace import JudgedClip, judged
from testbed.video_oracle import ClipReading, read_clip

SEEN = frame_indices(FRAMES, CLIPS.pictures)
"""The frames that a judge is shown."""
SAMPLED = 0.6
"""Share of the generator's samples among clips, where it is there."""
STRANGERS = 0.2
"""Share of pairs of two clips with a prompt that neither was made for; the others are siblings."""
EVEN = 0.12
"""Share of pairs that are drawn until alignment is as good as equal, which by chance few are."""


class ClipBank(MediaBank[JudgedClip]):
    """Clips as a judge sees them: uint8 [P, SIBLINGS, 8, 48, 48, 3]."""

    def reference(self, prompt: int) -> dict[str, Any]:
        return world.reference(world.parse(self.texts[prompt]))

    def judge(self, image: np.ndarray, reference: Mapping[str, Any]) -> JudgedClip:
        return judged(read_clip(image, frame_times(len(image))), reference)


# ---------------------------------------------------------------- prompts


def training_texts(count: int, seed: int, novel: float = 0.0) -> list[str]:
    """Random captions that tell of nothing held out; a share `novel` of them names a kind that the tiny Wan never saw."""
    rng = np.random.default_rng(seed)
    return [_spoken(rng, _fair(lambda: any_description(rng, novel))) for _ in range(count)]


def heldout_texts() -> list[str]:
    return [record["text"] for record in load_prompts("shapes_video_heldout")]


def any_description(rng: np.random.Generator, novel: float = 0.15) -> Description:
    """A random description; with chance `novel` its first thing is of a kind that the tiny Wan never saw."""
    told = world.sample_description(rng)
    if rng.random() >= novel:
        return told
    return replace(told, things=(pick(rng, sorted(NOVEL_PAIRS)), *told.things[1:]))


def _fair(propose: Callable[[], Description]) -> Description:
    """The first proposal that may be asked: nothing held out, and two things that differ in kind."""
    while True:
        told = propose()
        if len(set(told.things)) == len(told.things) and world.gist(told) not in world.heldout_gists():
            return told


def _spoken(rng: np.random.Generator, told: Description) -> str:
    return world.caption(told, background_first=bool(rng.random() < 0.5))


def misdrawn(rng: np.random.Generator, told: Description, changes: int) -> Description:
    """A description that differs from the given one in so many random places."""
    for _ in range(changes):
        told = _changed(rng, told)
    return told


def _changed(rng: np.random.Generator, told: Description) -> Description:
    """One random change: background, number, motion, or an object's colour or shape."""
    place = rng.random()
    if place < 0.12:
        return replace(told, background=pick(rng, tuple(BACKGROUNDS)))
    if place < 0.24:
        return _recounted(rng, told)
    if place < 0.55:
        return _redirected(rng, told)
    which = int(rng.integers(len(told.things)))
    colour, shape = told.things[which]
    new = (pick(rng, tuple(COLOURS)), shape) if rng.random() < 0.5 else (colour, pick(rng, SHAPES))
    return replace(told, things=tuple(new if i == which else kind for i, kind in enumerate(told.things)))


def _recounted(rng: np.random.Generator, told: Description) -> Description:
    """One object more or less."""
    if len(told.things) == 2:
        which = int(rng.integers(2))
        return replace(told, things=(told.things[which],), direction=told.directions[which])
    return replace(told, things=(*told.things, (pick(rng, tuple(COLOURS)), pick(rng, SHAPES))), route=None)


def _redirected(rng: np.random.Generator, told: Description) -> Description:
    """Another direction, speed or route."""
    if told.route:
        return pick(rng, tuple(world.routes(told.things[0], told.background)))
    if rng.random() < 0.5:
        return replace(told, speed=pick(rng, tuple(SPEEDS)))
    return replace(told, direction=pick(rng, tuple(DIRECTIONS)))


# ---------------------------------------------------------------- renders


@dataclass
class Play:
    """What a render shows in each frame: a background, and of each thing its kind (None: not there) and place."""

    backgrounds: list[str]
    kinds: list[list[Kind | None]]
    paths: np.ndarray
    """Pixels [things, frames, 2]."""


def draw_renders(rng: np.random.Generator, texts: Sequence[str]) -> np.ndarray:
    """Clips [n, 8, 48, 48, 3] of captions, most of them with up to three errors, most of them spoilt."""
    told = [misdrawn(rng, world.parse(text), int(rng.choice(4, p=(0.25, 0.3, 0.25, 0.2)))) for text in texts]
    return np.stack([spoilt_render(rng, description) for description in told])


def spoilt_render(rng: np.random.Generator, told: Description) -> np.ndarray:
    """A render of a description: of three, one is as it should be, the others move or look wrong, or both."""
    play = staged(rng, told)
    if rng.random() < 0.45:
        for fault in rng.permutation(len(_PLAY_FAULTS))[: 1 + int(rng.random() < 0.3)]:
            _PLAY_FAULTS[int(fault)](rng, play)
    frames = drawn(play)
    return pick(rng, _PIXEL_FAULTS)(rng, frames) if rng.random() < 0.4 else frames


def staged(rng: np.random.Generator, told: Description) -> Play:
    """A description played as it should be; in a third of the cases not quite at its usual places."""
    clip = world.sample_clip(rng, told)
    paths = np.array(clip.paths)[:, SEEN]
    if rng.random() < 1 / 3:
        paths = _inside(paths + rng.normal(0, 2.5, (len(paths), 1, 2)))
    count = len(SEEN)
    return Play([told.background] * count, [[kind] * count for kind in told.things], paths)


def drawn(play: Play) -> np.ndarray:
    """uint8 [8, 48, 48, 3]."""
    return np.stack([_drawn_frame(play, k) for k in range(len(play.backgrounds))])


def _drawn_frame(play: Play, k: int) -> np.ndarray:
    there = [(kinds[k], path[k]) for kinds, path in zip(play.kinds, play.paths, strict=True)]
    seen = [(kind, (float(x), float(y))) for kind, (x, y) in there if kind is not None]
    return render(world.frame(play.backgrounds[k], [kind for kind, _ in seen], [place for _, place in seen]), SIDE)


def _inside(paths: np.ndarray) -> np.ndarray:
    return np.clip(paths, 5, SIDE - 5)


def _some(rng: np.random.Generator, play: Play) -> int:
    return int(rng.integers(len(play.paths)))


def _moment(rng: np.random.Generator) -> int:
    """A frame that is neither the first nor the last."""
    return int(rng.integers(1, len(SEEN) - 1))


def _freeze(rng: np.random.Generator, play: Play) -> None:
    """Everything stands still, all the time or from some moment on."""
    since = int(rng.integers(len(SEEN) - 1)) if rng.random() < 0.5 else 0
    play.paths[:, since:] = play.paths[:, since : since + 1]


def _jitter(rng: np.random.Generator, play: Play) -> None:
    play.paths = _inside(play.paths + rng.normal(0, rng.uniform(0.5, 4), play.paths.shape))


def _stray(rng: np.random.Generator, play: Play) -> None:
    """A thing goes straight to another place, which may be near."""
    which = _some(rng, play)
    start, along = play.paths[which, 0], np.array(SEEN)[:, None] / (FRAMES - 1)
    play.paths[which] = _inside(start + along * (rng.uniform(5, SIDE - 5, 2) - start))


def _jump(rng: np.random.Generator, play: Play) -> None:
    """A thing leaps aside at some moment."""
    which, since = _some(rng, play), _moment(rng)
    play.paths[which, since:] = _inside(play.paths[which, since:] + rng.normal(0, 8, 2))


def _transform(rng: np.random.Generator, play: Play) -> None:
    """A thing becomes another at some moment, for good or for a while."""
    which, since = _some(rng, play), _moment(rng)
    until = int(rng.integers(since + 1, len(SEEN) + 1))
    old = play.kinds[which][0]
    assert old is not None, "things are there at the beginning"
    new = (pick(rng, tuple(COLOURS)), old[1]) if rng.random() < 0.6 else (old[0], pick(rng, SHAPES))
    play.kinds[which][since:until] = [new] * (until - since)


def _vanish(rng: np.random.Generator, play: Play) -> None:
    """A thing is gone from some moment on, or in single frames."""
    which, since = _some(rng, play), _moment(rng)
    gone = range(since, len(SEEN)) if rng.random() < 0.5 else np.flatnonzero(rng.random(len(SEEN) - 1) < 0.3) + 1
    for k in gone:
        play.kinds[which][int(k)] = None


def _flicker(rng: np.random.Generator, play: Play) -> None:
    """Another background in some frames."""
    other, chance = pick(rng, tuple(BACKGROUNDS)), rng.uniform(0.1, 0.5)
    play.backgrounds = [other if rng.random() < chance else usual for usual in play.backgrounds]


_PLAY_FAULTS = (_freeze, _jitter, _stray, _jump, _transform, _vanish, _flicker)


def _blur(rng: np.random.Generator, frames: np.ndarray) -> np.ndarray:
    return to_bytes(ndimage.gaussian_filter(frames.astype(np.float32), (0, *[rng.uniform(0.4, 2.0)] * 2, 0)))


def _smear(rng: np.random.Generator, frames: np.ndarray) -> np.ndarray:
    """What is near in time shines through."""
    return to_bytes(ndimage.gaussian_filter1d(frames.astype(np.float32), rng.uniform(0.3, 0.9), axis=0))


def _noise(rng: np.random.Generator, frames: np.ndarray) -> np.ndarray:
    return to_bytes(frames + rng.normal(0, rng.uniform(2, 35), frames.shape))


def _ghost(rng: np.random.Generator, frames: np.ndarray) -> np.ndarray:
    """Another clip shines through."""
    share = rng.uniform(0.15, 0.5)
    return to_bytes((1 - share) * frames + share * drawn(staged(rng, world.sample_description(rng))))


def _tint(rng: np.random.Generator, frames: np.ndarray) -> np.ndarray:
    return to_bytes(frames * rng.uniform(0.8, 1.15, 3) + rng.normal(0, 12, 3))


_PIXEL_FAULTS = (_blur, _smear, _noise, _ghost, _tint)


# ---------------------------------------------------------------- pairs


@dataclass(frozen=True, kw_only=True)
class ClipMaterial:
    """The renders and, where the tiny Wan is there, its samples."""

    renders: ClipBank
    samples: ClipBank | None = None

    def _bank(self, rng: np.random.Generator) -> ClipBank:
        return self.samples if self.samples is not None and rng.random() < SAMPLED else self.renders

    def clip(self, rng: np.random.Generator) -> tuple[np.ndarray, ClipReading]:
        """Any clip [8, 48, 48, 3] and what the oracle reads."""
        bank = self._bank(rng)
        key = int(rng.integers(len(bank.texts))), int(rng.integers(SIBLINGS))
        return bank.images[key], bank.judged(*key).reading

    def pair(self, rng: np.random.Generator) -> Pair[JudgedClip]:
        """A pair with a better clip, in random order."""
        even = rng.random() < EVEN
        while True:
            made = self._any_pair(rng)
            if made is not None and (not even or is_even(made)):
                return made

    def _any_pair(self, rng: np.random.Generator) -> Pair[JudgedClip] | None:
        bank = self._bank(rng)
        if rng.random() < STRANGERS:
            return strangers(rng, bank)
        one, two = (int(i) for i in rng.permutation(SIBLINGS)[:2])
        return siblings(bank, int(rng.integers(len(bank.texts))), one, two)


def is_even(pair: Pair[JudgedClip]) -> bool:
    """Whether alignment is as good as equal, so that quality and steadiness decide."""
    one, two = (clip.score.alignment for clip in pair.judged)
    return abs(one - two) < NEAR


def strangers(rng: np.random.Generator, bank: ClipBank) -> Pair[JudgedClip] | None:
    """Two clips of any prompts, for a prompt near to what the first or the second shows."""
    keys = [(int(rng.integers(len(bank.texts))), int(rng.integers(SIBLINGS))) for _ in range(2)]
    readings = [bank.judged(*key).reading for key in keys]
    near = readings[int(rng.integers(2))]
    told = _fair(lambda: misdrawn(rng, _told(rng, near), int(rng.integers(3))))
    reference = world.reference(told)
    one, two = (judged(reading, reference) for reading in readings)
    return pair_of(_spoken(rng, told), reference, (bank.images[keys[0]], bank.images[keys[1]]), (one, two))


def _told(rng: np.random.Generator, reading: ClipReading) -> Description:
    """A description of what a clip shows, filled up by chance where it cannot be read."""
    chance, objects = any_description(rng), reading.objects[:2]
    if not objects:
        return chance
    told = Description(
        things=tuple((moved.colour, moved.shape) for moved in objects),
        direction=objects[0].direction or chance.direction,
        speed=objects[0].speed or chance.speed,
        background=reading.background or chance.background,
    )
    if len(objects) == 2 or rng.random() < 0.5:
        return told
    ways = world.routes(told.things[0], told.background)
    return pick(rng, [way for way in ways if (way.direction, way.speed) == (told.direction, told.speed)])
