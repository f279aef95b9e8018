"""What the oracle prefers: of two candidates' scores, the better in each respect and overall."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from testbed.video_oracle import ClipScore

NEAR = 0.02  # smaller differences of one measure are none
LOOKS = 0.05  # nor are smaller ones of quality and composition together; who is to win then is a coin toss


class Score(Protocol):
    """What an oracle finds in one candidate; numbers in [0, 1]."""

    @property
    def attributes(self) -> Mapping[str, bool]: ...
    @property
    def alignment(self) -> float: ...
    @property
    def quality(self) -> float: ...
    @property
    def composition(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A clip's score: it looks good where things stay what they are and move evenly, and is well made where it is steady."""

    attributes: Mapping[str, bool]
    alignment: float
    quality: float
    composition: float


def watched(found: ClipScore) -> Watched:
    """What counts of a clip's score."""
    return Watched(
        attributes=found.attributes,
        alignment=found.alignment,
        quality=(found.quality + found.kept + found.smooth) / 3,
        composition=found.steady,
    )


def frame_times(count: int) -> list[float]:
    """When each of so many uniformly sampled frames of a clip is, from 0 to 1."""
    import numpy as np

    from testbed import clips

    return (np.linspace(0, clips.FRAMES - 1, count).round() / (clips.FRAMES - 1)).tolist()


def winners(one: Score, two: Score, toss: int) -> tuple[int, int, int, int]:
    """A faultless judge's winners (0 or 1) by alignment, quality, aesthetics and overall; a coin ``toss`` where all is equal.

    The format knows no ties: an anchor without a difference goes with the overall winner, either order.
    """
    overall = _better(*merit(one, two), toss)
    alignment = _better(one.alignment, two.alignment, overall)
    quality = _better(one.quality, two.quality, overall)
    return (alignment, quality, _better(one.composition, two.composition, overall), overall)


def merit(one: Score, two: Score) -> tuple[float, float]:
    """What decides overall: alignment, or quality and composition where alignment is as good as equal.

    Equal numbers where those are as good as equal, too: a judge that ranks what nobody can tell apart hands
    group-relative advantages a signal that is none.
    """
    if abs(one.alignment - two.alignment) >= NEAR:
        return one.alignment, two.alignment
    looks = one.quality + one.composition, two.quality + two.composition
    return looks if abs(looks[0] - looks[1]) >= LOOKS else (0.0, 0.0)


def _better(one: float, two: float, toss: int) -> int:
    return toss if abs(one - two) < NEAR else int(two > one)
