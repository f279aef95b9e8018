"""What the tiny judge of clips writes, and its teacher: the oracle's findings as a Flex trace about two videos.

As in `testbed.judge_trace`, a trace is a list of *pieces*, each of which is one token of the judge's own tokenizer. It
writes down what each clip shows and how that moves before it says what holds of the prompt, counts what holds before it
names a winner, and names the categories' winners before the overall one. Every prompt of this world asks for a motion,
so every trace has a fourth category about it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from reward_server.families.flex import category_names
from testbed.clips import BACKGROUNDS, COLOURS, DIRECTIONS, PLACES, SHAPES, SIDE, SPEEDS, routes
from testbed.judge_trace import measure, winner_of
from testbed.oracle import MAX_OBJECTS
from testbed.preference import NEAR, Watched, watched, winners
from testbed.scenes import CANVAS
from testbed.video_oracle import STILL, ClipReading, ClipScore, Moved, score_reading

COMPARE = "Which video serves the prompt better? Prompt:"
DESCRIBE = "Describe the video."
WORDING = COMPARE + " {prompt}"
"""The Flex family's wording for this judge, saved as `prompt.txt` beside its weights."""
SHOWN = 3  # objects that a trace names; of more it says that there are more

_LETTERS = "ABCD"
_NAMES = dict(zip(_LETTERS, (*category_names("video"), "Motion"), strict=True))
_DIMENSIONS = {
    "A": {"Background": "on", "Objects": "shows", "First object": "", "Second object": "", "Passing": ""},
    "B": {"Sharpness and cleanness": "measures", "Identity": "measures", "Smoothness": "measures"},
    "C": {"Steadiness": "measures"},
    "D": {"Motion": "holds"},
}
"""Category -> its dimensions, and the word with which a reason of each begins."""
_REASON = {"A": "Video 1 holds", "B": "On average", "C": "By the measure.", "D": "By the number."}
"""Category -> how its reason begins."""
_AND_TWO, _AGAINST = ", Video 2 holds", " against"
_REASONS = ("Alignment decides.", "Alignment is equal: quality and steadiness decide.")
_BINARY = (False, True)
_RIGHT = ("wrong", "right")
_OBJECT = {
    (True, True): "right",
    (False, True): "wrong colour",
    (True, False): "wrong shape",
    (False, False): "missing",
}
"""(colour holds, shape holds) -> the word for an object that the prompt asks for."""
_WAYS = (("direction", "speed"), ("direction", "start", "end"), ("direction",))
"""What prompts say of a motion."""
_STEPS = 20  # measures are written in steps of 1/20
_MOST, _MOVES = 10, 4  # attributes of a prompt, and those among them that tell of motion
_TRACKS = 3 * MAX_OBJECTS  # no more objects can be there for a third of the time
_MEASURED = ("quality", "identity", "smoothness", "steadiness")


@dataclass(frozen=True, kw_only=True)
class JudgedClip:
    """A clip as the oracle sees it, what holds of one prompt, and what of that counts."""

    reading: ClipReading
    found: ClipScore
    score: Watched


def judged(reading: ClipReading, reference: Mapping[str, Any]) -> JudgedClip:
    found = score_reading(reading, reference)
    return JudgedClip(reading=reading, found=found, score=watched(found))


# ---------------------------------------------------------------- traces


def description(reading: ClipReading) -> list[str]:
    """The pieces of the reply to `DESCRIBE`: background, objects with their motion, and four measures."""
    objects = reading.objects or (None,)
    values = (
        reading.quality,
        float(np.mean([moved.kept if moved else 0.0 for moved in objects])),
        float(np.mean([moved.smooth if moved else 0.0 for moved in objects])),
        reading.steady,
    )
    measures = [piece for name, v in zip(_MEASURED, values, strict=True) for piece in (f", {name}", measure(v))]
    return ["On", _background(reading), ", shows", *shown(reading.objects), *measures, "."]


class Dimension(NamedTuple):
    """What a trace says of both clips in one respect, and the first one's points out of 10."""

    name: str
    one: Sequence[str]
    two: Sequence[str]
    points: int


def trace(reference: Mapping[str, Any], one: JudgedClip, two: JudgedClip) -> list[str]:
    """The pieces of a Flex reply. Raises ValueError for a pair without a better clip."""
    if winner_of(one.score, two.score) is None:
        raise ValueError("neither clip is better")
    alignment, quality, steadiness, overall = winners(one.score, two.score, 0)
    first, second = (sum(_moves(clip).values()) for clip in (one, two))
    asked = len(_moves(one))
    motion = overall if first == second else int(second > first)
    motions = Dimension("Motion", [_number(first)], [_number(second)], _lean(first / asked, second / asked))
    counts = [*_fraction(one.found), _AND_TWO, *_fraction(two.found)]
    averages = [measure(one.score.quality), _AGAINST, measure(two.score.quality)]
    return [
        _OPEN,
        *_category("A", _asked(reference, one, two), counts, alignment),
        *_category("B", _measured(one, two, _QUALITY), averages, quality),
        *_category("C", _measured(one, two, _STEADY), (), steadiness),
        *_category("D", [motions], (), motion),
        _REASONS[abs(one.score.alignment - two.score.alignment) < NEAR],
        _overall_winner(overall),
    ]


