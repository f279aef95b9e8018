"""Win rates, Bradley-Terry strengths and pointwise scores, on numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_flex.advantages import GroupRelative
from grpo_flex.pairing import Budgeted, RoundRobin
from grpo_flex.rewards import (
    BradleyTerry,
    Consistent,
    Pointwise,
    Several,
    WinRate,
    bradley_terry,
    reward_metrics,
    weighted_mean,
    win_rates,
)
from grpo_flex.types import Verdict, VerdictStatus

NAN = float("nan")


def verdict(i: int, j: int, winner: float | None = 0.0, status: VerdictStatus = "ok", **dimensions: float) -> Verdict:
    return Verdict(members=(i, j), status=status, winner=winner, dimensions=dimensions)


def test_win_rates_by_hand() -> None:
    # 0 beats 1, 0 ties 2, 2 beats 1 (asked as (1, 2)); 3 was never judged.
    rates = WinRate()(4, [verdict(0, 1, 0.0), verdict(0, 2, 0.5), verdict(1, 2, 1.0)], "p").rewards_G
    np.testing.assert_array_equal(rates, [0.75, 0.0, 0.75, NAN])


def test_contradicting_orders_count_half() -> None:
    np.testing.assert_array_equal(win_rates([(0, 1, 0.0), (1, 0, 0.0), (0, 2, 0.0)], 3), [0.75, 0.5, 0.0])


@pytest.mark.parametrize("status", ["unparsed", "timeout", "failed"])
def test_a_pair_nobody_judged_is_missing_not_a_tie(status: VerdictStatus) -> None:
    found = WinRate()(3, [verdict(0, 1, 0.0), verdict(1, 2, None, status)], "p")
    np.testing.assert_array_equal(found.rewards_G, [1.0, 0.0, NAN])
    assert "dim" not in found.breakdown_G


def test_anchor_rates_and_their_mean_by_hand() -> None:
    verdicts = [
        verdict(0, 1, 0.0, alignment=0.0, quality=1.0, aesthetics=0.5),
        verdict(2, 0, 0.0, alignment=0.0, quality=1.0),
    ]
    found = WinRate()(3, verdicts, "p").breakdown_G
    np.testing.assert_array_equal(found["overall"], [0.5, 0.0, 1.0])
    np.testing.assert_array_equal(found["alignment"], [0.5, 0.0, 1.0])
    np.testing.assert_array_equal(found["quality"], [0.5, 1.0, 0.0])
    np.testing.assert_array_equal(found["aesthetics"], [0.5, 0.5, NAN])
    np.testing.assert_allclose(found["dim"], [0.5, 0.5, 0.5])


def test_anchor_weights_by_hand() -> None:
    verdicts = [verdict(0, 1, 0.0, alignment=0.0, quality=1.0, aesthetics=1.0)]
    found = WinRate(weights=(1.0, 0.7, 0.7))(2, verdicts, "p").breakdown_G["dim"]
    np.testing.assert_allclose(found, [1 / 2.4, 1.4 / 2.4])


def test_anchors_without_a_weight_leave_a_group_to_its_overall_winners() -> None:
    found = WinRate(weights=(1.0, 0.0, 0.0))(2, [verdict(0, 1, 0.0, quality=1.0)], "p")
    assert "dim" not in found.breakdown_G
    np.testing.assert_array_equal(GroupRelative()([found])[0][0], [1.0, -1.0])


def test_a_category_that_is_no_anchor_of_the_reward_is_ignored() -> None:
    found = WinRate(anchors=("quality",))(2, [verdict(0, 1, 0.0, quality=1.0, alignment=0.0)], "p").breakdown_G
    np.testing.assert_array_equal(found["dim"], [0.0, 1.0])
    assert "alignment" not in found


@given(st.integers(2, 12), st.integers(0, 1000), st.sampled_from(["both", "balanced"]), st.data())
def test_a_complete_round_robin_sums_to_half_the_group(size: int, seed: int, orders: str, data: st.DataObject) -> None:
    pairs = RoundRobin(orders=orders).pairs(size, seed)  # pyright: ignore[reportArgumentType]
    winners = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=len(pairs), max_size=len(pairs)))
    rates = win_rates([(i, j, w) for (i, j), w in zip(pairs, winners, strict=True)], size)
    assert rates.sum() == pytest.approx(size / 2)


@given(st.integers(2, 16), st.randoms())
def test_transitive_rates_have_the_known_spread(size: int, chance: object) -> None:
    merit = list(range(size))
    chance.shuffle(merit)  # pyright: ignore[reportAttributeAccessIssue]
    answers = [(i, j, float(merit[j] > merit[i])) for i, j in RoundRobin().pairs(size, 0)]
    assert win_rates(answers, size).std() == pytest.approx(math.sqrt((size + 1) / (12 * (size - 1))))


def test_weighted_mean_takes_the_weight_of_what_is_missing_away() -> None:
    parts = {"a": np.array([1.0, NAN, NAN]), "b": np.array([0.0, 0.5, NAN])}
    np.testing.assert_allclose(weighted_mean(parts, {"a": 3.0, "b": 1.0}), [0.75, 0.5, NAN])


def scored(sibling: int, **scores: float) -> Verdict:
    return Verdict(members=(sibling,), status="ok", scores={name: (value,) for name, value in scores.items()})


def test_who_lacks_a_score_that_others_have_is_masked_and_not_scored_on_another_scale() -> None:
    """A picture whose list is missing is not lifted above better ones by the score that is left."""
    listed = [scored(i, final=f, elements=1.0) for i, f in enumerate((4.0, 4.5, 5.0))]
    found = Pointwise()(4, [*listed, scored(3, final=2.5)], "p").rewards_G
    np.testing.assert_allclose(found, [2.5, 2.75, 3.0, NAN])
    alone = Pointwise(criteria=("final",))(4, [*listed, scored(3, final=2.5)], "p").rewards_G
    np.testing.assert_allclose(alone, [4.0, 4.5, 5.0, 2.5])
    several = Several(names=("a", "b"), rewards=(Pointwise(criteria=("final",)), Pointwise(criteria=("elements",))))
    np.testing.assert_allclose(several(4, [*listed, scored(3, final=2.5)], "p").rewards_G, [2.5, 2.75, 3.0, NAN])


def test_a_score_that_all_lack_or_that_weighs_nothing_masks_nobody() -> None:
    verdicts = [scored(0, a=1.0), scored(1, a=2.0, b=9.0)]
    np.testing.assert_allclose(Pointwise(criteria=("a", "gone"))(2, verdicts, "p").rewards_G, [1.0, 2.0])
    np.testing.assert_allclose(
        Pointwise(criteria=("a", "b"), weights=(1.0, 0.0))(2, verdicts, "p").rewards_G, [1.0, 2.0]
    )


def test_scores_of_one_name_from_two_sources_are_refused_and_both_are_named() -> None:
    verdicts = [scored(0, alignment=4.0, light=0.5), replace(scored(0, alignment=0.2), scorer="clip")]
    with pytest.raises(
        ValueError, match=r"'alignment' is given by the judge and by the scorer 'clip', .* another name"
    ):
        Pointwise()(1, verdicts, "p")
    np.testing.assert_array_equal(Pointwise(criteria=("light",))(1, verdicts, "p").rewards_G, [0.5])


def test_a_criterion_with_the_name_of_a_part_is_not_taken_for_it() -> None:
    verdicts = [scored(0, overall=1.0, dim=9.0, a=5.0), scored(1, overall=2.0, dim=1.0, a=6.0)]
    found = Pointwise(criteria=("overall", "dim", "a"), weights=(0.0, -1.0, 0.0))(2, verdicts, "p")
    assert {name: [*part] for name, part in found.breakdown_G.items()} == {
        "overall": [-9.0, -1.0], "score/overall": [1.0, 2.0], "score/dim": [9.0, 1.0], "a": [5.0, 6.0]
    }  # fmt: skip
    np.testing.assert_array_equal(GroupRelative()([found])[0][0], [-1.0, 1.0])


def test_a_score_may_count_against_a_sibling() -> None:
    verdicts = [scored(0, good=1.0, bad=3.0), scored(1, good=2.0, bad=1.0)]
    penalty = Pointwise(criteria=("good", "bad"), weights=(3.0, -1.0))
    np.testing.assert_allclose(penalty(2, verdicts, "p").rewards_G, [0.0, 1.25])
    assert not [*penalty.problems()]
    assert [field for field, _ in Pointwise(criteria=("good",), weights=(0.0,)).problems()] == ["weights"]


def test_bradley_terry_of_one_pair_by_hand() -> None:
    # s = s_0 = -s_1 maximises log σ(2s) - s² with prior 1: 2(1 - σ(2s)) = 2s.
    strengths, bias = bradley_terry([(0, 1, 0.0)], 2, prior=1.0, position=False)
    s = strengths[0]
    assert bias == 0.0
    assert s == pytest.approx(1 - 1 / (1 + math.exp(-2 * s)))
    assert strengths[1] == pytest.approx(-s)


def test_bradley_terry_recovers_strengths_and_the_position_bias() -> None:
    rng = np.random.default_rng(0)
    true, bias = np.array([1.5, 0.5, -0.5, -1.5]), 0.8
    answers = [
        (i, j, float(rng.random() > 1 / (1 + math.exp(-(true[i] - true[j] + bias)))))
        for i, j in permutations(range(4), 2)
        for _ in range(400)
    ]
    strengths, fitted = bradley_terry(answers, 4, prior=0.01, position=True)
    np.testing.assert_allclose(strengths, true, atol=0.2)
    assert fitted == pytest.approx(bias, abs=0.15)


def test_bradley_terry_is_finite_for_the_unbeaten_and_missing_for_the_unasked() -> None:
    found = BradleyTerry()(4, [verdict(0, 1, 0.0), verdict(1, 2, 0.0)], "p").rewards_G
    assert found[0] > found[1] > found[2]
    assert np.isfinite(found[:3]).all() and np.isnan(found[3])
    assert np.isnan(BradleyTerry()(3, [], "p").rewards_G).all()


def test_bradley_terry_orders_a_group_from_a_third_of_its_pairs() -> None:
    verdicts = [verdict(i, j, float(j < i)) for i, j in Budgeted(share=0.34).pairs(12, 1)]
    found = BradleyTerry(position=False)(12, verdicts, "p").rewards_G
    assert np.corrcoef(found, -np.arange(12))[0, 1] > 0.85


def test_bradley_terry_reports_the_mean_chance_against_the_others() -> None:
    answers = [(0, 1, 0.0), (1, 2, 0.0), (2, 0, 1.0)]
    (s0, s1, s2), _ = bradley_terry(answers, 3, prior=0.3, position=True)
    assert s0 > s1 > s2

    def chance(one: float, other: float) -> float:
        return 1 / (1 + math.exp(other - one))

    by_hand = [(chance(s0, s1) + chance(s0, s2)) / 2, (chance(s1, s0) + chance(s1, s2)) / 2]
    by_hand.append((chance(s2, s0) + chance(s2, s1)) / 2)
    found = BradleyTerry()(3, [verdict(*answer) for answer in answers], "p").rewards_G
    np.testing.assert_allclose(found, by_hand, rtol=1e-12)


def test_bradley_terry_of_a_complete_group_is_its_win_rate() -> None:
    """The likelihood is largest where each sibling's expected wins are those that it has; 0 > 1 > 2 > 3 > 0 separates nobody."""
    beaten = {(0, 1): 0.0, (1, 2): 0.0, (2, 3): 0.0, (0, 3): 1.0, (0, 2): 0.0, (1, 3): 0.5}
    answers = [verdict(i, j, winner) for (i, j), winner in beaten.items()]
    rates = WinRate()(4, answers, "p").rewards_G
    np.testing.assert_allclose(rates, np.array([2, 1.5, 1, 1.5]) / 3)
    found = BradleyTerry(prior=1e-6, position=False)(4, answers, "p").rewards_G
    np.testing.assert_allclose(found, rates, atol=1e-5)
    assert BradleyTerry(position=False)(4, answers, "p").rewards_G.std() < rates.std()


