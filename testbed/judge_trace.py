"""What the tiny judge writes, and its teacher: the oracle's findings as a Flex trace.

A trace is a list of *pieces*: strings that join to a reply in the Flex format. Each piece is one token of the judge's
own tokenizer (`testbed.judge_model`), so the format's fixed text costs next to nothing and a whole verdict is some 40
tokens. A trace writes down what each picture shows before it says what holds of the prompt, counts what holds before
it names a winner, and names the categories' winners before the overall one: a small model cannot do it in one go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

from reward_server.families.flex import category_names
from testbed import preference
from testbed.oracle import MAX_OBJECTS, Reading, Score, Seen, relation_holds, size_word
from testbed.preference import NEAR, merit
from testbed.scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES

COMPARE = "Which image serves the prompt better? Prompt:"
DESCRIBE = "Describe the image."
SCORE = "Score the image. Prompt:"
WORDING = COMPARE + " {prompt}"
"""The Flex family's wording for this judge, saved as `prompt.txt` beside its weights."""
POINT_WORDING = SCORE + " {prompt}"
"""The same for UnifiedReward 2.0's scores of one picture, saved as `prompt_point.txt`."""

_NAMES = (*category_names("image"), "Spatial Relation")
_A, _B, _C, _D = (f"{letter}. {name}" for letter, name in zip("ABCD", _NAMES, strict=True))
_OPEN = '{"categories":[{"name":"' + _A + '","dims":[{"name":"Background","reason_1":"on'
_END = '],"cat_reason":"Image 1 holds'
_NEXT = {
    "Objects": ',{"name":"Objects","reason_1":"shows',
    "First object": ',{"name":"First object","reason_1":"',
    "Second object": ',{"name":"Second object","reason_1":"',
    "Size": ',{"name":"Size","reason_1":"',
    "Relation": ',{"name":"Relation","reason_1":"',
    "": _END,
}
_AND_TWO = ", Image 2 holds"
_FINALLY = '],"reason":"'
_DIMENSION = {
    _B: ',{"name":"' + _B + '","dims":[{"name":"Sharpness and cleanness","reason_1":"measures',
    _C: ',{"name":"' + _C + '","dims":[{"name":"Margins, size and balance","reason_1":"measures',
    _D: ',{"name":"' + _D + '","dims":[{"name":"Relation","reason_1":"',
    "": _FINALLY,
}
"""The category that follows, or "" after the last, and how it begins."""
_TWO_MEASURES = '","reason_2":"measures'
_REASONS = ("Alignment decides.", "Alignment is equal: quality and composition decide.")
_BINARY = (False, True)
_OBJECT = {
    (True, True): "right",
    (False, True): "wrong colour",
    (True, False): "wrong shape",
    (False, False): "missing",
}
"""(colour holds, shape holds) -> the word for an object that the prompt asks for."""
_MOST = 7  # attributes of a prompt
_STEPS = 20  # measures are written in steps of 1/20
_LINE = {name: f"\n{name}: " for name in ("First object", "Second object", "Size", "Relation")}
_HOLDS = "\nHolds"
_AXES = tuple(f"\n{axis} Score (1-5):" for axis in ("Alignment", "Coherence", "Style"))


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A picture as the oracle sees it, and what holds of one prompt."""

    reading: Reading
    score: Score


# ---------------------------------------------------------------- traces


def description(reading: Reading) -> list[str]:
    """The pieces of the reply to `DESCRIBE`: background, objects, quality and composition."""
    head = ["On", _background(reading), ", shows", *shown(reading.objects)]
    return [*head, ", quality", measure(reading.quality), ", composition", measure(reading.composition), "."]


def trace(reference: Mapping[str, Any], one: Judged, two: Judged) -> list[str]:
    """The pieces of a Flex reply. Raises ValueError for a pair without a better picture."""
    overall = winner_of(one.score, two.score)
    if overall is None:
        raise ValueError("neither picture is better")
    alignment = _better(one.score.alignment, two.score.alignment, overall)
    pieces = [*_seen(one.reading, two.reading, one.score, two.score), *_checks(reference, one.score, two.score)]
    pieces += [_fraction(one.score), _AND_TWO, _fraction(two.score), _category_winner(alignment)]
    related = bool(reference.get("relation"))
    for name, following in (("quality", _C), ("composition", _D if related else "")):
        first, second = getattr(one.score, name), getattr(two.score, name)
        share = _share(first, second, _better(first, second, overall))
        pieces += [measure(first), _TWO_MEASURES, measure(second), _measured(share, following)]
    pieces += _relation(one.score, two.score, overall) if related else []
    equal = abs(one.score.alignment - two.score.alignment) < NEAR
    return [*pieces, _REASONS[equal], _overall_winner(overall)]


def scores(reference: Mapping[str, Any], judged: Judged) -> list[str]:
    """The pieces of a reply to `SCORE`: what the picture shows, what holds of the prompt, UnifiedReward 2.0's three scores."""
    held = judged.score.attributes
    pieces = description(judged.reading)
    for name in ("First object", *dimensions_after_first(reference)[:-1]):
        pieces += [_LINE[name], _word_of(name, held)]
    values = (judged.score.alignment, judged.score.quality, judged.score.composition)
    marks = [piece for axis, value in zip(_AXES, values, strict=True) for piece in (axis, mark(value))]
    return [*pieces, _HOLDS, _fraction(judged.score), *marks]


