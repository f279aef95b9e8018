"""UnifiedReward's pair construction: rank pairs, sift by score, keep one pair or none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from grpo_flex.advantages import BestAndWorst, best_and_worst
from grpo_flex.rewards import Pointwise, Several, WinRate
from grpo_flex.types import RewardedGroup, Verdict

NAN = float("nan")
CASES = [
    # Pairs (0, 1), (2, 3): winners 0 and 2, losers 1 and 3.
    ([1, 0, 1, 0], [3, 2, 4, 1], [NAN, NAN, 1, -1]),
    # The best score of all is a loser's: it is not chosen.
    ([1, 0, 1, 0], [3, 9, 4, 1], [NAN, NAN, 1, -1]),
    # The chosen winner does not score higher than the chosen loser: the prompt is dropped.
    ([1, 0, 1, 0], [2, 5, 3, 4], [NAN] * 4),
    ([1, 0], [3, 3], [NAN] * 2),
    # Ties make neither winners nor losers; who has no score is not chosen.
    ([0.5, 0.5, 1, 0], [9, 0, 2, 1], [NAN, NAN, 1, -1]),
    ([1, 0, 1, 0], [NAN, 2, 4, NAN], [NAN, -1, 1, NAN]),
    ([0.5 + 1e-16, 0.5 - 2e-16, 1, 0], [9, 0, 2, 1], [NAN, NAN, 1, -1]),
    ([1, 1, 1], [1, 2, 3], [NAN] * 3),
    ([NAN, NAN], [1, 2], [NAN] * 2),
]


@pytest.mark.parametrize(("rates", "scores", "expected"), CASES)
def test_by_hand(rates: list[float], scores: list[float], expected: list[float]) -> None:
    np.testing.assert_array_equal(best_and_worst(np.array(rates, float), np.array(scores, float)), expected)


values = st.one_of(st.just(NAN), st.sampled_from([k / 4 for k in range(5)]))


@given(st.integers(2, 9).flatmap(lambda n: st.tuples(*[hnp.arrays(np.float64, n, elements=values)] * 2)))
def test_one_pair_or_none(pair: tuple[np.ndarray, np.ndarray]) -> None:
    rates, scores = pair
    found = best_and_worst(rates, scores)
    kept = ~np.isnan(found)
    assert sorted(found[kept]) in ([], [-1.0, 1.0])
    if kept.any():
        best, worst = int(np.nanargmax(found)), int(np.nanargmin(found))
        assert rates[best] > 0.5 > rates[worst] and scores[best] > scores[worst]


def test_parts_are_found_by_name_and_figures_count_what_is_dropped() -> None:
    groups = [
        RewardedGroup(prompt_id="a", rewards_G=np.array([1.0, 0.0]), breakdown_G={"dim": np.array([0.6, 0.4])}),
        RewardedGroup(prompt_id="b", rewards_G=np.array([1.0, 0.0]), breakdown_G={"dim": np.array([0.4, 0.6])}),
        RewardedGroup(prompt_id="c", rewards_G=np.array([1.0, 0.0]), breakdown_G={}),
    ]
    found, figures = BestAndWorst()(groups)
    np.testing.assert_array_equal(np.stack(found), [[1, -1], [NAN, NAN], [1, -1]])
    assert figures["advantage/dropped_share"] == pytest.approx(1 / 3)
    assert BestAndWorst()([]) == ([], {})


def test_a_comparing_judge_ranks_and_a_scoring_one_sifts() -> None:
    verdicts = [
        Verdict(members=(0, 1), status="ok", winner=0.0), Verdict(members=(2, 3), status="ok", winner=0.0),
        *(Verdict(members=(i,), status="ok", scores={"alignment": (s,)}) for i, s in enumerate([3.0, 2.0, 4.0, 1.0])),
    ]  # fmt: skip
    reward = Several(names=("rank", "point"), rewards=(WinRate(), Pointwise()))
    (found,), _ = BestAndWorst(rank="rank", score="point")([reward(4, verdicts, "p")])
    np.testing.assert_array_equal(found, [NAN, NAN, 1, -1])