def test_pointwise_scores_by_hand() -> None:
    verdicts = [
        Verdict(members=(0,), status="ok", scores={"alignment": (4.0,), "style": (2.0,)}),
        Verdict(members=(1,), status="ok", scores={"alignment": (3.0,), "style": (5.0,)}),
        Verdict(members=(2,), status="unparsed", problem="no score"),
    ]
    found = Pointwise()(3, verdicts, "p")
    np.testing.assert_array_equal(found.rewards_G, [3.0, 4.0, NAN])
    assert "dim" not in found.breakdown_G
    weighted = Pointwise(criteria=("alignment", "style"), weights=(3.0, 1.0))(3, verdicts, "p")
    np.testing.assert_array_equal(weighted.rewards_G, [3.5, 3.5, NAN])
    assert np.isnan(Pointwise()(2, [], "p").rewards_G).all()


def test_pair_scores_count_for_either_member() -> None:
    verdicts = [Verdict(members=(i, j), status="ok", scores={"a": (0.25, 0.75)}) for i, j in [(0, 1), (1, 2)]]
    np.testing.assert_array_equal(Pointwise()(3, verdicts, "p").rewards_G, [0.25, 0.5, 0.75])


def test_scores_of_siblings_by_themselves_are_not_mixed_with_shares_of_a_pair() -> None:
    pair = Verdict(members=(0, 1), status="ok", winner=0.0, scores={"alignment": (0.9, 0.1), "style": (0.4, 0.6)})
    verdicts = [pair, scored(0, alignment=2.0), scored(1, alignment=4.0)]
    found = Pointwise()(2, verdicts, "p").breakdown_G
    np.testing.assert_array_equal(found["alignment"], [2.0, 4.0])
    np.testing.assert_array_equal(found["style"], [0.4, 0.6])


