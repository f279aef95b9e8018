"""UnifiedReward-Flex (arXiv 2602.02380): which of two is better, by anchor category and overall, as JSON.

The reply is ``{"categories": [{"name", "dims": [{"name", "reason_1", "reason_2", "score_1", "score_2"}],
"cat_reason", "cat_winner"}], "reason", "winner"}``. What counts is what it states: the overall ``winner`` and
each anchor's ``cat_winner``. Sub-dimension scores are evidence and never decide in a winner's place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from reward_server.families.base import (
    ChatFamily,
    Reply,
    closed,
    json_object,
    number,
    plain,
    short_text,
    side,
    unparsed,
)

ANCHORS = ("alignment", "quality", "aesthetics")
"""Canonical names of the anchor categories, for images and videos alike."""

_OWN_WORDS = {
    "alignment": {"semantic", "alignment", "accuracy", "text", "prompt", "and"},
    "quality": {"image", "video", "visual", "quality", "dynamic", "realism", "and"},
    "aesthetics": {"narrative", "aesthetics", "aesthetic", "artistry", "cinematography", "and"},
}
_KEY_WORDS = {"alignment": {"alignment"}, "quality": {"quality"}, "aesthetics": {"aesthetics", "aesthetic"}}
_FULL_NAMES = {
    "image": ("Semantic Alignment & Accuracy", "Image Quality & Realism", "Aesthetics & Artistry"),
    "video": (
        "Semantic Alignment & Accuracy",
        "Video Quality & Dynamic Realism",
        "Narrative, Aesthetics & Cinematography",
    ),
}
_WORD = re.compile(r"[^\W_]+")
_LABEL = re.compile(r"[a-z]|\d{1,2}|[ivx]{1,4}")
_MEDIUM = re.compile(r" \((?:images?|videos?)\)?$")
SCORE_SUM, SUM_TOLERANCE = 10.0, 0.01


def anchor_of(name: object) -> str | None:
    """The anchor that a category's name means, whatever its letter prefix or case, or None.

    A name means an anchor when it has the anchor's key word and no word that is foreign to the anchor. What stands
    between words, in whatever script, does not matter.

    >>> anchor_of("b) image quality & realism"), anchor_of("Text rendering quality")
    ('quality', None)
    >>> anchor_of("A、Semantic Alignment & Accuracy"), anchor_of("【B】Image Quality"), anchor_of("C Aesthetics")
    ('alignment', 'quality', 'aesthetics')
    """
    if not isinstance(name, str) or len(name) > 200:
        return None
    listed = _WORD.findall(_MEDIUM.sub("", plain(name)).replace("&", " and "))
    numbered = listed[1:] if listed[:1] == ["category"] else listed
    words = set(numbered[1:] if numbered and _LABEL.fullmatch(numbered[0]) else listed)
    meant = [a for a in ANCHORS if words <= _OWN_WORDS[a] and words & _KEY_WORDS[a]]
    return meant[0] if len(meant) == 1 else None


def parse(text: str) -> Reply:
    """Reads one reply; total, pure, linear in the length of the text.

    Unparsed: no object, a list, truncated or broken JSON, a key twice, two objects ("two answers"), no
    winner, or one that does not name a side ("Image 1/2", null, a number). Otherwise ok, and ``problem``
    names the first thing that was left out: an anchor without a plain winner (or named twice with different
    winners) is absent, a dimension whose scores are not finite or do not add up to 10 lends no scores, a
    category that is no anchor is ignored.
    """
    found, problem = json_object(text)
    if found is None:
        return unparsed(problem)
    if found.get("winner") is None:
        return unparsed("no winner")
    winner = side(found["winner"])
    if winner is None:
        return unparsed("winner names no side")
    categories, notes = _categories(found.get("categories"))
    dimensions = {anchor: won for anchor, (won, _) in categories.items() if won is not None}
    scores = {anchor: pair for anchor, (_, pair) in categories.items() if pair is not None}
    problem = notes[0] if notes else ""
    return Reply(status="ok", winner=winner, dimensions=dimensions, scores=scores, problem=problem)


_Category = tuple[float | None, tuple[float, float] | None]


def _categories(listed: object) -> tuple[dict[str, _Category], list[str]]:
    """Anchor -> (winner's position, mean scores), and what was left out."""
    if not isinstance(listed, list) or not listed:
        return {}, ["no categories"]
    found: dict[str, _Category] = {}
    notes: list[str] = []
    for category in listed:
        anchor = anchor_of(category.get("name")) if isinstance(category, dict) else None
        if anchor is None:
            continue
        scores, odd = _mean_scores(category.get("dims"))
        won = side(category.get("cat_winner"))
        if anchor in found and found[anchor][0] != won:
            won, odd = None, "a category twice"
        notes += [odd] if odd else []
        found[anchor] = (won, scores)
    missing = [a for a in ANCHORS if found.get(a, (None, None))[0] is None]
    return found, notes + (["category without winner"] if missing else [])


def _mean_scores(dims: object) -> tuple[tuple[float, float] | None, str]:
    """Mean score of either side over the dimensions that are sound, and a complaint if any is not."""
    if not isinstance(dims, list):
        return None, "no dimensions"
    sound, odd = [], ""
    for dim in dims:
        one, two = (number(dim.get(k)) if isinstance(dim, dict) else None for k in ("score_1", "score_2"))
        if one is None or two is None:
            odd = odd or "score is no number"
        elif abs(one + two - SCORE_SUM) > SUM_TOLERANCE:
            odd = odd or "scores do not add up"
        else:
            sound.append((one, two))
    if not sound:
        return None, odd
    return (sum(s[0] for s in sound) / len(sound), sum(s[1] for s in sound) / len(sound)), odd


@dataclass(frozen=True, kw_only=True)
class Flex(ChatFamily):
    """Compares two candidates under three anchors and overall."""

    name: ClassVar[str] = "flex"
    anchors: ClassVar[tuple[str, ...]] = ANCHORS

    def parse(self, text: str) -> Reply:
        return parse(text)

    def schema(self) -> dict[str, Any]:
        """Every list and text is bounded and every winner an enumeration, so a reply ends of itself."""
        noun = self.medium.capitalize()
        winner = {"type": "string", "enum": [f"{noun} 1", f"{noun} 2"]}
        score = {"type": "integer", "minimum": 0, "maximum": 10}
        dim = closed(
            name=short_text(60), reason_1=short_text(300), reason_2=short_text(300), score_1=score, score_2=score
        )
        dims = {"type": "array", "items": dim, "minItems": 1, "maxItems": 5}
        category = closed(name=short_text(60), dims=dims, cat_reason=short_text(300), cat_winner=winner)
        categories = {"type": "array", "items": category, "minItems": 3, "maxItems": 4}
        return closed(categories=categories, reason=short_text(600), winner=winner)


def category_names(medium: str) -> tuple[str, ...]:
    """The anchors' full names as the instruction spells them, in the order of ``ANCHORS``."""
    return _FULL_NAMES[medium]
