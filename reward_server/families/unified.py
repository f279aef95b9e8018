"""UnifiedReward 1.0 (arXiv 2503.05236) and 2.0: scores of one candidate, scores of two, or the better one.

All four reply in lines of plain text, which are read one by one. A line of more than 400 characters is prose
and says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

from reward_server.families.base import FIRST, SECOND, TIE, ChatFamily, Reply, plain_lines, side, unparsed

_NUMBER = r"(-?\d{1,9}(?:\.\d{1,24})?|nan)"
"""With all the decimals of a float: the released 2.0 judge writes up to 17 of them."""
_AXIS = re.compile(r"(alignment|coherence|physics|style)\b[^:]{0,60}:?.{0,60}")
_AXIS_SCORE = re.compile(rf"(alignment|coherence|physics|style) score(?: ?\(1 ?- ?5\))? ?: ?{_NUMBER}(?: ?/ ?5)?")
_SIDE_SCORE = re.compile(rf"(?:image|video) ?([12]) ?: ?{_NUMBER}")
_FINAL = re.compile(rf"final score(?: ?\(1 ?- ?(?:5|10)\))? ?: ?{_NUMBER}(?: ?/ ?(?:5|10))?")
_QUALITY = re.compile(
    r"(visual quality|temporal consistency|dynamic degree|text-to-video alignment|factual consistency) ?: ?([1-4])"
)
_ELEMENT = re.compile(r"(.{1,200}\(.{1,60}\)) ?: ?([01])")
LOWEST, HIGHEST = 1.0, 5.0
HIGHEST_OF_VIDEO = 10.0
"""Of the final score that UnifiedReward 1.0 gives a video."""
SUM_TOLERANCE = 0.02


def parse_point2(text: str) -> Reply:
    """UnifiedReward 2.0, one candidate: three lines such as "Alignment Score (1-5): 2.69".

    Unparsed: an axis is missing, given twice with different numbers, nan, or outside 1 to 5.
    """
    given: dict[str, float] = {}
    for line in plain_lines(text):
        match = _AXIS_SCORE.fullmatch(line)
        if match is None:
            continue
        axis, value = match[1], float(match[2])
        if not LOWEST <= value <= HIGHEST:  # true for nan too
            return unparsed("score out of range")
        if given.get(axis, value) != value:
            return unparsed("two answers")
        given[axis] = value
    if not given:
        return unparsed("no score")
    if not _is_whole(given):
        return unparsed("axis missing")
    return Reply(status="ok", scores={a: (v,) for a, v in given.items()})


def _is_whole(axes: Collection[str]) -> bool:
    """Whether these are the three that are asked for: of a picture coherence is the second, of a clip maybe physics."""
    return {"alignment", "style"} <= set(axes) and len(axes) == 3


def parse_pair2(text: str) -> Reply:
    """UnifiedReward 2.0, two candidates: a block per axis with a number for either, adding up to 1.

    Each sound axis gives its scores and its winner. The overall winner has the higher sum over alignment, coherence
    or physics, and style; where one of these is missing, is nan or does not add up, there is no overall winner, and
    ``problem`` says why. Unparsed: no axis is sound, or a number is given twice with different values.
    """
    blocks: dict[str, dict[int, float]] = {}
    axis = ""
    for line in plain_lines(text):
        match = _SIDE_SCORE.fullmatch(line)
        if match and axis:
            number, value = int(match[1]), float(match[2])
            before = blocks[axis].get(number)
            if before is not None and before != value and not (before != before and value != value):
                return unparsed("two answers")
            blocks[axis][number] = value
        elif heading := _AXIS.fullmatch(line):
            axis = heading[1]
            blocks.setdefault(axis, {})
    return _weigh(blocks)


def _weigh(blocks: Mapping[str, Mapping[int, float]]) -> Reply:
    sound, odd = {}, ""
    for axis, block in blocks.items():
        one, two = block.get(1, float("nan")), block.get(2, float("nan"))
        if one != one or two != two:
            odd = odd or "score is no number"
        elif abs(one + two - 1) > SUM_TOLERANCE or min(one, two) < 0:
            odd = odd or "scores do not add up"
        else:
            sound[axis] = (one, two)
    if not sound:
        return unparsed(odd or "no score")
    whole = _is_whole(sound)
    totals = [sum(pair[k] for pair in sound.values()) for k in (0, 1)]
    return Reply(
        status="ok",
        winner=_higher(totals[0], totals[1]) if whole else None,
        dimensions={axis: _higher(*pair) for axis, pair in sound.items()},
        scores=sound,
        problem=odd or ("" if whole else "axis missing"),
    )


def _higher(one: float, two: float) -> float:
    return TIE if abs(one - two) < 1e-9 else FIRST if one > two else SECOND


def parse_pair1(text: str) -> Reply:
    """UnifiedReward 1.0, two candidates: a line such as "Image 1 is better" or "Both images are equally good".

    Lines that do not say so are prose, also those that only name a candidate: headings. Unparsed: no line does, or two
    do and disagree.
    """
    named = {side(line, sentence=True) for line in plain_lines(text)} - {None}
    if len(named) > 1:
        return unparsed("two answers")
    if not named:
        return unparsed("answer names no side" if text.strip() else "empty reply")
    return Reply(status="ok", winner=named.pop())


def parse_point1(text: str, highest: float = HIGHEST) -> Reply:
    """UnifiedReward 1.0, one candidate: what it lists, then "Final Score:" from 1 to ``highest``.

    Of a picture it lists "element (type): 0 or 1", of a video five qualities from 1 to 4. The final score is "final", the
    share of elements present "elements" (absent where none is listed), a quality has its own name ("visual_quality", …;
    absent where two lines disagree). An echoed "element (type): 0/1" is no element. Unparsed: no final score, two
    different ones, out of range.
    """
    finals, elements, qualities = set(), [], dict[str, set[float]]()
    for line in plain_lines(text):
        if match := _FINAL.fullmatch(line):
            finals.add(float(match[1]))
        elif match := _ELEMENT.fullmatch(line):
            elements.append(int(match[2]))
        elif match := _QUALITY.fullmatch(line):
            qualities.setdefault(re.sub("[ -]", "_", match[1]), set()).add(float(match[2]))
    if len(finals) != 1:
        return unparsed("two answers" if finals else "no score" if text.strip() else "empty reply")
    final = finals.pop()
    if not LOWEST <= final <= highest:
        return unparsed("score out of range")
    listed = {"elements": (sum(elements) / len(elements),)} if elements else {}
    listed |= {name: (values.pop(),) for name, values in qualities.items() if len(values) == 1}
    return Reply(status="ok", scores={"final": (final,), **listed})


@dataclass(frozen=True, kw_only=True)
class Unified2Point(ChatFamily):
    """UnifiedReward 2.0: one candidate, 1 to 5 on alignment, coherence (video: physics) and style."""

    name: ClassVar[str] = "unified2_point"
    open_ended = True
    candidates = 1

    def parse(self, text: str) -> Reply:
        return parse_point2(text)


@dataclass(frozen=True, kw_only=True)
class Unified2Pair(ChatFamily):
    """UnifiedReward 2.0: two candidates, scores that add up to 1 on each axis; of videos too the axis is coherence."""

    name: ClassVar[str] = "unified2_pair"
    open_ended = True
    anchors = ("alignment", "coherence", "style")

    def parse(self, text: str) -> Reply:
        return parse_pair2(text)


@dataclass(frozen=True, kw_only=True)
class Unified1Pair(ChatFamily):
    """UnifiedReward 1.0: the better of two, or equally good."""

    name: ClassVar[str] = "unified1_pair"
    open_ended = True

    def parse(self, text: str) -> Reply:
        return parse_pair1(text)


@dataclass(frozen=True, kw_only=True)
class Unified1Point(ChatFamily):
    """UnifiedReward 1.0: the prompt's elements checked and a final score from 1 to 5; of a video five qualities and 1 to 10."""

    name: ClassVar[str] = "unified1_point"
    open_ended = True
    candidates = 1
    decisive = ("final",)

    def parse(self, text: str) -> Reply:
        return parse_point1(text, HIGHEST_OF_VIDEO if self.medium == "video" else HIGHEST)