def test_only_verdicts_that_no_dimension_contradicts_count() -> None:
    verdicts = [
        verdict(0, 1, 0.0, alignment=0.0, quality=0.5),  # wins and ties: counts
        verdict(1, 2, 0.0, alignment=0.0, quality=1.0),  # loses in quality: does not
        verdict(0, 2, 0.5, alignment=0.5),  # a tie throughout: counts
        verdict(1, 3, 0.5, alignment=0.0),  # a tie that is none in alignment: does not
        verdict(2, 3, None, "timeout"),
    ]
    found = Consistent()(4, verdicts, "p").rewards_G
    np.testing.assert_array_equal(found, [0.75, 0.0, 0.5, NAN])


def test_a_pair_without_an_overall_winner_is_missing_from_the_anchors_too() -> None:
    open_pairs = [verdict(0, 1, None, alignment=0.0, coherence=1.0), verdict(0, 1, None, alignment=0.0, coherence=0.0)]
    found = Consistent(inner=WinRate(anchors=("alignment", "coherence")))(2, open_pairs, "p")
    assert all(np.isnan(part).all() for part in found.breakdown_G.values()) and "dim" not in found.breakdown_G
    np.testing.assert_array_equal(Consistent(inner=Pointwise())(2, [scored(0, a=1.0)], "p").rewards_G, [1.0, NAN])


