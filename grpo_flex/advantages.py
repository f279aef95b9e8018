"""Rewards -> group-relative advantages; pure.

Siblings are compared with each other and with nobody else. A member without a reward (NaN) has the advantage
NaN, carries no loss and does not touch the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np

from grpo_flex.types import RewardedGroup

FLAT = 1e-9
"""A spread below this is rounding, not preference: rewards are means of 0, ½ and 1 or scores of order 1."""


class Advantage(Protocol):
    """Advantages of a step's groups. Variants are frozen dataclasses and pure."""

    @property
    def per_group(self) -> bool:
        """Whether a group's advantages are the same whatever other groups there are: it may then be learnt from
        before those are complete."""
        ...

    def __call__(self, rewarded: Sequence[RewardedGroup]) -> tuple[list[np.ndarray], dict[str, float]]:
        """float64 [G] per group, NaN for masked members, and ``advantage/…`` figures."""
        ...


@dataclass(frozen=True, kw_only=True)
class GroupRelative:
    """Â = α·Â_dim + (1-α)·Â_overall, each Â = (R - mean_G)/std (UnifiedReward-Flex, arXiv 2602.02380).

    Groups whose breakdown has no "dim" part (pointwise rewards, or no anchor judged) use ``rewards_G`` alone. In the
    others a sibling that lacks one of the two is masked, unless ``alpha`` leaves that one out.
    """

    alpha: float = 0.7
    """Weight of the anchors' mean win rate against the overall one; the paper's sweep peaks at 0.7."""
    clip: float = 5.0
    """Largest absolute advantage."""
    scale: Literal["group", "batch"] = "group"
    """Which standard deviation (population) divides: the group's own, or that of all the step's groups, which
    does not blow up the noise of groups whose siblings are nearly equal (Pref-GRPO, arXiv 2508.20751)."""

    @property
    def per_group(self) -> bool:
        return self.scale == "group"

    def problems(self) -> Iterator[tuple[str, str]]:
        if not 0 <= self.alpha <= 1:
            yield "alpha", f"is {self.alpha}; it weighs two parts, 0 (overall only) to 1 (anchors only)"
        if not self.clip > 0:
            yield "clip", f"is {self.clip}; it needs to be above 0"
        if self.scale not in ("group", "batch"):
            yield "scale", f"is {self.scale!r}; it needs to be group or batch"

    def __call__(self, rewarded: Sequence[RewardedGroup]) -> tuple[list[np.ndarray], dict[str, float]]:
        """float64 [G] per group, and ``advantage/…`` figures."""
        parts = [self._parts(g.rewards_G, g.breakdown_G.get("dim")) for g in rewarded]
        dims = [dim for _, dim in parts]
        raw = self._standardised([overall for overall, _ in parts])
        by_dim = iter(self._standardised([d for d in dims if d is not None]))
        mixed = [a if d is None else self._mix(a, next(by_dim)) for a, d in zip(raw, dims, strict=True)]
        clipped = [np.clip(a, -self.clip, self.clip) for a in mixed]
        return clipped, advantage_metrics(rewarded, mixed, self.clip)

    def _parts(self, overall: np.ndarray, dim: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        """Where both count, who lacks one has neither: each is then centred on the siblings that are left, and so is the mix."""
        if dim is None or self.alpha in (0, 1):
            return overall, dim
        lacking = np.isnan(overall) | np.isnan(dim)
        return np.where(lacking, np.nan, overall), np.where(lacking, np.nan, dim)

    def _mix(self, overall: np.ndarray, dim: np.ndarray) -> np.ndarray:
        # A weight of 0 switches a part off entirely: 0·NaN would mask members for a part that does not count.
        parts = [(self.alpha, dim), (1 - self.alpha, overall)]
        return np.sum([weight * part for weight, part in parts if weight > 0], axis=0)

    def _standardised(self, rewards: Sequence[np.ndarray]) -> list[np.ndarray]:
        if self.scale == "group":
            return [standardise(r) for r in rewards]
        pooled = batch_std(rewards)
        return [standardise(r, pooled) for r in rewards]


def standardise(rewards_G: np.ndarray, std: float | None = None) -> np.ndarray:
    """(R - mean)/std over the members that have a reward; exactly 0 where those are all equal.

    Args:
        rewards_G: float64 [G]; NaN members stay NaN.
        std: The divisor; None: the group's own population standard deviation.

    >>> standardise(np.array([1.0, 3.0, np.nan]))
    array([-1.,  1., nan])
    """
    judged = ~np.isnan(rewards_G)
    centred = np.where(judged, 0.0, np.nan)
    if is_flat(rewards_G):
        return centred
    deviation = rewards_G[judged] - rewards_G[judged].mean()
    centred[judged] = deviation / (deviation.std() if std is None else std)
    return centred


def batch_std(rewards: Sequence[np.ndarray]) -> float:
    """Population standard deviation of all judged members about their own group's mean; 1 if it is 0."""
    deviations = [r[~np.isnan(r)] - np.nanmean(r) for r in rewards if not np.isnan(r).all()]
    pooled = np.concatenate([np.zeros(0), *deviations])
    spread = float(np.sqrt(np.mean(pooled**2))) if len(pooled) else 0.0
    return spread if spread > FLAT else 1.0


def is_flat(rewards_G: np.ndarray) -> bool:
    """Whether the judged members' rewards are all equal (or there are none): nothing to learn from."""
    judged = rewards_G[~np.isnan(rewards_G)]
    return len(judged) < 2 or float(np.ptp(judged)) < FLAT * max(1.0, float(np.abs(judged).max()))


# ---------------------------------------------------------------- several rewards at once


@dataclass(frozen=True, kw_only=True)
class _Several:
    """Advantages from named parts of the breakdown, e.g. two judges, or a judge's anchors."""

    parts: tuple[str, ...] = ("overall", "dim")
    """Keys of ``RewardedGroup.breakdown_G``; a member that lacks any of them is masked."""
    weights: tuple[float, ...] = ()
    """One for each part; empty: equal weights that add up to 1."""
    clip: float = 5.0
    per_group: ClassVar[bool] = True

    @property
    def reads(self) -> tuple[str, ...]:
        """The parts without which it has nothing to learn from; a run says so where no sibling has one."""
        return self.parts

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.parts or len(set(self.parts)) != len(self.parts):
            yield "parts", f"is {self.parts}; it needs at least one part, each once"
        if self.weights and len(self.weights) != len(self.parts):
            yield "weights", f"has {len(self.weights)} numbers, one is needed for each of {self.parts}"
        if not self.clip > 0:
            yield "clip", f"is {self.clip}; it needs to be above 0"

    def __call__(self, rewarded: Sequence[RewardedGroup]) -> tuple[list[np.ndarray], dict[str, float]]:
        """float64 [G] per group, and ``advantage/…`` figures."""
        values = [self._values(group) for group in rewarded]
        mixed = self._advantages(values)
        clipped = [np.clip(a, -self.clip, self.clip) for a in mixed]
        return clipped, advantage_metrics(rewarded, mixed, self.clip)

    def _values(self, group: RewardedGroup) -> np.ndarray:
        """[K, G]: the parts of one group; NaN throughout for a member that lacks any part."""
        absent = np.full(len(group.rewards_G), np.nan)
        values = np.stack([np.asarray(group.breakdown_G.get(p, absent), np.float64) for p in self.parts])
        return np.where(np.isnan(values).any(0), np.nan, values)

    def _weights(self) -> np.ndarray:
        return np.array(self.weights or (1 / len(self.parts),) * len(self.parts))

    def _advantages(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class WeightedSum(_Several):
    """Â of the weighted sum of the rewards: the part with the largest spread decides."""

    def _advantages(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [standardise(self._weights() @ v) for v in values]


@dataclass(frozen=True, kw_only=True)
class Gdpo(_Several):
    """Each reward standardised per group, weighted, summed, then standardised over the batch (GDPO).

    Different mixes of rewards keep different advantages, where a sum taken first would merge them.
    """

    per_group: ClassVar[bool] = False

    def _advantages(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        return gdpo(values, self._weights())


@dataclass(frozen=True, kw_only=True)
class LogTamed(_Several):
    """The weighted sum, with rewards that vary too much over the batch tamed by a logarithm (PaCo-RL, 2512.04784)."""

    threshold: float = 0.5
    """Coefficient of variation (std/|mean| over the batch) above which a reward R becomes log(1 + R)."""
    per_group: ClassVar[bool] = False

    def _advantages(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [standardise(self._weights() @ v) for v in log_tamed(values, self.threshold)]

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if not self.threshold >= 0:
            yield "threshold", f"is {self.threshold}; a coefficient of variation is 0 or more"


@dataclass(frozen=True, kw_only=True)
class Pareto(_Several):
    """The weighted sum's Â for siblings that no sibling dominates, 0 for the dominated (Parrot, 2401.05675).

    Dominated siblings count in the group's mean and standard deviation and carry no gradient.
    """

    def _advantages(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [np.where(dominated(v), 0.0, standardise(self._weights() @ v)) for v in values]


def gdpo(values: Sequence[np.ndarray], weights_K: np.ndarray) -> list[np.ndarray]:
    """Σ_k w_k·Â_k per group, standardised over all judged members of all groups.

    Args:
        values: [K, G] rewards of each group.
    """
    sums = [weights_K @ np.stack([standardise(part) for part in v]) for v in values]
    pooled = np.concatenate([np.zeros(0), *[s[~np.isnan(s)] for s in sums]])
    if is_flat(pooled):
        return [np.where(np.isnan(s), np.nan, 0.0) for s in sums]
    return [(s - pooled.mean()) / pooled.std() for s in sums]


def log_tamed(values: Sequence[np.ndarray], threshold: float) -> list[np.ndarray]:
    """The groups' rewards [K, G], with log(1 + R) for each reward whose variation over the batch is too large.

    Rewards below 0 keep their sign: -log(1 - R).
    """
    if not values:
        return []
    batch = np.concatenate(list(values), axis=1)
    batch = batch[:, ~np.isnan(batch).any(0)]
    if not batch.size:
        return list(values)
    wild = batch.std(1) > threshold * np.abs(batch.mean(1))
    return [np.where(wild[:, None], np.sign(v) * np.log1p(np.abs(v)), v) for v in values]


def dominated(values_KG: np.ndarray) -> np.ndarray:
    """bool [G]: whether some sibling is at least as good in every reward and better in one.

    >>> dominated(np.array([[1.0, 2.0, 0.0], [1.0, 0.0, 1.0]]))
    array([False, False,  True])
    """
    one, two = values_KG[:, :, None], values_KG[:, None, :]
    beaten_by = np.all(two >= one, axis=0) & np.any(two > one, axis=0)
    return np.asarray(np.any(beaten_by, axis=1))


# ---------------------------------------------------------------- pairs


@dataclass(frozen=True, kw_only=True)
class BestAndWorst:
    """One pair a prompt, as UnifiedReward builds it (arXiv 2503.05236, pair ranking and point sifting).

    Ranked pairs make winners and losers; a score then keeps the best of the winners (Â = 1) and the worst of the losers
    (Â = -1). All others are masked (NaN), and so is the whole prompt when the chosen one does not score higher.
    """

    rank: str = "overall"
    """The part of the breakdown with the win rate: winners are above ½, losers below."""
    score: str = "dim"
    """The part that sifts them, e.g. a pointwise reward's. A group that lacks a part uses its ``rewards_G``."""
    per_group: ClassVar[bool] = True

    @property
    def reads(self) -> tuple[str, ...]:
        """A score that no sibling has sifts nothing; a run says so."""
        return self.rank, self.score

    def __call__(self, rewarded: Sequence[RewardedGroup]) -> tuple[list[np.ndarray], dict[str, float]]:
        """float64 [G] per group, and ``advantage/…`` figures."""
        parts = [[g.breakdown_G.get(name, g.rewards_G) for name in (self.rank, self.score)] for g in rewarded]
        pairs = [best_and_worst(rank, score) for rank, score in parts]
        dropped = [float(np.isnan(pair).all()) for pair in pairs]
        figures = advantage_metrics(rewarded, pairs, clip=1.0)
        return pairs, figures | ({"advantage/dropped_share": float(np.mean(dropped))} if dropped else {})


def best_and_worst(win_rates_G: np.ndarray, scores_G: np.ndarray) -> np.ndarray:
    """+1 for the best-scored winner, -1 for the worst-scored loser, NaN for the rest; all NaN if there is no such pair.

    >>> best_and_worst(np.array([1.0, 0.0, 1.0, 0.0]), np.array([3.0, 2.0, 4.0, 1.0]))
    array([nan, nan,  1., -1.])
    """
    pair, scored = np.full(len(win_rates_G), np.nan), ~np.isnan(scores_G)
    ahead = win_rates_G - 0.5  # what is average but for rounding is neither
    winners, losers = np.flatnonzero(scored & (ahead > FLAT)), np.flatnonzero(scored & (ahead < -FLAT))
    if len(winners) and len(losers):
        best, worst = winners[np.argmax(scores_G[winners])], losers[np.argmin(scores_G[losers])]
        if scores_G[best] > scores_G[worst]:
            pair[best], pair[worst] = 1.0, -1.0
    return pair


# ---------------------------------------------------------------- figures


def advantage_metrics(
    rewarded: Sequence[RewardedGroup], advantages: Sequence[np.ndarray], clip: float
) -> dict[str, float]:
    """``advantage/…`` figures, from the advantages before clipping.

    ``zero_std_share`` is the share of groups without any advantage but 0: they teach nothing, and a high share means that the
    judge no longer tells the siblings apart. ``zero_std_dim_share`` is the share whose mean over the anchors is flat.
    """
    if not rewarded:
        return {}
    flat = np.concatenate(list(advantages))
    judged = flat[~np.isnan(flat)]
    dims = [g.breakdown_G["dim"] for g in rewarded if "dim" in g.breakdown_G]
    found = {
        "advantage/zero_std_share": float(np.mean([(np.abs(np.nan_to_num(a)) < FLAT).all() for a in advantages])),
        "advantage/masked_share": float(np.isnan(flat).mean()),
    }
    if dims:
        found["advantage/zero_std_dim_share"] = float(np.mean([is_flat(d) for d in dims]))
    if len(judged):
        found |= {
            "advantage/abs_mean": float(np.abs(judged).mean()),
            "advantage/abs_max": float(np.abs(judged).max()),
            "advantage/clipped_share": float((np.abs(judged) > clip).mean()),
        }
    return found
