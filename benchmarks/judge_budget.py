"""How few questions will do: advantages from each pair plan against those from the full round robin.

Siblings are pictures of the testbed: the prompt's scene with some attributes wrong, blurred and noised to
different degrees, and scored by the oracle. A simulated judge answers every ordered pair of a group once, by
anchor and overall: the log-odds that the first wins are the standardised difference of the oracle's scores,
times ``--sharpness``, plus ``--bias`` for standing first. Every plan reads its answers from that one table, so
plans differ by what they ask and by nothing else. Two correlations are printed, both over all siblings:
with the advantages of the full round robin in both orders, and with those of a judge without noise or bias.

    python -m benchmarks.judge_budget --groups 60 --group-size 6 8 9 16
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from grpo_flex.advantages import GroupRelative
from grpo_flex.judge_figures import judge_metrics
from grpo_flex.pairing import Budgeted, Calibrated, Orders, PairPlan, Pivots, RoundRobin, Swiss
from grpo_flex.rewards import ANCHORS, BradleyTerry, Reward, WinRate, overall_answers
from grpo_flex.types import Verdict

if TYPE_CHECKING:
    from testbed.scenes import Description

Table = dict[tuple[int, int], Verdict]
FULL = RoundRobin(orders="both")
ENOUGH = 0.95
SHARES = (1.75, 1.6, 1.5, 1.4, 1.3, 1.25, 1.2, 1.1, 0.9, 0.85, 0.8, 0.7)
"""Of the budgets that are tried in balanced orders alone."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One plan with one reward: questions per group, and the two correlations."""

    plan: str
    reward: str
    questions: float
    with_full: float
    with_truth: float


def oracle_scores(groups: int, group_size: int, seed: int) -> np.ndarray:
    """[groups, G, 3]: alignment, quality and composition of pictures of random prompts."""
    from testbed import oracle, render, scenes

    rng = np.random.default_rng(seed)
    scores = np.zeros((groups, group_size, 3))
    for g in range(groups):
        wanted = scenes.sample_description(rng)
        wrong = rng.uniform(0.1, 0.5)
        for i in range(group_size):
            scene = scenes.sample_scene(rng, _mistaken(rng, wanted, wrong))
            picture = _degraded(rng, render.render(scene))
            found = oracle.score(picture, scenes.reference(wanted))
            scores[g, i] = found.alignment, found.quality, found.composition
    return scores


def _mistaken(rng: np.random.Generator, wanted: Description, wrong: float) -> Description:
    """The description with each attribute replaced, with probability ``wrong``, by another picture's."""
    from testbed import scenes

    other = scenes.sample_description(rng, pair_fraction=float(len(wanted.things) == 2))
    things = tuple(
        replace(
            a,
            colour=b.colour if rng.random() < wrong else a.colour,
            shape=b.shape if rng.random() < wrong else a.shape,
        )
        for a, b in zip(wanted.things, other.things, strict=True)
    )
    changes = {k: getattr(other, k) for k in ("background", "relation") if rng.random() < wrong}
    return replace(wanted, things=things, **changes)


