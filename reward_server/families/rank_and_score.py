"""One judge asked in two ways: which of two is better, and how good each is (UnifiedReward, arXiv 2503.05236, section 3.2).

The paper ranks a prompt's outputs in pairs and sifts winners and losers by pointwise scores; both verdicts come from the same
model. ``grpo_flex.advantages.BestAndWorst`` does the sifting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reward_server.families.base import Completion, Family, Medium, Reply
from reward_server.families.unified import Unified1Pair, Unified1Point


@dataclass(frozen=True, kw_only=True)
class RankAndScore:
    """Pairs are asked about by ``rank``, every sibling by itself by ``score``. As one family it is ``rank``."""

    rank: Family = field(default_factory=Unified1Pair)
    score: Family = field(default_factory=Unified1Point)
    candidates = 2

    @property
    def parts(self) -> tuple[Family, Family]:
        return self.rank, self.score

    @property
    def sources(self) -> int:
        return self.rank.sources

    @property
    def anchors(self) -> tuple[str, ...]:
        return getattr(self.rank, "anchors", ())

    @property
    def medium(self) -> Medium:
        return self.rank.medium

    @property
    def frames(self) -> int:
        return self.rank.frames

    def request(self, prompt_text: str, media: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
        return self.rank.request(prompt_text, media)

    def schema(self) -> dict[str, Any] | None:
        return self.rank.schema()

    def options(self) -> dict[str, Any]:
        return self.rank.options()

    def read(self, completion: Completion) -> Reply:
        return self.rank.read(completion)

    def problems(self) -> Iterator[tuple[str, str]]:
        for name, wanted in (("rank", 2), ("score", 1)):
            family = getattr(self, name)
            if not isinstance(family, Family) or family.candidates != wanted:
                what = (
                    "one that compares two, such as Flex"
                    if wanted == 2
                    else "one that scores one, such as Unified2Point"
                )
                yield name, f"is {family!r}; it needs to be {what}"
                return
        for name in ("medium", "sources"):
            one, two = (getattr(part, name) for part in self.parts)
            if one != two:
                yield (
                    f"score.{name}" if name == "medium" else "score",
                    f"has {name} {two!r}, but rank has {one!r}: they see the same",
                )


def by_candidates(family: Family) -> Mapping[int, Family]:
    """Who asks a question that shows so many candidates: a family itself, or the two of a ``RankAndScore``."""
    return {part.candidates: part for part in (family.parts if isinstance(family, RankAndScore) else (family,))}
