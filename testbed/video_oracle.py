"""Reads a clip of moving shapes from its frames alone, and scores it against a prompt's reference.

Every frame is read by `testbed.oracle`; what is seen is linked to tracks, and a straight line fitted to each track
says where it goes and how fast. Positions are in 1/64 of the shorter side of a frame, times run from 0 (first frame)
to 1 (last frame), so that a clip may have any size and any number of frames. No function raises on any uint8 frames.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from testbed import clips as world
from testbed.clips import DIRECTIONS, PLACES, SIDE, SPEEDS, Clip
from testbed.oracle import Checked, Reading, Seen, read
from testbed.scenes import CANVAS

LASTING = 2 / 3  # share of the frames that must agree before something is said of the whole clip
PRESENT = 1 / 3  # share of the frames from which a track counts as an object
STILL = 6.0  # way over the whole clip, in 1/64 of the side; the shortest true one has 21
STRAIGHT = 2.0  # how many times longer the way is along its main axis than across it
REACH = 14.0  # the farthest that an object is looked for from where it is expected, per missed frame
WORD_COST = {"colour": 8.0, "shape": 4.0}  # how much distance a changed colour or shape counts when tracks are linked

_HOP = (PLACES[1] - PLACES[0]) * CANVAS / SIDE  # the way of a slow object
CHECK_SEED, CHECK_CLIPS = 101, 400


@dataclass
class Track:
    """One thing followed through the clip: `seen` by the index of the frame."""

    seen: dict[int, Seen] = field(default_factory=dict)

    def expected(self, frame: int) -> tuple[np.ndarray, int]:
        """Position where it should be in `frame`, by its last two sightings, and how many frames ago it was seen."""
        last = sorted(self.seen)[-2:]
        here = _at(self.seen[last[-1]])
        speed = (here - _at(self.seen[last[0]])) / max(1, last[-1] - last[0])
        return here + speed * (frame - last[-1]), frame - last[-1]


@dataclass(frozen=True, kw_only=True)
class Moved:
    """A track's summary. `colour` and `shape` are those of most sightings; `start` and `end` are fitted (x, y).

    `present` and `kept` are shares of all frames: seen at all, and seen with that very colour and shape.
    `smooth` in [0, 1] says how nearly it moves evenly along a line; `step` is its way per frame along that line.
    """

    colour: str
    shape: str
    colour_share: float
    shape_share: float
    present: float
    kept: float
    start: tuple[float, float]
    end: tuple[float, float]
    smooth: float
    step: float

    @property
    def direction(self) -> str | None:
        """The direction word; None where it stands still, goes aslant or was not seen long enough."""
        way = np.subtract(self.end, self.start)
        axis = int(abs(way[1]) > abs(way[0]))
        if self.present < LASTING or abs(way[axis]) < max(STILL, STRAIGHT * abs(way[1 - axis])):
            return None
        return next(n for n, d in DIRECTIONS.items() if d.axis == axis and d.sign == np.sign(way[axis]))

    @property
    def speed(self) -> str | None:
        """The speed word whose way is nearest; None where there is no direction or the way is far from both."""
        if self.direction is None:
            return None
        hops = float(np.abs(np.subtract(self.end, self.start)).max()) / _HOP
        word = min(SPEEDS, key=lambda name: abs(SPEEDS[name] - hops))
        return word if abs(SPEEDS[word] - hops) <= 0.5 else None


@dataclass(frozen=True, kw_only=True)
class ClipReading:
    """All that the oracle sees: the objects, the longest seen first, and shares and means over the frames.

    `steady` is the share of frames with the usual background and the usual number of objects. `dynamic` is the mean
    displacement per frame of the objects that are seen long enough; None where there is no such object: an empty clip is
    not a frozen one.
    """

    background: str | None
    objects: tuple[Moved, ...]
    quality: float
    steady: float
    dynamic: float | None


@dataclass(frozen=True, kw_only=True)
class ClipScore(Checked):
    """What holds of a reference. Attribute names end in .colour, .shape, .direction, .speed, .start, .end, or are
    passing, background, count; "extra1.colour" and so on never hold.

    `kept` (identity), `smooth`, `steady` and `quality` lie in [0, 1]; `dynamic` is the mean displacement of the
    objects per frame, in hundredths of the shorter side, None where none is seen long enough.
    """

    kept: float
    smooth: float
    steady: float
    quality: float
    dynamic: float | None
    legible: bool


@dataclass(frozen=True)
class VideoOracle:
    """The oracle as a reward: media uint8 [F, H, W, 3] and a prompt record with `.reference`.

    "dynamic" is left out where no object is seen long enough. Raises ValueError for media of another form.
    """

    def __call__(self, media: np.ndarray, prompt: Any) -> dict[str, float]:
        result = score(media, prompt.reference)
        names = ("kept", "smooth", "steady", "quality")
        return {
            "oracle": result.alignment,
            "exact": float(result.exact),
            "legible": float(result.legible),
            **{name: float(getattr(result, name)) for name in names},
            **({} if result.dynamic is None else {"dynamic": result.dynamic}),
        }


# ---------------------------------------------------------------- reading


def read_clip(frames: np.ndarray, times: Sequence[float] | None = None) -> ClipReading:
    """Reads a clip.

    Args:
        frames: uint8 [F, H, W, 3].
        times: when each frame is, from 0 to 1 and rising; evenly spaced unless given.

    Raises:
        ValueError: another form or type.
    """
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"expected uint8 [F, H, W, 3], got {frames.dtype} {frames.shape}")
    readings = [read(frame) for frame in frames]
    when = np.linspace(0, 1, len(frames)) if times is None else np.asarray(times, float)
    moved = [_summary(track, when) for track in _tracks(readings)]
    objects = tuple(sorted((m for m in moved if m.present >= PRESENT), key=lambda m: -m.kept))
    backgrounds = Counter(reading.background for reading in readings)
    background, share = backgrounds.most_common(1)[0]
    steps = [m.step for m in objects if m.present >= LASTING]
    return ClipReading(
        background=background if share >= LASTING * len(frames) else None,
        objects=objects,
        quality=float(np.mean([reading.quality for reading in readings])),
        steady=_steady(readings, background),
        dynamic=float(np.mean(steps)) * 100 / CANVAS if steps else None,
    )


def _at(seen: Seen) -> np.ndarray:
    return np.array([seen.x, seen.y])


def _tracks(readings: Sequence[Reading]) -> list[Track]:
    """Links the objects of successive frames, the nearest and most alike first."""
    tracks: list[Track] = []
    for frame, reading in enumerate(readings):
        left = list(reading.objects)
        for track, seen in _links(tracks, reading.objects, frame):
            track.seen[frame] = seen
            left.remove(seen)
        tracks += [Track({frame: seen}) for seen in left]
    return tracks


def _links(tracks: Sequence[Track], objects: Sequence[Seen], frame: int) -> list[tuple[Track, Seen]]:
    """The best assignment of objects to tracks, without those that lie out of reach."""
    if not tracks or not objects:
        return []
    apart = np.empty((len(tracks), len(objects)))
    unlike = np.empty_like(apart)
    for i, track in enumerate(tracks):
        place, missed = track.expected(frame)
        last = track.seen[max(track.seen)]
        for j, seen in enumerate(objects):
            apart[i, j] = np.hypot(*(_at(seen) - place)) / missed
            unlike[i, j] = sum(c for word, c in WORD_COST.items() if getattr(seen, word) != getattr(last, word))
    reachable = apart <= REACH
    rows, columns = linear_sum_assignment(np.where(reachable, apart + unlike, 1e6))
    return [(tracks[i], objects[j]) for i, j in zip(rows, columns, strict=True) if reachable[i, j]]


def _summary(track: Track, when: np.ndarray) -> Moved:
    indices, seen = zip(*sorted(track.seen.items()), strict=True)
    colour, with_colour = Counter(s.colour for s in seen).most_common(1)[0]
    shape, with_shape = Counter(s.shape for s in seen).most_common(1)[0]
    same = sum(s.colour == colour and s.shape == shape for s in seen)
    places, times, frames = np.array([_at(s) for s in seen]), when[list(indices)], len(when)
    start, end, rest = _line(places, times)
    return Moved(
        colour=colour,
        shape=shape,
        colour_share=with_colour / frames,
        shape_share=with_shape / frames,
        present=len(seen) / frames,
        kept=same / frames,
        start=start,
        end=end,
        smooth=float(np.clip((4.0 - rest) / 3.0, 0, 1)) if len(seen) > 2 else 0.0,
        step=float(np.hypot(*np.subtract(end, start))) / max(1, frames - 1),
    )


def _line(places: np.ndarray, times: np.ndarray) -> tuple[tuple[float, float], tuple[float, float], float]:
    """Where an even motion fitted to `places` [n, 2] starts and ends, and how far (rms) the places lie from it."""
    centre, middle = times.mean(), places.mean(0)
    spread = ((times - centre) ** 2).sum()
    velocity = ((times - centre)[:, None] * (places - middle)).sum(0) / spread if spread > 0 else np.zeros(2)
    rest = places - middle - (times - centre)[:, None] * velocity
    start, end = middle - centre * velocity, middle + (1 - centre) * velocity
    return (float(start[0]), float(start[1])), (float(end[0]), float(end[1])), float(np.sqrt((rest**2).sum(1).mean()))


def _steady(readings: Sequence[Reading], background: str | None) -> float:
    usual = Counter(len(reading.objects) for reading in readings).most_common(1)[0][0]
    return float(np.mean([r.background == background and len(r.objects) == usual for r in readings]))


# ---------------------------------------------------------------- scoring


def score(frames: np.ndarray, reference: Mapping[str, Any], times: Sequence[float] | None = None) -> ClipScore:
    """Scores a clip, uint8 [F, H, W, 3], against a reference (see `clips.reference`).

    Described objects are paired with seen ones so that most of their own attributes hold. Passing each other only
    counts where both partners have their colour or their shape right: else it would say nothing. An object that
    nobody asked for is wrong in colour and in shape; otherwise it would pay to show one of everything.
    Raises ValueError for a malformed clip and KeyError for a malformed reference.
    """
    return score_reading(read_clip(frames, times), reference)


def score_reading(reading: ClipReading, reference: Mapping[str, Any]) -> ClipScore:
    """The score of a clip that has been read. Raises KeyError for a malformed reference."""
    wanted = reference["objects"]
    padded = (*reading.objects[:4], *(None,) * len(wanted))
    # Equal pairings are tried once, in the order in which objects were seen: a set's order differs between processes.
    pairings = dict.fromkeys(permutations(padded, len(wanted)))
    options = [(_attributes(reference, chosen), chosen) for chosen in pairings]
    best, chosen = max(options, key=lambda option: (_own(option[0]), sum(option[0].values())))
    attributes = best | {
        "background": reading.background == reference["background"],
        "count": len(reading.objects) == len(wanted),
    }
    for i in range(1, len(reading.objects) - len(wanted) + 1):
        attributes |= {f"extra{i}.colour": False, f"extra{i}.shape": False}
    found = [moved for moved in chosen if moved is not None]
    return ClipScore(
        attributes=attributes,
        kept=sum(moved.kept for moved in found) / len(wanted),
        smooth=sum(moved.smooth for moved in found) / len(wanted),
        steady=reading.steady,
        quality=reading.quality,
        dynamic=reading.dynamic,
        legible=any(moved.kept >= LASTING for moved in reading.objects),
    )


def _own(held: Mapping[str, bool]) -> int:
    return sum(value for name, value in held.items() if name != "passing")


def _attributes(reference: Mapping[str, Any], chosen: Sequence[Moved | None]) -> dict[str, bool]:
    """Which attributes of the objects, and of the two together, hold for one pairing."""
    held: dict[str, bool] = {}
    for i, (thing, moved) in enumerate(zip(reference["objects"], chosen, strict=True), start=1):
        held |= {f"object{i}.{name}": value for name, value in _held(thing, moved).items()}
    if reference["passing"]:
        known = all(held[f"object{i}.colour"] or held[f"object{i}.shape"] for i in (1, 2))
        held["passing"] = known and passing(chosen[0], chosen[1])
    return held


def _held(thing: Mapping[str, Any], moved: Moved | None) -> dict[str, bool]:
    """Which of the attributes that a reference states hold of what was seen."""
    stated = ["colour", "shape", "direction", *(n for n in ("speed", "start", "end") if thing.get(n))]
    if moved is None:
        return dict.fromkeys(stated, False)
    shares = {"colour": moved.colour_share, "shape": moved.shape_share}
    return {
        name: place_holds(thing[name], thing["direction"], getattr(moved, name), moved.present)
        if name in ("start", "end")
        else getattr(moved, name) == thing[name] and shares.get(name, 1.0) >= LASTING
        for name in stated
    }


def place_holds(word: str, direction: str, position: tuple[float, float], present: float) -> bool:
    """Whether a place word is the nearest to a position, along the axis of a direction."""
    way = DIRECTIONS[direction]
    distances = [abs(place * CANVAS / SIDE - position[way.axis]) for place in PLACES]
    nearest = int(np.argmin(distances))
    return present >= LASTING and way.names[nearest] == word and distances[nearest] <= _HOP / 2


def passing(first: Moved | None, second: Moved | None) -> bool:
    """Whether two objects go opposite ways along one axis and change their order on it."""
    if first is None or second is None or first.direction is None or second.direction is None:
        return False
    way = DIRECTIONS[first.direction]
    before, after = first.start[way.axis] - second.start[way.axis], first.end[way.axis] - second.end[way.axis]
    return second.direction == way.opposite and before * after < 0


# ---------------------------------------------------------------- checks


def check_clips(count: int = CHECK_CLIPS, seed: int = CHECK_SEED) -> list[Clip]:
    """Seeded clips that no training step has drawn, with every fourth one novel."""
    rng = np.random.default_rng(seed)
    novel = [d for number in (1, 2) for d in world.all_descriptions(number) if d.novel]
    known = world.training_clips(rng, count - count // 4)
    return known + [world.sample_clip(rng, novel[i]) for i in rng.permutation(len(novel))[: count // 4]]


def score_clips(frames: np.ndarray, clips: Sequence[Clip]) -> list[ClipScore]:
    """Scores of clips uint8 [n, F, H, W, 3] against their own descriptions."""
    return [score(f, world.reference(c.description)) for f, c in zip(frames, clips, strict=True)]


def summary(scores: Sequence[ClipScore]) -> dict[str, Any]:
    """Means over clips, or over those that have the figure; `by_kind` are means over all attributes of a kind."""
    kinds: dict[str, list[bool]] = {}
    for one in scores:
        for name, held in one.attributes.items():
            kinds.setdefault(name.rpartition(".")[2], []).append(held)
    names = ("alignment", "exact", "legible", "kept", "smooth", "steady", "quality", "dynamic")
    found = {name: [value for one in scores if (value := getattr(one, name)) is not None] for name in names}
    means = {name: float(np.mean(values)) if values else 0.0 for name, values in found.items()}
    return {"clips": len(scores), **means, "by_kind": {k: float(np.mean(v)) for k, v in sorted(kinds.items())}}
