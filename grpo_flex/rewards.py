"""Verdicts -> rewards of one group; pure.

Win = 1, tie = ½, a pair that nobody judged is missing (neither 0 nor ½). A sibling without any judged pair
has the reward NaN. Anchors are matched by their canonical names, whatever the order in a reply.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from grpo_flex.types import RewardedGroup, Verdict

if TYPE_CHECKING:
    from grpo_flex.pairing import Answer

ANCHORS = ("alignment", "quality", "aesthetics")


class Reward(Protocol):
    """Rewards of a group from its verdicts. Variants are frozen dataclasses and pure."""

    def __call__(self, group_size: int, verdicts: Sequence[Verdict], prompt_id: str) -> RewardedGroup: ...


@dataclass(frozen=True, kw_only=True)
class _Pairwise:
    # No field: whether the reward needs a judge that compares two, which a configuration can check.
    compares = True

    anchors: tuple[str, ...] = ANCHORS
    weights: tuple[float, ...] = ()
    """One weight per anchor in the mean R_dim, e.g. (1.0, 0.7, 0.7); empty: equal weights."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if len(set(self.anchors)) != len(self.anchors):
            yield "anchors", f"is {self.anchors}; an anchor occurs twice"
        if self.weights and len(self.weights) != len(self.anchors):
            yield "weights", f"has {len(self.weights)} numbers, one is needed for each of {self.anchors}"
        if self.weights and not (min(self.weights) >= 0 and sum(self.weights) > 0):
            yield "weights", f"is {self.weights}; weights are 0 or more, and not all 0"

    def __call__(self, group_size: int, verdicts: Sequence[Verdict], prompt_id: str) -> RewardedGroup:
        overall = self._rate(overall_answers(verdicts), group_size)
        rates = {a: self._rate(anchor_answers(verdicts, a), group_size) for a in self.anchors}
        weights = dict(zip(self.anchors, self._weights(), strict=True))
        judged = {a: r for a, r in rates.items() if weights[a] > 0 and not np.isnan(r).all()}
        parts = {"overall": overall, **rates}
        if judged:
            parts["dim"] = weighted_mean(judged, weights)
        return RewardedGroup(prompt_id=prompt_id, rewards_G=overall, breakdown_G=parts)

    def _weights(self) -> tuple[float, ...]:
        return self.weights or (1.0,) * len(self.anchors)

    def _rate(self, answers: Sequence[Answer], group_size: int) -> np.ndarray:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class WinRate(_Pairwise):
    """R(i) = mean over judged j != i of [i beats j] (Pref-GRPO, arXiv 2508.20751; Flex, 2602.02380).

    The breakdown holds "overall", every anchor, and "dim", the anchors' weighted mean; "dim" is absent when
    no verdict of the group decided any anchor that has a weight.
    """

    def _rate(self, answers: Sequence[Answer], group_size: int) -> np.ndarray:
        return win_rates(answers, group_size)


