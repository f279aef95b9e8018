"""RewardDance-style judging: "is the first better than the second?", read as P("yes") of the first token.

No text is needed, so a verdict costs one generated token, and the answer is graded: "p_yes" scores the first
candidate with P and the second with 1 - P.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from reward_server.families.base import FIRST, SECOND, TIE, ChatFamily, Completion, Reply, plain, unparsed

LEAST_MASS = 0.5
"""Share of probability that "yes" and "no" need together; with less the model wants to say something else."""
_MARGIN = 1e-9


def parse(text: str) -> Reply:
    """The written answer alone, for servers without log-probabilities: "yes" (the first is better) or "no"."""
    word = plain(text) if len(text) <= 40 else ""
    if word not in ("yes", "no"):
        return unparsed("neither yes nor no" if text.strip() else "empty reply")
    p = float(word == "yes")
    return Reply(status="ok", winner=FIRST if p else SECOND, scores={"p_yes": (p, 1 - p)})


def parse_logprobs(first_token: Sequence[tuple[str, float]]) -> Reply:
    """P("yes") = p_yes/(p_yes + p_no) over all spellings among the likeliest first tokens.

    Unparsed: no log-probabilities, one that is nan or above 0, or less than half of the mass on yes and no.
    """
    if not first_token:
        return unparsed("no log-probabilities")
    if any(not logprob <= _MARGIN for _, logprob in first_token):
        return unparsed("log-probability is no number")
    mass = {"yes": 0.0, "no": 0.0}
    for token, logprob in first_token:
        word = plain(token) if len(token) <= 40 else ""
        if word in mass:
            mass[word] += math.exp(logprob)
    total = mass["yes"] + mass["no"]
    if total < LEAST_MASS:
        return unparsed("neither yes nor no")
    p = mass["yes"] / total
    winner = TIE if abs(p - 0.5) < _MARGIN else FIRST if p > 0.5 else SECOND
    return Reply(status="ok", winner=winner, scores={"p_yes": (p, 1 - p)})


@dataclass(frozen=True, kw_only=True)
class RewardDance(ChatFamily):
    """Compares two candidates by the probability of one token; use it with ``Pointwise`` or ``WinRate``."""

    name: ClassVar[str] = "reward_dance"

    top_logprobs: int = 20
    """Likeliest first tokens to read: 1 … 20, which is what servers give."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if not 1 <= self.top_logprobs <= 20:
            yield "top_logprobs", f"is {self.top_logprobs}; it needs to be 1 … 20, which is what servers give"

    def options(self) -> dict[str, Any]:
        return super().options() | {"logprobs": True, "top_logprobs": self.top_logprobs, "max_tokens": 1}

    def parse(self, text: str) -> Reply:
        return parse(text)

    def read(self, completion: Completion) -> Reply:
        return parse_logprobs(completion.first_token)
