"""UnifiedReward-Think (arXiv 2505.03318): which of two is better, after thinking aloud.

The reply is ``<think>…</think><answer>Image 1 is better</answer>``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from reward_server.families.base import ChatFamily, Reply, after_thinking, side, unparsed

OPENING, CLOSING = "<answer>", "</answer>"


def parse(text: str) -> Reply:
    """Reads one reply; total, pure, linear in the length of the text.

    What stands in the thoughts does not count. Unparsed: nothing, thoughts that never end ("truncated"), no
    answer tag, an answer tag that is not closed ("truncated"), several ("two answers", even if they agree),
    or an answer that does not name a side.
    """
    if not text.strip():
        return unparsed("empty reply")
    answer = after_thinking(text)
    if "<think>" in answer:
        return unparsed("truncated")
    if OPENING not in answer:
        return unparsed("no answer")
    if answer.count(OPENING) > 1 or answer.count(CLOSING) > 1:
        return unparsed("two answers")
    content, closed, _ = answer.partition(OPENING)[2].partition(CLOSING)
    if not closed:
        return unparsed("truncated")
    winner = side(content)
    return unparsed("answer names no side") if winner is None else Reply(status="ok", winner=winner)


@dataclass(frozen=True, kw_only=True)
class Think(ChatFamily):
    """Compares two candidates; one overall winner, no anchors."""

    name: ClassVar[str] = "think"

    def parse(self, text: str) -> Reply:
        return parse(text)
