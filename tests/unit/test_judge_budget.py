"""The benchmark of pair plans: its simulated judge, and that more questions never mislead more."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.judge_budget import compare, judge, oracle_scores


def test_more_questions_come_nearer_to_the_full_round_robin() -> None:
    rows, figures = compare(groups=12, group_size=8, sharpness=1.5, bias=0.4, seed=0)
    found = {(r.plan, r.reward): r for r in rows}
    assert found["round robin, both", "win rate"].with_full == pytest.approx(1.0)
    kept = [found[f"budgeted {s}, balanced", "Bradley-Terry"] for s in ("0.25", "0.50", "0.75", "1.50")]
    assert [r.questions for r in kept] == [7, 14, 21, 42]
    assert [r.with_full for r in kept] == sorted(r.with_full for r in kept)
    assert found["round robin, balanced", "win rate"].with_full > 0.9
    assert 0.7 < figures["accuracy"] < 0.95 and figures["judge/first_position_win_rate"] > 0.5


def test_siblings_differ_in_what_the_oracle_sees() -> None:
    scores = oracle_scores(4, 6, seed=1)
    assert scores.shape == (4, 6, 3) and (scores >= 0).all() and (scores <= 1).all()
    assert (scores.std(1) > 0.01).sum() >= 10


def test_the_exact_judge_agrees_with_the_scores_in_either_order() -> None:
    scores = np.array([[1.0, 0.5, 0.5], [0.5, 0.5, 0.5]])
    table = judge(scores, np.random.default_rng(0), np.inf, 0.0)
    assert (table[0, 1].winner, table[1, 0].winner) == (0.0, 1.0)
    assert table[0, 1].dimensions == {"alignment": 0.0, "quality": 0.5, "aesthetics": 0.5}
