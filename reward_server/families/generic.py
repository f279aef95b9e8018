"""Any vision-language model with the user's own rubric: wording, reply schema and the reply's keys.

The reply is one JSON object. ``winner_key`` and ``dimension_keys`` name texts such as "Image 1";
``score_keys`` name numbers (one candidate) or lists of two numbers (two candidates).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from reward_server.families.base import (
    ChatFamily,
    Reply,
    closed,
    json_object,
    number,
    short_text,
    side,
    unparsed,
)


def parse_pair(
    text: str, winner_key: str, dimension_keys: Sequence[str], score_keys: Sequence[str], low: float, high: float
) -> Reply:
    """A comparison. The winner must be plain; a flawed dimension or score is left out and named."""
    found, problem = json_object(text)
    if found is None:
        return unparsed(problem)
    winner = side(found.get(winner_key))
    if winner is None:
        return unparsed("no winner" if found.get(winner_key) is None else "winner names no side")
    sides = {key: side(found.get(key)) for key in dimension_keys}
    scores, odd = _scores(found, score_keys, 2, low, high)
    if None in sides.values():
        odd = odd or "dimension without winner"
    plain_sides = {key: won for key, won in sides.items() if won is not None}
    return Reply(status="ok", winner=winner, dimensions=plain_sides, scores=scores, problem=odd)


def parse_point(text: str, score_keys: Sequence[str], low: float, high: float) -> Reply:
    """Scores of one candidate: every key a finite number from ``low`` to ``high``, else unparsed."""
    found, problem = json_object(text)
    if found is None:
        return unparsed(problem)
    scores, odd = _scores(found, score_keys, 1, low, high)
    return unparsed(odd) if odd else Reply(status="ok", scores=scores)


def _scores(
    found: Mapping[str, Any], keys: Sequence[str], members: int, low: float, high: float
) -> tuple[dict[str, tuple[float, ...]], str]:
    scores: dict[str, tuple[float, ...]] = {}
    odd = ""
    for key in keys:
        given = found.get(key)
        listed = given if isinstance(given, list) else [given]
        values = [v for v in map(number, listed) if v is not None]
        if len(values) != members or len(listed) != members:
            odd = odd or "score is no number"
        elif not all(low <= v <= high for v in values):
            odd = odd or "score out of range"
        else:
            scores[key] = tuple(values)
    return scores, odd


@cache
def read_schema(path: Path) -> dict[str, Any]:
    """The schema of a file as this process first read it, like a wording. Raises ValueError for an unusable one."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(str(error)) from error
    if not isinstance(read, dict):
        raise ValueError("it holds no object")
    return read


@dataclass(frozen=True, kw_only=True)
class _Generic(ChatFamily):
    schema_file: str = ""
    """A JSON schema for structured output; empty: one made from the keys."""
    score_keys: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 10.0

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if not self.low < self.high:
            yield "low", f"is {self.low}, not below high = {self.high}"
        try:
            self.schema()
        except ValueError as error:
            yield "schema_file", f"is {self.schema_file!r}, which is no JSON schema: {error}"

    def schema(self) -> dict[str, Any]:
        """Raises ValueError for a schema file that cannot be read."""
        if not self.schema_file:
            return closed(**self._properties())
        return read_schema(Path(self.schema_file))

    def _properties(self) -> dict[str, Any]:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class GenericPair(_Generic):
    """Compares two candidates under the user's rubric."""

    name: ClassVar[str] = "generic_pair"

    winner_key: str = "winner"
    dimension_keys: tuple[str, ...] = ()

    @property
    def anchors(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.dimension_keys

    def parse(self, text: str) -> Reply:
        return parse_pair(text, self.winner_key, self.dimension_keys, self.score_keys, self.low, self.high)

    def _properties(self) -> dict[str, Any]:
        noun = self.medium.capitalize()
        winner = {"type": "string", "enum": [f"{noun} 1", f"{noun} 2"]}
        score = {"type": "number", "minimum": self.low, "maximum": self.high}
        scores = {"type": "array", "items": score, "minItems": 2, "maxItems": 2}
        return {
            "reason": short_text(600),
            **dict.fromkeys(self.score_keys, scores),
            **dict.fromkeys(self.dimension_keys, winner),
            self.winner_key: winner,
        }


@dataclass(frozen=True, kw_only=True)
class GenericPoint(_Generic):
    """Scores one candidate under the user's rubric."""

    name: ClassVar[str] = "generic_point"
    candidates = 1

    score_keys: tuple[str, ...] = ("score",)

    def parse(self, text: str) -> Reply:
        return parse_point(text, self.score_keys, self.low, self.high)

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if not self.score_keys:
            yield "score_keys", "is empty: a scoring judge needs at least one key to read a score from"

    def _properties(self) -> dict[str, Any]:
        score = {"type": "number", "minimum": self.low, "maximum": self.high}
        return {"reason": short_text(600), **dict.fromkeys(self.score_keys, score)}
