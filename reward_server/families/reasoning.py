"""A judge of judges: which of two written comparisons, which name the same winner, is reasoned better.

Stage 2 of a judge's training asks it where both of a judge's traces are right (``pairs.py``). The answer may be any
chat model's; the reply is ``{"reason", "winner"}`` with the winner "Answer 1" or "Answer 2".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from reward_server.families.base import (
    ChatFamily,
    Reply,
    closed,
    json_object,
    short_text,
    side,
    unparsed,
    user_message,
)

_MARK = re.compile(r"\{(prompt|answer_1|answer_2)\}")


@dataclass(frozen=True, kw_only=True)
class Reasoning(ChatFamily):
    """Compares two answers about the candidates that it is shown."""

    name: ClassVar[str] = "reasoning"

    answers: tuple[str, str] = ("", "")
    """The two comparisons, as they were written."""

    def request(self, prompt_text: str, media: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
        texts = {"prompt": prompt_text, "answer_1": self.answers[0], "answer_2": self.answers[1]}
        # In one pass, so that a mark within a text stays what it is.
        return [user_message(media, _MARK.sub(lambda mark: texts[mark[1]], self.wording()))]

    def parse(self, text: str) -> Reply:
        found, problem = json_object(text)
        winner = side(found.get("winner")) if found else None
        if winner is None:
            return unparsed(problem or "winner names no side")
        return Reply(status="ok", winner=winner)

    def schema(self) -> dict[str, Any]:
        return closed(reason=short_text(600), winner={"type": "string", "enum": ["Answer 1", "Answer 2"]})