def _degraded(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    from scipy import ndimage

    blurred = ndimage.gaussian_filter(picture.astype(float), (rng.uniform(0, 1.2),) * 2 + (0,))
    return np.clip(blurred + rng.normal(0, rng.uniform(0, 6), picture.shape), 0, 255).astype(np.uint8)


def judge(scores_GD: np.ndarray, rng: np.random.Generator, sharpness: float, bias: float) -> Table:
    """Every ordered pair's verdict. An infinite sharpness is the judge without noise (ties where equal)."""
    overall = scores_GD @ np.array([0.7, 0.2, 0.1])
    merits = np.column_stack([overall, scores_GD])
    spread = merits.std(0)
    merits = merits / np.where(spread > 0, spread, 1.0)
    table: Table = {}
    size = len(merits)
    for i, j in ((i, j) for i in range(size) for j in range(size) if i != j):
        lead = merits[i] - merits[j]
        if np.isinf(sharpness):
            winners = 0.5 - 0.5 * np.sign(np.round(lead, 9))
        else:
            winners = (rng.random(4) > 1 / (1 + np.exp(-(sharpness * lead + bias)))).astype(float)
        dimensions: dict[str, float] = {a: float(w) for a, w in zip(ANCHORS, winners[1:], strict=True)}
        table[i, j] = Verdict(members=(i, j), status="ok", winner=float(winners[0]), dimensions=dimensions)
    return table


def ask(plan: PairPlan, table: Table, group_size: int, seed: int) -> list[Verdict]:
    """The verdicts that a plan asks for, round after round."""
    pairs, found = plan.pairs(group_size, seed), []
    while pairs:
        found += [table[pair] for pair in pairs]
        pairs = plan.more(group_size, seed, overall_answers(found))
    return found


def advantages(plan: PairPlan, reward: Reward, tables: Sequence[Table], group_size: int) -> tuple[np.ndarray, float]:
    """Advantages of all siblings, and the mean number of questions per group."""
    asked = [ask(plan, table, group_size, seed) for seed, table in enumerate(tables)]
    found, _ = GroupRelative()([reward(group_size, verdicts, "") for verdicts in asked])
    return np.concatenate(found), float(np.mean([len(verdicts) for verdicts in asked]))


def plans(group_size: int) -> list[tuple[str, PairPlan]]:
    """Every plan that is compared, by name."""
    orders: tuple[Orders, ...] = ("both", "balanced")
    made: list[tuple[str, PairPlan]] = [("the default", Calibrated())]
    made += [(f"round robin, {o}", RoundRobin(orders=o)) for o in orders]
    made += [(f"budgeted {s:.2f}, {o}", Budgeted(share=s, orders=o)) for s in (0.75, 0.5, 0.35, 0.25) for o in orders]
    made += [(f"budgeted {s:.2f}, balanced", Budgeted(share=s)) for s in SHARES]
    made += [(f"Swiss {r} rounds, balanced", Swiss(rounds=r)) for r in (3, 4, 6) if r < group_size - 1]
    return made + [(f"{k} pivots, balanced", Pivots(count=k)) for k in (1, 2, 3)]


def compare(
    groups: int, group_size: int, sharpness: float, bias: float, seed: int
) -> tuple[list[Row], dict[str, float]]:
    """A row per plan and reward, dearest first, and the simulated judge's own figures."""
    scores = oracle_scores(groups, group_size, seed)
    rng = np.random.default_rng([seed, 1])
    tables = [judge(s, rng, sharpness, bias) for s in scores]
    exact = [judge(s, rng, np.inf, 0.0) for s in scores]
    truth, _ = advantages(FULL, WinRate(), exact, group_size)
    full, _ = advantages(FULL, WinRate(), tables, group_size)
    rows = []
    for name, plan in plans(group_size):
        for label, reward in (("win rate", WinRate()), ("Bradley-Terry", BradleyTerry())):
            found, questions = advantages(plan, reward, tables, group_size)
            with_full, with_truth = (float(np.corrcoef(found, other)[0, 1]) for other in (full, truth))
            rows.append(Row(plan=name, reward=label, questions=questions, with_full=with_full, with_truth=with_truth))
    figures = judge_metrics([list(table.values()) for table in tables])
    right = [
        float(t[p].winner == e[p].winner) for t, e in zip(tables, exact, strict=True) for p in t if e[p].winner != 0.5
    ]
    return sorted(rows, key=lambda r: -r.questions), {**figures, "accuracy": float(np.mean(right))}


def show(size: int, groups: int, sharpness: float, bias: float, seed: int) -> None:
    """Prints the table of one group size, and the cheapest plan that is good enough."""
    rows, figures = compare(groups, size, sharpness, bias, seed)
    print(
        f"G = {size}, {groups} groups. The judge: accuracy {figures['accuracy']:.2f}, "
        f"order consistency {figures['judge/order_consistency']:.2f}, "
        f"first wins {figures['judge/first_position_win_rate']:.2f}"
    )
    dearest = rows[0].questions
    print(f"{'plan':28} {'reward':14} {'questions':>9} {'share':>6} {'r(full)':>8} {'r(truth)':>8}")
    for r in rows:
        share = r.questions / dearest
        print(f"{r.plan:28} {r.reward:14} {r.questions:9.1f} {share:6.2f} {r.with_full:8.3f} {r.with_truth:8.3f}")
    enough = [r for r in rows if r.with_full >= ENOUGH]
    cheapest = min(enough, key=lambda r: (r.questions, -r.with_full))
    print(
        f"cheapest with r(full) >= {ENOUGH}: {cheapest.plan} with {cheapest.reward}, {cheapest.questions:.0f} questions\n",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.judge_budget", description="How few questions will do.")
    parser.add_argument("--groups", type=int, default=60)
    parser.add_argument("--group-size", type=int, nargs="+", default=[6, 8, 9, 16], help="one table each (%(default)s)")
    parser.add_argument("--sharpness", type=float, default=1.5, help="log-odds per standard deviation of merit")
    parser.add_argument("--bias", type=float, default=0.4, help="log-odds for standing first")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for size in options.group_size:
        show(size, options.groups, options.sharpness, options.bias, options.seed)


if __name__ == "__main__":
    main()