def _word_of(dimension: str, held: Mapping[str, bool]) -> str:
    """Whether what a dimension is about holds of one picture."""
    if dimension in ("Size", "Relation"):
        return _RIGHT[held["relation" if dimension == "Relation" else "object1.size"]]
    key = "object1" if dimension == "First object" else "object2"
    return _OBJECT[held[f"{key}.colour"], held[f"{key}.shape"]]


def winner_of(one: preference.Score, two: preference.Score) -> int | None:
    """0 or 1, or None where the oracle sees no difference at all."""
    first, second = merit(one, two)
    return None if first == second else int(second > first)


def _better(one: float, two: float, otherwise: int) -> int:
    return otherwise if one == two else int(two > one)


def _seen(one: Reading, two: Reading, first: Score, second: Score) -> list[str]:
    """The dimensions "Background" and "Objects": what the pictures show, and whether that is asked for."""
    ground = (first.attributes["background"], second.attributes["background"])
    count = (first.attributes["count"], second.attributes["count"])
    return [
        _OPEN,
        _background(one),
        _first_plain(ground[0], "on"),
        _background(two),
        _plain(ground[1]),
        _scores(_points(*ground), "Objects"),
        *shown(one.objects),
        _first_plain(count[0], "shows"),
        *shown(two.objects),
        _plain(count[1]),
        _scores(_points(*count), "First object"),
    ]


def _checks(reference: Mapping[str, Any], one: Score, two: Score) -> list[str]:
    """The dimensions that follow from the prompt: its objects, a size, a relation."""
    names = dimensions_after_first(reference)
    pieces = _object_check("object1", one, two, names[0])
    for name, following in pairwise(names):
        if name == "Second object":
            pieces += _object_check("object2", one, two, following)
            continue
        key = "relation" if name == "Relation" else "object1.size"
        first, second = one.attributes[key], two.attributes[key]
        pieces += [_first_word(_RIGHT[first]), _RIGHT[second], _scores(_points(first, second), following)]
    return pieces


def dimensions_after_first(reference: Mapping[str, Any]) -> list[str]:
    """What follows the dimension "First object"; the last is "", the end of the category."""
    pair = ["Second object", "Relation"] if len(reference["objects"]) == 2 else []
    size = ["Size"] if len(reference["objects"]) == 1 and reference["objects"][0].get("size") else []
    return [*pair, *size, ""]


def _relation(one: Score, two: Score, overall: int) -> list[str]:
    """The fourth category, for prompts that ask for a relation."""
    first, second = one.attributes["relation"], two.attributes["relation"]
    return [
        _first_word(_RIGHT[first]),
        _RIGHT[second],
        _related(_points(first, second), _better(first, second, overall)),
    ]


def _object_check(key: str, one: Score, two: Score, following: str) -> list[str]:
    first, second = ((s.attributes[f"{key}.colour"], s.attributes[f"{key}.shape"]) for s in (one, two))
    points = _object_points(sum(first), sum(second))
    return [_first_word(_OBJECT[first]), _OBJECT[second], _scores(points, following)]


def shown(objects: Sequence[Seen]) -> list[str]:
    """Pieces that name the objects: one with its size, two with their relation, more in a row."""
    if not objects:
        return [" nothing"]
    if len(objects) == 1:
        return [f" {size_word(objects[0].size) or 'medium'}", *_named(objects[0])]
    if len(objects) == 2:
        for first, second in (objects, objects[::-1]):
            for relation in ("left of", "above"):
                if relation_holds(relation, first, second):
                    return [*_named(first), f" {relation}", *_named(second)]
    ordered = sorted(objects, key=lambda seen: (seen.x, seen.y))
    return [piece for seen in ordered for piece in (" and", *_named(seen))][1:]


def _named(seen: Seen) -> tuple[str, str]:
    return f" {seen.colour}", f" {seen.shape}"


def _background(reading: Reading) -> str:
    return f" {reading.background or 'unclear'}"


