"""Group-relative advantages, by hand and by property."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from grpo_flex.advantages import (
    Advantage,
    BestAndWorst,
    Gdpo,
    GroupRelative,
    LogTamed,
    Pareto,
    WeightedSum,
    dominated,
    is_flat,
    log_tamed,
    standardise,
)
from grpo_flex.types import RewardedGroup

NAN = float("nan")
rewards = hnp.arrays(np.float64, st.integers(2, 12), elements=st.sampled_from([k / 12 for k in range(13)]))


def group(overall: list[float] | np.ndarray, dim: list[float] | np.ndarray | None = None) -> RewardedGroup:
    parts = {} if dim is None else {"dim": np.array(dim, float)}
    return RewardedGroup(prompt_id="p", rewards_G=np.array(overall, float), breakdown_G=parts)


def test_combined_advantage_by_hand() -> None:
    # dim: mean 2, deviations -1, 0, 1, population std √(2/3); overall: mean 1/3, 1 - 1/3 over √2/3.
    (found,), _ = GroupRelative(alpha=0.7)([group([1.0, 0.0, 0.0], [1.0, 2.0, 3.0])])
    by_dim = np.array([-1.0, 0.0, 1.0]) / np.sqrt(2 / 3)
    by_overall = np.array([np.sqrt(2.0), -np.sqrt(0.5), -np.sqrt(0.5)])
    np.testing.assert_allclose(found, 0.7 * by_dim + 0.3 * by_overall)


def test_alpha_at_its_ends_uses_one_part_only() -> None:
    mixed = group([1.0, 0.0, NAN], [0.0, 1.0, 0.5])
    np.testing.assert_array_equal(GroupRelative(alpha=0.0)([mixed])[0][0], [1.0, -1.0, NAN])
    (by_dim,), _ = GroupRelative(alpha=1.0)([mixed])
    np.testing.assert_allclose(by_dim, np.array([-0.5, 0.5, 0.0]) / np.sqrt(1 / 6), atol=1e-15)


@pytest.mark.parametrize(
    "advantage",
    [GroupRelative(), GroupRelative(scale="batch"), WeightedSum(), Pareto(), Gdpo(), LogTamed(), BestAndWorst()],
    ids=lambda a: type(a).__name__,
)
def test_only_where_other_groups_do_not_matter_may_a_group_be_learnt_from_before_them(advantage: Advantage) -> None:
    """Also says that those which do wait have a reason to."""
    spreads = ([2.0, 2.1, 2.3, NAN], [0.0, 9.0, 0.5, 4.0], [1.0, 1.0, 1.0, 1.0])
    parts = [{"overall": np.array(s), "dim": np.array([s[1], s[2], s[0], s[3]])} for s in spreads]
    groups = [RewardedGroup(prompt_id="p", rewards_G=p["overall"], breakdown_G=p) for p in parts]
    together, alone = advantage(groups)[0], [advantage([group])[0][0] for group in groups]
    assert all(map(np.array_equal, together, alone, [True] * 3)) == advantage.per_group


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_both_parts_are_centred_on_the_siblings_that_have_both(scale: str) -> None:
    advantage = GroupRelative(alpha=0.7, scale=scale)  # pyright: ignore[reportArgumentType]
    (found,), _ = advantage([group([1.0, 0.5, 0.5, 0.0], [1.0, 0.0, 0.5, NAN])])
    (alone,), _ = advantage([group([1.0, 0.5, 0.5], [1.0, 0.0, 0.5])])
    np.testing.assert_array_equal(found, [*alone, NAN])
    assert np.nanmean(found) == pytest.approx(0, abs=1e-12)


def test_without_anchors_it_is_plainly_group_relative() -> None:
    np.testing.assert_array_equal(GroupRelative()([group([3.0, 5.0])])[0][0], [-1.0, 1.0])


def test_groups_with_and_without_anchors_keep_their_places() -> None:
    found, _ = GroupRelative(alpha=1.0)(
        [group([0, 1]), group([0, 1], [5.0, 3.0]), group([1, 0]), group([0, 1], [1, 2])]
    )
    np.testing.assert_array_equal(np.stack(found), [[-1, 1], [1, -1], [1, -1], [-1, 1]])


def test_the_batch_scale_by_hand() -> None:
    # Deviations -2, 2 and -1, 1: pooled std √(10/4).
    found, _ = GroupRelative(scale="batch")([group([0.0, 4.0]), group([1.0, 3.0]), group([7.0, 7.0])])
    std = np.sqrt(3.0 * 10 / 4 / 4.5)  # two more deviations of 0
    np.testing.assert_allclose(found[0], np.array([-2, 2]) / std)
    np.testing.assert_allclose(found[1], np.array([-1, 1]) / std)
    np.testing.assert_array_equal(found[2], [0.0, 0.0])


def test_clipping_by_hand() -> None:
    outlier = [1.0] + [0.0] * 99
    (found,), figures = GroupRelative(clip=5)([group(outlier)])
    assert found[0] == 5.0 and figures["advantage/clipped_share"] == 0.01
    assert figures["advantage/abs_max"] == pytest.approx(np.sqrt(99))


@given(rewards)
def test_mean_zero_and_unit_spread(values: np.ndarray) -> None:
    found = standardise(values)
    assert found.mean() == pytest.approx(0, abs=1e-12)
    assert is_flat(values) or found.std() == pytest.approx(1)


@given(rewards, rewards, st.sampled_from(["group", "batch"]), st.sampled_from([-3.0, 0.25, 100.0]))
def test_a_shift_of_the_rewards_changes_nothing(one: np.ndarray, two: np.ndarray, scale: str, shift: float) -> None:
    advantage = GroupRelative(scale=scale)  # pyright: ignore[reportArgumentType]
    plain, _ = advantage([group(one), group(two)])
    moved, _ = advantage([group(one + shift), group(two)])
    np.testing.assert_allclose(plain[0], moved[0], atol=1e-9)
    np.testing.assert_allclose(plain[1], moved[1], atol=1e-9)


@given(rewards, st.sampled_from([1e-3, 0.25, 7.0, 1e4]))
def test_a_positive_factor_changes_nothing_and_a_negative_one_the_sign(values: np.ndarray, factor: float) -> None:
    np.testing.assert_allclose(standardise(values * factor), standardise(values), atol=1e-9)
    np.testing.assert_allclose(standardise(values * -factor), -standardise(values), atol=1e-9)


@given(rewards, st.randoms())
def test_ties_stay_ties_order_stays_order_and_places_do_not_matter(values: np.ndarray, chance: Random) -> None:
    found = standardise(values)
    np.testing.assert_array_equal(np.sign(np.subtract.outer(found, found)), np.sign(np.subtract.outer(values, values)))
    places = list(range(len(values)))
    chance.shuffle(places)
    np.testing.assert_allclose(standardise(values[places]), found[places], atol=1e-12)


@given(st.integers(1, 6), st.integers(1, 6))
def test_two_levels_of_ties_by_formula(high: int, low: int) -> None:
    """h siblings tie above l others: √(l/h) and −√(h/l)."""
    found = standardise(np.array([0.9] * high + [0.2] * low))
    np.testing.assert_allclose(found, [(low / high) ** 0.5] * high + [-((high / low) ** 0.5)] * low)


@given(hnp.arrays(np.float64, st.integers(2, 12), elements=st.one_of(st.just(NAN), st.floats(-1e3, 1e3))))
def test_whatever_the_rewards_nothing_but_unjudged_members_is_nan(values: np.ndarray) -> None:
    for advantage in (GroupRelative(), GroupRelative(scale="batch")):
        (found,), _ = advantage([group(values)])
        np.testing.assert_array_equal(np.isnan(found), np.isnan(values))
        assert np.nanmax(np.abs(found), initial=0.0) <= 5.0


@given(st.integers(1, 12), st.floats(-1e6, 1e6), st.sampled_from(["group", "batch"]))
def test_a_constant_group_is_exactly_zero(size: int, value: float, scale: str) -> None:
    found, figures = GroupRelative(scale=scale)([group([value] * size, [value] * size)])  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(found[0], np.zeros(size))
    assert figures["advantage/zero_std_share"] == 1.0 and figures["advantage/zero_std_dim_share"] == 1.0


def test_groups_without_any_advantage_are_counted_whatever_the_rewards() -> None:
    by_anchors_alone = group([0.5, 0.5], [1.0, 0.0])
    assert GroupRelative()([by_anchors_alone, group([NAN, 1.0])])[1]["advantage/zero_std_share"] == 0.5
    assert GroupRelative(alpha=0.0)([by_anchors_alone])[1]["advantage/zero_std_share"] == 1.0
    # The first of these groups differs in a reward alone that does not count.
    groups = [parts(r=[0.0, 1.0], a=[0.3, 0.3], b=[0.1, 0.1]), parts(r=[0.0, 1.0], a=[0.1, 0.2], b=[5, 9])]
    assert Gdpo(parts=("a", "b"))(groups)[1]["advantage/zero_std_share"] == 0.5


def test_rounding_is_not_preference() -> None:
    np.testing.assert_array_equal(standardise(np.array([0.1 + 0.2, 0.3])), [0.0, 0.0])


@given(rewards, st.integers(0, 12))
def test_a_member_without_a_reward_stays_nan_and_touches_nobody(values: np.ndarray, place: int) -> None:
    place = min(place, len(values))
    with_hole = np.insert(values, place, NAN)
    found = standardise(with_hole)
    assert np.isnan(found[place])
    np.testing.assert_array_equal(np.delete(found, place), standardise(values))


def test_an_unjudged_group_is_all_nan_and_touches_no_other() -> None:
    for scale in ("group", "batch"):
        found, figures = GroupRelative(scale=scale)([group([NAN, NAN]), group([1.0, 0.0])])
        assert np.isnan(found[0]).all()
        np.testing.assert_array_equal(found[1], [1.0, -1.0])
        assert figures["advantage/masked_share"] == 0.5


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_group_of_two_is_plus_and_minus_one(one: float, two: float) -> None:
    assume(abs(one - two) > 1e-6)
    np.testing.assert_allclose(standardise(np.array([one, two])), [np.sign(one - two), np.sign(two - one)])


def test_no_groups_no_figures() -> None:
    assert GroupRelative()([]) == ([], {})


@pytest.mark.parametrize(("field", "value"), [("alpha", 1.5), ("clip", 0.0), ("scale", "run")])
def test_an_impossible_setting_is_a_complaint(field: str, value: object) -> None:
    assert [f for f, _ in GroupRelative(**{field: value}).problems()] == [field]  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------- several rewards at once


def parts(**values: list[float]) -> RewardedGroup:
    arrays = {name: np.array(v, float) for name, v in values.items()}
    return RewardedGroup(prompt_id="p", rewards_G=next(iter(arrays.values())), breakdown_G=arrays)


def test_weighted_sum_by_hand() -> None:
    # 1·a + 2·b = 2, 3, 4: deviations -1, 0, 1 over √(2/3).
    (found,), _ = WeightedSum(parts=("a", "b"), weights=(1.0, 2.0))([parts(a=[0, 1, 0], b=[1, 1, 2])])
    np.testing.assert_allclose(found, np.array([-1, 0, 1]) / np.sqrt(2 / 3))


def test_gdpo_by_hand() -> None:
    # Group 1: a gives (-1, 1), b (1, -1): they cancel. Group 2: both give (-1, 1), whatever their scale.
    # Sums 0, 0, -1, 1 with weights ½: mean 0, std √½.
    groups = [parts(a=[0, 1], b=[300, 100]), parts(a=[0.1, 0.2], b=[5, 9])]
    found, _ = Gdpo(parts=("a", "b"))(groups)
    np.testing.assert_allclose(np.stack(found), [[0, 0], [-np.sqrt(2), np.sqrt(2)]], atol=1e-12)


def test_gdpo_keeps_mixes_apart_that_a_sum_merges() -> None:
    group = parts(a=[1, 0, 0, 1], b=[0, 1, 0, 0])
    summed, _ = WeightedSum(parts=("a", "b"))([group])
    apart, _ = Gdpo(parts=("a", "b"))([group])
    assert summed[0][0] == summed[0][1]
    assert apart[0][0] != pytest.approx(apart[0][1])


def test_log_tamed_by_hand() -> None:
    calm, wild = [3.0, 5.0], [0.0, np.e**2 - 1]
    # Variation of a: 1/4; of b: 1. With threshold ½ only b becomes log(1 + b) = 0, 2.
    (tamed,) = log_tamed([np.array([calm, wild])], 0.5)
    np.testing.assert_allclose(tamed, [[3, 5], [0, 2]])
    (both,) = log_tamed([np.array([calm, [-x for x in wild]])], 0.2)
    np.testing.assert_allclose(both, [[np.log(4), np.log(6)], [0, -2]])
    # a + b of three siblings: 3 + 0, 5 + 2, 3 + 2 -> 3, 7, 5.
    group = parts(a=[3, 5, 3], b=[0, np.e**2 - 1, np.e**2 - 1])
    (found,), _ = LogTamed(parts=("a", "b"), weights=(1, 1), threshold=0.5)([group])
    np.testing.assert_allclose(found, np.array([-2, 2, 0]) / np.sqrt(8 / 3), atol=1e-12)
    assert log_tamed([], 0.5) == []


def test_pareto_by_hand() -> None:
    # Sums 3, 3, 2, 0: mean 2, std √1.5. The third is beaten by the first in both; the last by everybody.
    group = parts(a=[2, 0, 1, 0], b=[1, 3, 1, 0])
    (found,), _ = Pareto(parts=("a", "b"), weights=(1.0, 1.0))([group])
    np.testing.assert_allclose(found, [1 / np.sqrt(1.5), 1 / np.sqrt(1.5), 0, 0])
    np.testing.assert_array_equal(dominated(np.array([[1.0, 1.0], [2.0, 2.0]])), [False, False])


SEVERAL = [WeightedSum(parts=("a", "b")), Gdpo(parts=("a", "b")), LogTamed(parts=("a", "b")), Pareto(parts=("a", "b"))]


@pytest.mark.parametrize("advantage", SEVERAL, ids=lambda a: type(a).__name__)
def test_several_rewards_keep_the_rules_of_one(advantage: WeightedSum) -> None:
    groups = [
        parts(a=[1, 0, NAN, 1], b=[1, NAN, 1, 0]),
        parts(a=[2, 2], b=[1, 1]),
        parts(a=[NAN, NAN], b=[1, 2]),
        parts(a=[1, 2]),
    ]
    found, figures = advantage(groups)
    np.testing.assert_array_equal(np.isnan(found[0]), [False, True, True, False])
    np.testing.assert_array_equal(found[1], [0.0, 0.0])
    assert np.isnan(found[2]).all() and np.isnan(found[3]).all()
    assert found[0][0] > found[0][3]
    assert figures["advantage/masked_share"] == 0.6
    assert advantage([]) == ([], {})
    assert not list(advantage.problems())


def test_impossible_mixtures_are_complaints() -> None:
    assert [f for f, _ in WeightedSum(parts=(), clip=-1.0).problems()] == ["parts", "clip"]
    assert [f for f, _ in Gdpo(parts=("a",), weights=(1.0, 2.0)).problems()] == ["weights"]
    assert [f for f, _ in LogTamed(threshold=-1.0).problems()] == ["threshold"]