def _category(letter: str, dimensions: Sequence[Dimension], reason: Sequence[str], winner: int) -> list[str]:
    """The pieces of a category after its beginning, which ends the one before."""
    following = [*(dimension.name for dimension in dimensions[1:]), ""]
    pieces: list[str] = []
    for dimension, after in zip(dimensions, following, strict=True):
        *before, last = dimension.one
        pieces += [*before, _first(last, _VERB[dimension.name]), *dimension.two]
        pieces += [_scores(dimension.points, letter, after)]
    return [*pieces, *reason, _won(letter, winner)]


def _asked(reference: Mapping[str, Any], one: JudgedClip, two: JudgedClip) -> list[Dimension]:
    """What follows from the prompt: background, number, each object with its motion, and whether they pass each other."""
    held = one.found.attributes, two.found.attributes
    objects = [
        _dimension(name, [_object(h, key) for h in held], [_parts(h, key) for h in held])
        for name, key in (("First object", "object1"), ("Second object", "object2"))[: len(reference["objects"])]
    ]
    passes = [[h["passing"]] for h in held] if reference["passing"] else []
    return [
        _plain("Background", held, "background", [[_background(clip.reading)] for clip in (one, two)]),
        _plain("Objects", held, "count", [shown(clip.reading.objects) for clip in (one, two)]),
        *objects,
        *([_dimension("Passing", [[_RIGHT[p[0]]] for p in passes], passes)] if passes else []),
    ]


def _plain(name: str, held: Sequence[Mapping[str, bool]], key: str, seen: Sequence[list[str]]) -> Dimension:
    """What the clips show, each with whether that is asked for."""
    said = [[*pieces, f", {_RIGHT[h[key]]}"] for pieces, h in zip(seen, held, strict=True)]
    return _dimension(name, said, [[h[key]] for h in held])


def _dimension(name: str, said: Sequence[Sequence[str]], held: Sequence[Sequence[bool]]) -> Dimension:
    """A dimension whose points are the shares of what holds."""
    return Dimension(name, said[0], said[1], _lean(*(sum(parts) / len(parts) for parts in held)))


def _measured(one: JudgedClip, two: JudgedClip, fields: Mapping[str, str]) -> list[Dimension]:
    """Dimensions that compare measures: name -> the score's field."""
    values = {name: (getattr(one.found, field), getattr(two.found, field)) for name, field in fields.items()}
    return [Dimension(name, [measure(a)], [measure(b)], _lean(a, b)) for name, (a, b) in values.items()]


def _moves(clip: JudgedClip) -> dict[str, bool]:
    """What holds of all that the prompt says of motion."""
    asked = {"direction", "speed", "start", "end", "passing"}
    return {name: held for name, held in clip.found.attributes.items() if name.rpartition(".")[2] in asked}


def _object(held: Mapping[str, bool], key: str) -> list[str]:
    """Two pieces: whether an object is right, and whether its motion is."""
    names = next(way for way in _WAYS if all(f"{key}.{name}" in held for name in way))
    return [_OBJECT[held[f"{key}.colour"], held[f"{key}.shape"]], _way(names, [held[f"{key}.{n}"] for n in names])]


def _parts(held: Mapping[str, bool], key: str) -> list[bool]:
    return [value for name, value in held.items() if name.startswith(f"{key}.")]


def shown(objects: Sequence[Moved]) -> list[str]:
    """Pieces that name the objects, by where they start: colour, shape, motion and start of each."""
    if not objects:
        return [" nothing"]
    placed = sorted((_place(moved.start), *_named(moved)) for moved in objects[:SHOWN])
    pieces = [piece for place, *named in placed for piece in (" and", *named, _from(place))][1:]
    return [*pieces, _MORE] if len(objects) > SHOWN else pieces


def _named(moved: Moved) -> tuple[str, str, str]:
    return f" {moved.colour}", f" {moved.shape}", _motion(moved)


def _motion(moved: Moved) -> str:
    if moved.direction is None:
        still = max(abs(np.subtract(moved.end, moved.start))) < STILL
        return _STILL if still else _ASTRAY
    return _moving(moved.direction, moved.speed)


def _place(position: tuple[float, float]) -> tuple[int, int]:
    """The nearest of the places of either axis: its column and row."""
    nearest = [int(np.argmin([abs(place * CANVAS / SIDE - at) for place in PLACES])) for at in position]
    return nearest[0], nearest[1]


def _background(reading: ClipReading) -> str:
    return f" {reading.background or 'unclear'}"


# ---------------------------------------------------------------- pieces

