"""Early stop and the win rate against the base model, by hand-made records."""

from __future__ import annotations

import numpy as np
import pytest

from grpo_flex.guards import regress, spread, versus_base
from grpo_flex.types import RewardedGroup

nan = float("nan")


def rows(*values: float | None) -> list[dict[str, float | None]]:
    """An evaluation every second step; None: the figure is missing there."""
    return [
        {"step": float(i), "heldout/oracle": values[i // 2] if i % 2 == 0 else None} for i in range(2 * len(values))
    ]


def group(*rewards: float) -> RewardedGroup:
    return RewardedGroup(prompt_id="p", rewards_G=np.array(rewards), breakdown_G={})


@pytest.mark.parametrize(
    ("values", "patience", "stops"),
    [
        ((0.5, 0.7, 0.6, 0.6), 2, True),
        ((0.5, 0.7, 0.6, 0.6), 0, False),
        ((0.5, 0.7, 0.6, 0.69), 2, False),  # back within the drop
        ((0.5, 0.7, 0.6), 2, False),  # not for long enough
        ((0.7, 0.6), 2, False),
        ((0.7, 0.6, 0.6), 2, True),  # the base model was the best
        ((0.5, 0.7, None, 0.6, None, 0.6), 2, True),  # only evaluations count
        ((0.5, 0.6, 0.7), 1, False),
    ],
)
def test_a_run_stops_when_all_of_the_last_evaluations_miss_the_best(
    values: tuple[float | None, ...], patience: int, stops: bool
) -> None:
    assert (regress(rows(*values), "heldout/oracle", patience, 0.02) is not None) is stops


def test_what_is_said_names_the_best_step() -> None:
    found = regress(rows(0.5, 0.7, 0.6, 0.55), "heldout/oracle", 2, 0.02)
    assert found and (found.best, found.best_step, found.now) == (0.7, 2, 0.55)
    assert "below its best, 0.700 at step 2, for 2 evaluations running" in str(found)


def test_win_rate_counts_ties_half_and_leaves_out_what_nobody_judged() -> None:
    pairs = [group(0, 1), group(0, 1), group(1, 0), group(0.5, 0.5), group(nan, 1), group(nan, nan)]
    assert versus_base(pairs) == {"heldout/win_rate": (1 + 1 + 0 + 0.5) / 4}
    assert versus_base([group(nan, nan)]) == {} == versus_base([])


def test_spread_takes_as_many_as_wanted_from_first_to_last() -> None:
    assert spread(range(100), 4) == [0, 25, 50, 75]
    assert spread(range(3), 10) == [0, 1, 2]
    assert spread(range(5), 5) == [0, 1, 2, 3, 4]