@dataclass(frozen=True, kw_only=True)
class BradleyTerry(_Pairwise):
    """Strengths from an incomplete set of pairs, reported as the win rate they predict against the group.

    R(i) = mean over j != i of P(i beats j) = 1/(1 + exp(s_j - s_i)), so that the numbers mean the same as ``WinRate``'s. The prior
    makes their spread smaller; without it and the position, they are the win rates of a complete group.
    """

    prior: float = 0.3
    """Precision of the Gaussian prior on a strength (nats⁻²): keeps unbeaten siblings finite."""
    position: bool = True
    """Fit the judge's preference for the first position along with the strengths. The prior leaves a trace of it in those of
    siblings that stand first more often than second, or less often, as in a group of an even size with each pair asked once; if
    the judge sees nothing else, advantages make a full-size signal of that trace."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if not self.prior > 0:
            yield "prior", f"is {self.prior}; it needs to be above 0, or an unbeaten sibling is infinitely strong"

    def _rate(self, answers: Sequence[Answer], group_size: int) -> np.ndarray:
        strengths, _ = bradley_terry(answers, group_size, prior=self.prior, position=self.position)
        chance = 1 / (1 + np.exp(strengths[None, :] - strengths[:, None]))
        np.fill_diagonal(chance, np.nan)
        return nan_mean(chance, axis=1)


@dataclass(frozen=True, kw_only=True)
class Pointwise:
    """Scores of single candidates: R(i) = Σ_c w_c·s_c(i) / Σ_c |w_c|, where s_c is the mean score of sibling i.

    A sibling that lacks a criterion which others of its group have is masked: criteria have units of their own, so that the
    mean of those that are left would be another number. One that the whole group lacks is left out.
    Scores of a family that scores two at once count for either member, unless siblings are scored one by one under that name too
    (``RankAndScore``); those of in-process scorers stand beside the judge's, by name. Beside a judge, ``Several(names=("judge", "scores"), rewards=(WinRate(), Pointwise(criteria=…)))``.
    In the breakdown a criterion called "overall" or "dim" is "score/overall" or "score/dim": the bare names are the total's and
    the anchors'.

    Raises:
        ValueError: a criterion that both the judge and a scorer give, or two scorers.
    """

    criteria: tuple[str, ...] = ()
    """Which criteria count; empty: all that the verdicts carry, equally."""
    weights: tuple[float, ...] = ()
    """One for each criterion, below 0 for what is to be small; empty: equal weights."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.weights and len(self.weights) != len(self.criteria):
            yield "weights", f"has {len(self.weights)} numbers, one is needed for each of {self.criteria}"
        if self.weights and not any(self.weights):
            yield "weights", f"is {self.weights}; not all of them can be 0"

    def __call__(self, group_size: int, verdicts: Sequence[Verdict], prompt_id: str) -> RewardedGroup:
        named = self.criteria or tuple(sorted({name for v in verdicts for name in v.scores}))
        means = {name: mean_scores(verdicts, name, group_size) for name in named}
        weights = dict(zip(named, self.weights or (1.0,) * len(named), strict=True))
        total = whole_mean({n: m for n, m in means.items() if weights[n]}, weights, group_size)
        parts = {f"score/{name}" if name in ("overall", "dim") else name: mean for name, mean in means.items()}
        return RewardedGroup(prompt_id=prompt_id, rewards_G=total, breakdown_G={"overall": total, **parts})


@dataclass(frozen=True, kw_only=True)
class Consistent:
    """Another reward, from the verdicts whose anchors do not contradict them (VisionReward, arXiv 2412.21059).

    A pair counts only where the winner wins or ties in every dimension; the others are missing, and so are those without an
    overall winner (``Unified2Pair`` names none where an axis is not sound).
    """

    compares = True

    inner: Reward = field(default_factory=WinRate)

    def __call__(self, group_size: int, verdicts: Sequence[Verdict], prompt_id: str) -> RewardedGroup:
        return self.inner(group_size, consistent(verdicts), prompt_id)


@dataclass(frozen=True, kw_only=True)
class Several:
    """Several rewards side by side, for an advantage that weighs them (``advantages.Gdpo`` and the like).

    The breakdown holds each reward's own under its name, and its parts as "name/part". ``rewards_G`` is the
    plain mean, for the record; a sibling that lacks a reward which others of its group have has none.
    """

    names: tuple[str, ...]
    rewards: tuple[Reward, ...]

    @property
    def compares(self) -> bool:
        return any(getattr(reward, "compares", False) for reward in self.rewards)

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.names or len(set(self.names)) != len(self.names) or len(self.names) != len(self.rewards):
            yield "names", f"is {self.names}; each of the {len(self.rewards)} rewards needs one name of its own"

    def __call__(self, group_size: int, verdicts: Sequence[Verdict], prompt_id: str) -> RewardedGroup:
        made = [reward(group_size, verdicts, prompt_id) for reward in self.rewards]
        parts = dict(zip(self.names, (m.rewards_G for m in made), strict=True))
        total = whole_mean(parts, dict.fromkeys(parts, 1.0), group_size)
        for name, group in zip(self.names, made, strict=True):
            parts |= {f"{name}/{part}": values for part, values in group.breakdown_G.items()}
        return RewardedGroup(prompt_id=prompt_id, rewards_G=total, breakdown_G=parts)


