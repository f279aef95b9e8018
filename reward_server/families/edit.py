"""UnifiedReward-Edit: the better of two edits of a picture, or two scores from 0 to 25 for one edit.

The source picture stands before the candidates; the client takes it from the prompt's ``reference["source"]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from reward_server.families.base import (
    ChatFamily,
    Reply,
    closed,
    json_object,
    number,
    short_text,
    unparsed,
)
from reward_server.families.unified import parse_pair1

CRITERIA = ("success", "restraint")
"""How well the edit was carried out; how much was left alone that should have been."""
HIGHEST = 25.0


def parse_pair(text: str) -> Reply:
    """The line "Edited image 1 is better" (or 2, or equally good); rules as in ``unified.parse_pair1``."""
    return parse_pair1(text)


def parse_point(text: str) -> Reply:
    """``{"reasoning": …, "score": [a, b]}``, both from 0 to 25.

    Unparsed: no single object, or a score that is not a list of exactly two numbers in range.
    """
    found, problem = json_object(text)
    if found is None:
        return unparsed(problem)
    given = found.get("score")
    if not isinstance(given, list) or len(given) != len(CRITERIA):
        return unparsed("no score")
    values = [number(v) for v in given]
    if any(v is None for v in values):
        return unparsed("score is no number")
    if not all(v is not None and 0 <= v <= HIGHEST for v in values):
        return unparsed("score out of range")
    return Reply(status="ok", scores={c: (v,) for c, v in zip(CRITERIA, values, strict=True) if v is not None})


@dataclass(frozen=True, kw_only=True)
class _Edit(ChatFamily):
    sources = 1

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.medium != "image":
            yield "medium", f"is {self.medium!r}; edits of pictures only: it needs to be image"
            return
        yield from super().problems()


@dataclass(frozen=True, kw_only=True)
class EditPair(_Edit):
    """The better of two edits."""

    name: ClassVar[str] = "edit_pair"
    open_ended = True

    def parse(self, text: str) -> Reply:
        return parse_pair(text)


@dataclass(frozen=True, kw_only=True)
class EditPoint(_Edit):
    """Two scores from 0 to 25 for one edit: success and restraint."""

    name: ClassVar[str] = "edit_point"
    candidates = 1

    def parse(self, text: str) -> Reply:
        return parse_point(text)

    def schema(self) -> dict[str, Any]:
        score = {"type": "integer", "minimum": 0, "maximum": int(HIGHEST)}
        pair = {"type": "array", "items": score, "minItems": 2, "maxItems": 2}
        return closed(reasoning=short_text(600), score=pair)
