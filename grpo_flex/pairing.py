"""Which ordered pairs of a group the judge is asked to compare.

A plan's pairs are ordered: ``(i, j)`` shows sibling i first. Judges favour a position, so every plan either
asks both orders or orders its pairs so that each sibling stands first as often as second. Pairs are sorted by
the sibling shown first, because a server's prefix cache keeps what consecutive requests begin with.

A plan may ask in rounds: ``pairs`` gives the first questions, ``more`` the next, given the answers so far.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np

Pair = tuple[int, int]
Answer = tuple[int, int, float]
"""An answered pair: first, second, winner's position (0.0, 0.5 or 1.0)."""
Orders = Literal["both", "balanced"]


class PairPlan(Protocol):
    """Ordered pairs of a group of G siblings. Variants are frozen dataclasses, pure in (G, seed, answers)."""

    def pairs(self, group_size: int, seed: int) -> list[Pair]:
        """The first questions. Each unordered pair occurs once, or twice in opposite orders."""
        ...

    def more(self, group_size: int, seed: int, answers: Sequence[Answer]) -> list[Pair]:
        """The next questions, given what was answered; empty when there are none."""
        ...


@dataclass(frozen=True, kw_only=True)
class _Plan:
    orders: Orders = "balanced"
    """both: every pair is asked twice. balanced: once, each sibling standing first as often as second (±1)."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.orders not in ("both", "balanced"):
            yield "orders", f"is {self.orders!r}; it needs to be both or balanced"

    def more(self, group_size: int, seed: int, answers: Sequence[Answer]) -> list[Pair]:
        del group_size, seed, answers
        return []


@dataclass(frozen=True, kw_only=True)
class RoundRobin(_Plan):
    """Every sibling meets every other: G(G-1)/2 questions, twice that with ``orders="both"``.

    >>> len(RoundRobin().pairs(9, 0)), len(RoundRobin(orders="both").pairs(9, 0))
    (36, 72)
    """

    def pairs(self, group_size: int, seed: int) -> list[Pair]:
        return ordered(spread_edges(group_size), group_size, seed, self.orders)


@dataclass(frozen=True, kw_only=True)
class Budgeted(_Plan):
    """A number of questions: connected, and every sibling meets as many others as any (±1).

    At least G-1 pairs are asked whatever the share, because fewer cannot connect the group. With a share
    above 1 every pair is asked, and some, spread alike, in the other order too.

    >>> [len(Budgeted(share=s).pairs(9, 0)) for s in (0.25, 1.0, 1.25, 2.0)]
    [9, 36, 45, 72]
    """

    share: float = 0.5
    """Questions per unordered pair of the group; with ``orders="both"`` the share of pairs asked twice."""

    def pairs(self, group_size: int, seed: int) -> list[Pair]:
        edges = spread_edges(group_size)
        count = max(group_size - 1, round(self.share * len(edges)))
        if count <= len(edges):
            return ordered(edges[:count], group_size, seed, self.orders)
        twice = count - len(edges)
        return ordered(edges[twice:], group_size, seed, self.orders, twice=edges[:twice])

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        most = 1 if self.orders == "both" else 2
        if not 0 < self.share <= most:
            yield "share", f"is {self.share}; with orders={self.orders!r} it is above 0 and at most {most}"


@dataclass(frozen=True)
class Calibrated:
    """As few questions as keep the advantages, for the size of the group: ``Budgeted`` with a share of ``SHARES``, and a few more.

    At least one pair of a group is asked in both orders, because that is how a judge that favours a position shows. In a group
    of an odd size everybody stands first exactly as often as second, so that a judge who sees nothing but positions gives equal
    rewards. An even size of 6 or more leaves some siblings, or all, one question ahead or behind, because they meet an odd number
    of others once. Such a judge's rewards then differ, and advantages have their full size however small the difference.

    >>> [len(Calibrated().pairs(size, 0)) for size in (4, 6, 8, 9, 16)]
    [12, 20, 31, 39, 97]
    """

    def pairs(self, group_size: int, seed: int) -> list[Pair]:
        share = next(share for size, share in reversed(SHARES.items()) if size <= max(group_size, min(SHARES)))
        even = group_size % 2 == 0
        if share == 2 or (even and share > 1):
            return Budgeted(share=share).pairs(group_size, seed)
        edges = spread_edges(group_size)
        count = max(group_size - 1, round(share * len(edges)))
        asked = edges[:count]
        twice = _least_asked(asked) if even else _odd_part(asked, group_size, count - len(asked))
        return ordered([e for e in asked if e not in twice], group_size, seed, "balanced", twice=twice)

    def more(self, group_size: int, seed: int, answers: Sequence[Answer]) -> list[Pair]:
        del group_size, seed, answers
        return []


def _least_asked(edges: Sequence[Pair]) -> list[Pair]:
    """One edge, between siblings with few others."""
    degree = Counter(i for edge in edges for i in edge)
    return [min(edges, key=lambda edge: degree[edge[0]] + degree[edge[1]])]


def _odd_part(edges: Sequence[Pair], group_size: int, least: int) -> list[Pair]:
    """Edges without which every degree is even, of an odd group's ``spread_edges``: at least one, and ``least``.

    Those beyond the last whole cycle through all siblings; where there are none, triangles that share a corner.
    """
    rest = edges[len(edges) - len(edges) % group_size :]
    triangles = [{0, k, k + 1} for k in range(1, 2 * max(1, math.ceil(least / 3)), 2)]
    return list(rest) or [edge for edge in edges if any(t.issuperset(edge) for t in triangles)]


SHARES = {2: 2.0, 6: 1.3, 7: 1.25, 8: 1.1, 9: 1.0, 12: 0.9, 16: 0.8, 20: 0.75, 24: 0.7}
"""From this group size on -> the smallest share of ``Budgeted`` whose advantages correlate by 0.95 or more with those of all
pairs in both orders, with win rates as with Bradley-Terry, in each of three seeds of benchmarks/judge_budget.py."""


@dataclass(frozen=True, kw_only=True)
class Pivots(_Plan):
    """Every sibling meets ``count`` randomly chosen siblings, the pivots, which also meet each other."""

    count: int = 2

    def pairs(self, group_size: int, seed: int) -> list[Pair]:
        # Labels are shuffled by `ordered`, so the first labels are a random choice of siblings.
        edges = [(i, j) for i in range(min(self.count, group_size)) for j in range(i + 1, group_size)]
        return ordered(edges, group_size, seed, self.orders)

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if self.count < 1:
            yield "count", f"is {self.count}; it needs at least 1 pivot to compare the siblings with"


@dataclass(frozen=True, kw_only=True)
class Swiss(_Plan):
    """Rounds: the first at random, then neighbours in the standing that have not met yet.

    Every sibling plays once a round (with an odd G one sits out), so ``rounds`` x floor(G/2) questions. Rounds are counted by
    the pairs that were answered: further ones make up for questions without an answer, as long as there are new pairs.
    """

    rounds: int = 4

    def pairs(self, group_size: int, seed: int) -> list[Pair]:
        return ordered(spread_edges(group_size)[: group_size // 2], group_size, seed, self.orders)

    def more(self, group_size: int, seed: int, answers: Sequence[Answer]) -> list[Pair]:
        asked = len({frozenset((i, j)) for i, j, _ in answers})
        round_index = asked // max(1, group_size // 2)
        if not answers or round_index >= self.rounds:
            return []
        edges = _swiss_round(group_size, answers)
        return _orient_by_history(edges, answers) if self.orders == "balanced" else _both(edges)

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if self.rounds < 3:
            yield "rounds", f"is {self.rounds}; it needs at least 3: two leave many a group in two parts that never met"


# ---------------------------------------------------------------- designs


def spread_edges(group_size: int) -> list[Pair]:
    """All G(G-1)/2 unordered pairs, so ordered that *every prefix* has degrees that differ by at most 1.

    Every prefix of at least G-1 pairs is connected. For an odd G the pairs come as Walecki's decomposition of
    the complete graph into Hamiltonian cycles; for an even G as the circle method's perfect matchings, of
    which two successive ones make a Hamiltonian cycle.
    """
    return _walecki(group_size) if group_size % 2 else _circle(group_size)


def _circle(group_size: int) -> list[Pair]:
    last = group_size - 1
    rounds = []
    for r in range(last):
        rounds += [(last, r)]
        rounds += [((r + k) % last, (r - k) % last) for k in range(1, group_size // 2)]
    return rounds


def _walecki(group_size: int) -> list[Pair]:
    n = group_size - 1
    edges: list[Pair] = []
    for j in range(n // 2):
        zigzag = [(j + (k + 1) // 2 * (1 if k % 2 else -1)) % n for k in range(n)]
        cycle = [n, *zigzag]
        ring = list(zip(cycle, cycle[1:] + cycle[:1], strict=True))
        # A matching first, then the edge at the vertex it left out, then the rest: any prefix is balanced.
        edges += ring[:n:2] + ring[n:] + ring[1:n:2]
    return edges


def ordered(
    edges: Sequence[Pair], group_size: int, seed: int, orders: Orders, twice: Sequence[Pair] = ()
) -> list[Pair]:
    """Unordered edges as questions: ordered, then siblings dealt to the labels at random, then sorted.

    Args:
        twice: Further edges, asked in both orders in any case.
    """
    label = [int(v) for v in _rng(seed).permutation(group_size)]
    directed = _both(edges) if orders == "both" else balance_orders(edges, group_size)
    return sorted((label[i], label[j]) for i, j in [*directed, *_both(twice)])


def _rng(seed: int) -> np.random.Generator:
    import numpy as np

    return np.random.default_rng([seed % 2**63, 0x9A125])


def _both(edges: Sequence[Pair]) -> list[Pair]:
    return sorted([*edges, *((j, i) for i, j in edges)])


def balance_orders(edges: Sequence[Pair], group_size: int) -> list[Pair]:
    """Orders each edge so that every vertex stands first as often as second, ±1 where its degree is odd.

    Vertices of odd degree are joined to one extra vertex; walking every edge of each (now Eulerian) component
    in closed tours enters every vertex as often as it leaves it.
    """
    extra = group_size
    neighbours: list[set[int]] = [set() for _ in range(group_size + 1)]
    for i, j in edges:
        neighbours[i].add(j)
        neighbours[j].add(i)
    for v in range(group_size):
        if len(neighbours[v]) % 2:
            neighbours[v].add(extra)
            neighbours[extra].add(v)
    walked = [step for start in range(group_size + 1) for step in _tours(neighbours, start)]
    return [(i, j) for i, j in walked if extra not in (i, j)]


def _tours(neighbours: list[set[int]], start: int) -> Iterator[Pair]:
    """Walks from ``start`` along unused edges, taking them out; all degrees even, so it ends at ``start``."""
    here = start
    while neighbours[here]:
        there = min(neighbours[here])
        neighbours[here].remove(there)
        neighbours[there].remove(here)
        yield here, there
        here = there


# ---------------------------------------------------------------- Swiss rounds


def _swiss_round(group_size: int, answers: Sequence[Answer]) -> list[Pair]:
    """Pairs neighbours in the standing that have not met, from the top; with an odd G one rests."""
    points, met, played = [0.0] * group_size, set(), [0] * group_size
    for i, j, winner in answers:
        points[i] += 1 - winner
        points[j] += winner
        met |= {(i, j), (j, i)}
        played[i] += 1
        played[j] += 1
    share = [p / n if n else math.inf for p, n in zip(points, played, strict=True)]
    # Who rested plays first, so that nobody rests twice before everybody has.
    waiting = sorted(range(group_size), key=lambda v: (played[v], -share[v], v))
    waiting = sorted(waiting[: group_size - group_size % 2], key=lambda v: (-share[v], v))
    return _match(waiting, met, [SEARCHED]) or _greedy_match(waiting, met)


SEARCHED = 5_000
"""Partial matchings that are tried before a round makes do with fewer pairs."""


def _match(waiting: Sequence[int], met: Set[Pair], left: list[int]) -> list[Pair] | None:
    """The first perfect matching without a pair that has met, nearest neighbours first; None if not found."""
    if not waiting:
        return []
    first, rest = waiting[0], waiting[1:]
    for k, rival in enumerate(rest):
        left[0] -= 1
        if (first, rival) in met or left[0] < 0:
            continue
        others = _match([*rest[:k], *rest[k + 1 :]], met, left)
        if others is not None:
            return [(first, rival), *others]
    return None


def _greedy_match(waiting: Sequence[int], met: Set[Pair]) -> list[Pair]:
    waiting, edges = list(waiting), []
    while waiting:
        first = waiting.pop(0)
        rival = next((v for v in waiting if (first, v) not in met), None)
        if rival is not None:
            waiting.remove(rival)
            edges.append((first, rival))
    return edges


def _orient_by_history(edges: Sequence[Pair], answers: Sequence[Answer]) -> list[Pair]:
    """Whoever has stood first less often stands first."""
    lead: dict[int, int] = {}
    for i, j, _ in answers:
        lead[i], lead[j] = lead.get(i, 0) + 1, lead.get(j, 0) - 1
    return sorted((i, j) if lead.get(i, 0) <= lead.get(j, 0) else (j, i) for i, j in edges)