def consistent(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Of verdicts on pairs those whose winner loses in no dimension; for a declared tie, those with ties throughout."""
    return [v for v in verdicts if len(v.members) != 2 or _agree(v.winner, v.dimensions.values())]


def _agree(winner: float | None, dimensions: Iterable[float]) -> bool:
    return winner is not None and all(d == winner or (winner != 0.5 and d == 0.5) for d in dimensions)


# ---------------------------------------------------------------- from verdicts to answers


def overall_answers(verdicts: Sequence[Verdict]) -> list[Answer]:
    """(first, second, winner's position) of every judged pair."""
    judged = [v for v in verdicts if v.status == "ok" and len(v.members) == 2]
    return [(*_pair(v), v.winner) for v in judged if v.winner is not None]


def anchor_answers(verdicts: Sequence[Verdict], anchor: str) -> list[Answer]:
    """The same for one anchor; verdicts that do not decide the anchor are missing."""
    judged = [v for v in verdicts if v.status == "ok" and len(v.members) == 2 and anchor in v.dimensions]
    return [(*_pair(v), v.dimensions[anchor]) for v in judged]


def _pair(verdict: Verdict) -> tuple[int, int]:
    first, second = verdict.members
    return first, second


def win_matrix(answers: Sequence[Answer], group_size: int) -> np.ndarray:
    """[G, G]: the mean result of i against j over all questions about the two; NaN where there is none."""
    total, count = np.zeros((group_size, group_size)), np.zeros((group_size, group_size))
    for i, j, winner in answers:
        total[i, j] += 1 - winner
        total[j, i] += winner
        count[i, j] += 1
        count[j, i] += 1
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def win_rates(answers: Sequence[Answer], group_size: int) -> np.ndarray:
    """R [G] = mean over judged opponents of the result against them; NaN for a sibling nobody judged.

    >>> win_rates([(0, 1, 0.0), (1, 2, 0.5)], 4)
    array([1.  , 0.25, 0.5 ,  nan])
    """
    return nan_mean(win_matrix(answers, group_size), axis=1)


def nan_mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean over the numbers that are there; NaN where there is none."""
    there = ~np.isnan(values)
    count = there.sum(axis)
    total = np.where(there, values, 0.0).sum(axis)
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


def weighted_mean(parts: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """[G]: weighted mean over the parts that judged a sibling; NaN where none did.

    Each part's missing entries take their weight with them, so a part that failed does not count as 0.
    """
    values = np.stack(list(parts.values()))
    weight = np.array([weights[name] for name in parts])[:, None] * ~np.isnan(values)
    total, mass = (weight * np.nan_to_num(values)).sum(0), weight.sum(0)
    return np.divide(total, mass, out=np.full(mass.shape, np.nan), where=mass > 0)


def whole_mean(parts: Mapping[str, np.ndarray], weights: Mapping[str, float], group_size: int) -> np.ndarray:
    """[G]: Σ w·x / Σ |w| over the parts that any sibling has; NaN for a sibling that lacks one of them."""
    there = {name: part for name, part in parts.items() if not np.isnan(part).all()}
    if not there:
        return np.full(group_size, np.nan)
    weight = np.array([weights[name] for name in there])
    return (weight[:, None] * np.stack(list(there.values()))).sum(0) / np.abs(weight).sum()


def mean_scores(verdicts: Sequence[Verdict], criterion: str, group_size: int) -> np.ndarray:
    """[G]: the mean of every score that was given to each sibling under a criterion; NaN for none.

    Raises:
        ValueError: scores of one name from different sources, which have units of their own.
    """
    scoring = [v for v in verdicts if v.status == "ok" and criterion in v.scores]
    sources = [f"the scorer {name!r}" if name else "the judge" for name in sorted({v.scorer for v in scoring})]
    if len(sources) > 1:
        raise ValueError(
            f"reward: the score {criterion!r} is given by {' and by '.join(sources)}, and Pointwise would take the mean of "
            "different units; let one of them give it another name"
        )
    alone = [v for v in scoring if len(v.members) == 1]  # of two shown together, scores may be shares of the pair
    given: list[list[float]] = [[] for _ in range(group_size)]
    for verdict in alone or scoring:
        for member, score in zip(verdict.members, verdict.scores[criterion], strict=True):
            given[member].append(score)
    return np.array([np.mean(g) if g else np.nan for g in given], np.float64)


# ---------------------------------------------------------------- Bradley-Terry


def bradley_terry(
    answers: Sequence[Answer], group_size: int, *, prior: float, position: bool, rounds: int = 50
) -> tuple[np.ndarray, float]:
    """Maximum a posteriori strengths: logit P(i beats j, i shown first) = s_i - s_j + b.

    Newton's method on the concave log posterior; a tie counts as half a win for either side; strengths have
    the prior N(0, 1/prior), and so has the position's advantage b. (Bradley & Terry 1952; the term b is
    Davidson & Beaver's order effect, 1977.)

    Returns:
        Strengths [G] in nats with mean 0, NaN for siblings nobody judged; and b, 0 unless ``position``.
    """
    if not answers:
        return np.full(group_size, np.nan), 0.0
    design, won = _design(answers, group_size, position)
    theta = np.zeros(design.shape[1])
    for _ in range(rounds):
        chance = 1 / (1 + np.exp(-design @ theta))
        slope = design.T @ (won - chance) - prior * theta
        curve = (design * (chance * (1 - chance))[:, None]).T @ design + prior * np.eye(len(theta))
        step = np.linalg.solve(curve, slope)
        theta += step * min(1.0, 2.0 / max(1e-12, float(np.abs(step).max())))
        if np.abs(step).max() < 1e-10:
            break
    judged = np.abs(design[:, :group_size]).sum(0) > 0
    strengths = np.where(judged, theta[:group_size], np.nan)
    return strengths - np.nanmean(strengths), float(theta[group_size]) if position else 0.0


def _design(answers: Sequence[Answer], group_size: int, position: bool) -> tuple[np.ndarray, np.ndarray]:
    design = np.zeros((len(answers), group_size + position))
    for row, (i, j, _) in enumerate(answers):
        design[row, i], design[row, j] = 1.0, -1.0
    if position:
        design[:, group_size] = 1.0
    return design, np.array([1 - winner for _, _, winner in answers])


# ---------------------------------------------------------------- figures


def reward_metrics(rewarded: Sequence[RewardedGroup]) -> dict[str, float]:
    """``reward/…``: mean, standard deviation within groups, and the share of siblings without a reward.

    The mean win rate of a complete round robin is ½ by construction; its spread is what can be learnt from.
    """
    if not rewarded:
        return {}
    values = np.concatenate([g.rewards_G for g in rewarded])
    spreads = [float(np.nanstd(g.rewards_G)) for g in rewarded if not np.isnan(g.rewards_G).all()]
    found = {"reward/masked_share": float(np.isnan(values).mean())}
    if spreads:
        found |= {"reward/mean": float(np.nanmean(values)), "reward/group_std": float(np.mean(spreads))}
    for name in sorted({n for g in rewarded for n in g.breakdown_G} - {"overall"}):
        parts = [g.breakdown_G[name] for g in rewarded if name in g.breakdown_G]
        stds = [float(np.nanstd(p)) for p in parts if not np.isnan(p).all()]
        if stds:
            found[f"reward/{name}_std"] = float(np.mean(stds))
    return found