_VERB = {name: verb for dimensions in _DIMENSIONS.values() for name, verb in dimensions.items()}
_QUALITY = {"Sharpness and cleanness": "quality", "Identity": "kept", "Smoothness": "smooth"}
_STEADY = {"Steadiness": "steady"}
_STILL, _ASTRAY, _MORE = " standing still", " going astray", " and more"


def _beginning(letter: str) -> str:
    return f'{{"name":"{letter}. {_NAMES[letter]}","dims":[{_opened(next(iter(_DIMENSIONS[letter])))}'


def _opened(name: str) -> str:
    return f'{{"name":"{name}","reason_1":"{_VERB[name]}'


_OPEN = '{"categories":[' + _beginning("A")


def _first(piece: str, verb: str) -> str:
    """The last piece about the first clip, and how the second one's begins."""
    return f'{piece}","reason_2":"{verb}'


def _scores(points: int, letter: str, following: str) -> str:
    """The end of a dimension, and how the following one begins; "" after the last: how the category's reason does."""
    begins = f",{_opened(following)}" if following else f'],"cat_reason":"{_REASON[letter]}'
    return f'","score_1":{points},"score_2":{10 - points}}}{begins}'


def _won(letter: str, winner: int) -> str:
    """A category's winner, and how the next one begins, or the overall reason."""
    position = _LETTERS.index(letter) + 1
    begins = f",{_beginning(_LETTERS[position])}" if position < len(_LETTERS) else '],"reason":"'
    return f'","cat_winner":"Video {winner + 1}"}}{begins}'


def _lean(one: float, two: float) -> int:
    """The first clip's points out of 10 for two shares."""
    return round(5 + 5 * (one - two))


def _overall_winner(winner: int) -> str:
    return f'","winner":"Video {winner + 1}"}}'


def overall_winners() -> tuple[str, str]:
    """The pieces that decide: the first clip is better, the second is."""
    return _overall_winner(0), _overall_winner(1)


def _fraction(found: ClipScore) -> tuple[str, str]:
    return _number(sum(found.attributes.values())) + " of", _number(len(found.attributes))


def _number(count: int) -> str:
    return f" {count}"


def _way(names: Sequence[str], held: Sequence[bool]) -> str:
    return ", " + ", ".join(f"{name} {_RIGHT[h]}" for name, h in zip(names, held, strict=True))


def _moving(direction: str, speed: str | None) -> str:
    return f" {speed} moving {direction}" if speed else f" moving {direction}"


def _from(place: tuple[int, int]) -> str:
    return f" from {DIRECTIONS['down'].names[place[1]]} {DIRECTIONS['right'].names[place[0]]}"


def vocabulary() -> list[str]:
    """Every piece that prompts and traces are made of, without repetition, in a fixed order."""
    return list(dict.fromkeys([*_prompt_pieces(), *_seen_pieces(), *_trace_pieces()]))


def _prompt_pieces() -> Iterator[str]:
    yield from (COMPARE, DESCRIBE, "user\n", "assistant\n", "\n", " a", " on a", " past a", " background")
    yield from (f" {word}" for word in (*COLOURS, *SHAPES, *BACKGROUNDS))
    yield from (_moving(direction, speed) for direction, speed in product(DIRECTIONS, (None, *SPEEDS)))
    for told in routes(("red", "circle"), "white"):
        assert told.route is not None
        yield f" moving from the {told.route[0]} to the {told.route[1]}"


def _seen_pieces() -> Iterator[str]:
    yield from ("On", ", shows", *(f", {name}" for name in _MEASURED), ".")
    yield from (" nothing", " unclear", " and", _MORE, _STILL, _ASTRAY)
    yield from (_from((column, row)) for column, row in product(range(len(PLACES)), repeat=2))
    yield from _measures()


def _measures() -> Iterator[str]:
    return (measure(step / _STEPS) for step in range(_STEPS + 1))


def _trace_pieces() -> Iterator[str]:
    yield from (_OPEN, _AND_TWO, _AGAINST, *_REASONS, *overall_winners())
    yield from (_won(letter, winner) for letter, winner in product(_LETTERS, range(2)))
    for letter, names in _DIMENSIONS.items():
        yield from (_scores(points, letter, name) for name, points in product((*names, "")[1:], range(11)))
    yield from (f"{_number(held)} of" for held in range(_MOST + 1))
    # Each object that nobody asked for adds two attributes that do not hold.
    yield from (_number(total) for total in range(_MOST + 2 * _TRACKS))
    yield from (_first(measure, "measures") for measure in _measures())
    yield from (_first(_number(held), "holds") for held in range(_MOVES + 1))
    yield from (*_OBJECT.values(), *_RIGHT, *(_first(word, "") for word in _RIGHT))
    for word, verb in product(_RIGHT, ("on", "shows")):
        yield from (f", {word}", _first(f", {word}", verb))
    for names in _WAYS:
        ways = [_way(names, held) for held in product(_BINARY, repeat=len(names))]
        yield from (*ways, *(_first(way, "") for way in ways))