def test_several_rewards_stand_side_by_side() -> None:
    verdicts = [Verdict(members=(0, 1), status="ok", winner=0.0, dimensions={"quality": 1.0}, scores={"s": (2.0, 5.0)})]
    found = Several(names=("wins", "points"), rewards=(WinRate(), Pointwise()))(2, verdicts, "p")
    np.testing.assert_array_equal(found.rewards_G, [1.5, 2.5])
    np.testing.assert_array_equal(found.breakdown_G["wins"], [1.0, 0.0])
    np.testing.assert_array_equal(found.breakdown_G["points"], [2.0, 5.0])
    np.testing.assert_array_equal(found.breakdown_G["wins/quality"], [0.0, 1.0])
    assert [f for f, _ in Several(names=("a",), rewards=(WinRate(), Pointwise())).problems()] == ["names"]


def test_reward_figures() -> None:
    groups = [WinRate()(2, [verdict(0, 1, 0.0, quality=0.0)], "a"), WinRate()(2, [], "b")]
    found = reward_metrics(groups)
    assert found["reward/masked_share"] == 0.5
    assert (found["reward/mean"], found["reward/group_std"], found["reward/dim_std"]) == (0.5, 0.5, 0.5)
    assert reward_metrics([]) == {}


@pytest.mark.parametrize(
    ("reward", "field"),
    [
        (WinRate(weights=(1.0,)), "weights"),
        (WinRate(weights=(0.0, 0.0, 0.0)), "weights"),
        (WinRate(anchors=("a", "a")), "anchors"),
        (BradleyTerry(prior=0.0), "prior"),
        (Pointwise(criteria=("a",), weights=(1.0, 2.0)), "weights"),
    ],
)
def test_an_impossible_reward_is_a_complaint(reward: WinRate | BradleyTerry | Pointwise, field: str) -> None:
    assert [f for f, _ in reward.problems()] == [field]