def measure(value: float) -> str:
    """A number between 0 and 1 in steps of 1/20, as one piece."""
    return f" {round(value * _STEPS) / _STEPS:.2f}"


def mark(value: float) -> str:
    """A number between 0 and 1 as a mark from 1 to 5, in as many steps, as one piece."""
    return f" {1 + 4 * round(value * _STEPS) / _STEPS:.1f}"


# ---------------------------------------------------------------- pieces

_RIGHT = ("wrong", "right")


def _plain(holds: bool) -> str:
    return f", {_RIGHT[holds]}"


def _first_plain(holds: bool, verb: str) -> str:
    return f'{_plain(holds)}","reason_2":"{verb}'


def _first_word(word: str) -> str:
    return f'{word}","reason_2":"'


def _points(one: bool, two: bool) -> int:
    """The first picture's score out of 10 for what either holds or not."""
    return 5 + 5 * (one - two)


def _object_points(one: int, two: int) -> int:
    """The same for 0, 1 or 2 right attributes."""
    return {-2: 0, -1: 2, 0: 5, 1: 8, 2: 10}[one - two]


def _scores(points: int, following: str) -> str:
    return f'","score_1":{points},"score_2":{10 - points}}}{_NEXT[following]}'


def _fraction(score: Score) -> str:
    return f" {sum(score.attributes.values())} of {len(score.attributes)}"


def _category_winner(winner: int) -> str:
    return f'","cat_winner":"Image {winner + 1}"}}{_DIMENSION[_B]}'


def _share(one: float, two: float, winner: int) -> int:
    """The first picture's points out of 10: more than 5 exactly if it wins."""
    lead = min(4, round(4 * abs(one - two)))
    return 6 + lead if winner == 0 else 4 - lead


def _measured(share: int, following: str) -> str:
    return _category_end(share, "By the measure.", 0 if share > 5 else 1, following)


def _related(points: int, winner: int) -> str:
    return _category_end(points, "By the relation.", winner, "")


def _category_end(points: int, reason: str, winner: int, following: str) -> str:
    """The last scores of a category with one dimension, its reason and its winner, and how the next one begins."""
    scores = f'","score_1":{points},"score_2":{10 - points}}}]'
    return f'{scores},"cat_reason":"{reason}","cat_winner":"Image {winner + 1}"}}{_DIMENSION[following]}'


def _overall_winner(winner: int) -> str:
    return f'","winner":"Image {winner + 1}"}}'


def overall_winners() -> tuple[str, str]:
    """The pieces that decide: the first picture is better, the second is."""
    return _overall_winner(0), _overall_winner(1)


def vocabulary() -> list[str]:
    """Every piece that prompts and traces are made of, without repetition, in a fixed order."""
    return list(dict.fromkeys([*_prompt_pieces(), *_description_pieces(), *_trace_pieces(), *_point_pieces()]))


def _prompt_pieces() -> Iterator[str]:
    yield from (COMPARE, DESCRIBE, "user\n", "assistant\n", "\n", " a", " on a", " background")
    yield from (f" {word}" for word in (*SIZES, *COLOURS, *SHAPES, *BACKGROUNDS, *RELATIONS))


def _description_pieces() -> Iterator[str]:
    yield from ("On", ", shows", ", quality", ", composition", ".", " nothing", " medium", " unclear", " and")
    yield from (measure(step / _STEPS) for step in range(_STEPS + 1))


def _trace_pieces() -> Iterator[str]:
    yield from (_OPEN, _AND_TWO, _TWO_MEASURES, *_REASONS, *_OBJECT.values(), *_RIGHT)
    for holds in _BINARY:
        yield _plain(holds)
        yield from (_first_plain(holds, verb) for verb in ("on", "shows"))
        yield from (_category_winner(int(holds)), _overall_winner(int(holds)))
    yield from (_first_word(word) for word in dict.fromkeys([*_OBJECT.values(), *_RIGHT]))
    for following, points in product(_NEXT, (0, 2, 5, 8, 10)):
        yield _scores(points, following)
    # Each object that nobody asked for adds two attributes that do not hold.
    for total in sorted({base + 2 * more for base in (4, 5, _MOST) for more in range(MAX_OBJECTS)}):
        yield from (f" {held} of {total}" for held in range(min(total, _MOST) + 1))
    for share, following in product((0, 1, 2, 3, 4, 6, 7, 8, 9, 10), (_C, _D, "")):
        yield _measured(share, following)
    yield from (_related(points, winner) for points, winner in ((0, 1), (5, 0), (5, 1), (10, 0)))


def _point_pieces() -> Iterator[str]:
    yield from (SCORE, *_LINE.values(), _HOLDS, *_AXES)
    yield from (mark(step / _STEPS) for step in range(_STEPS + 1))
