"""Guards of a run, computed from its own records: the win rate against the base model, and when to stop early.

A group's mean win rate is one half whatever the policy does, so it is no learning curve. What tells whether the judge
likes the policy better than before is its verdict on held-out samples beside the base model's, from the same noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from grpo_flex.metrics import Row, curve
from grpo_flex.types import RewardedGroup

T = TypeVar("T")


def versus_base(rewarded: Sequence[RewardedGroup]) -> dict[str, float]:
    """``heldout/win_rate``: the share of pairs (base, present) whose present sample has the higher reward; ties count ½.

    Args:
        rewarded: groups of two, the base model's sample first. A pair that nobody judged is left out.

    Empty where no pair was judged.
    """
    pairs = [group.rewards_G for group in rewarded if group.rewards_G.shape == (2,)]
    wins = [0.5 * (1 + float(now > base) - float(base > now)) for base, now in pairs if base == base and now == now]
    return {"heldout/win_rate": sum(wins) / len(wins)} if wins else {}


def spread(items: Sequence[T], wanted: int) -> list[T]:
    """``wanted`` of the items, spread evenly; all of them if there are fewer.

    >>> spread("abcdefghij", 3), spread("ab", 5)
    (['a', 'd', 'g'], ['a', 'b'])
    """
    return [items[i * len(items) // wanted] for i in range(wanted)] if wanted < len(items) else list(items)


@dataclass(frozen=True, kw_only=True)
class Regress:
    """A held-out figure that stayed below its best."""

    key: str
    best: float
    best_step: int
    now: float
    evaluations: int

    def __str__(self) -> str:
        return (
            f"{self.key} is {self.now:.3f} and has been below its best, {self.best:.3f} at step {self.best_step}, "
            f"for {self.evaluations} evaluations running"
        )


def regress(rows: Iterable[Row], key: str, patience: int, drop: float) -> Regress | None:
    """Whether a run's held-out figure stayed more than ``drop`` below its best for the last ``patience`` evaluations.

    Args:
        rows: the run's lines of metrics, in order.
        patience: 0 never stops.
    """
    steps, values = curve(rows, key)
    if not patience or len(values) <= patience:
        return None
    best = max(values)
    if any(value >= best - drop for value in values[-patience:]):
        return None
    return Regress(key=key, best=best, best_step=steps[values.index(best)], now=values[-1], evaluations=patience)
