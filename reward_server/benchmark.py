"""How well a judge agrees with people's preferences, and what a verdict costs; any endpoint, any family.

Every reply is kept in ``replies.jsonl``, and all figures are computed from that file: a benchmark that was stopped goes
on, and a changed parser needs no new replies. A family that scores one candidate is asked about either, and the higher
score wins.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_server.asking import Asker, Endpoint, ProgressLine, Unanswered, check, for_each, shown_urls
from reward_server.families.base import FIRST, SECOND, TIE, ChatFamily, Completion, Reply
from reward_server.ledger import Ledger
from reward_server.preferences import Preference, shown_order

if TYPE_CHECKING:
    from rich.table import Table

REPLIES, FIGURES = "replies.jsonl", "benchmark.json"
DEFINITIONS = {
    "accuracy": "share of the pairs that people decided whose winner the judge names, the order of the two drawn at "
    "random; a tie, or a reply that cannot be read, is wrong; with it Wilson's 95 % interval",
    "accuracy_tie_half": "the same, but a tie that the judge declares counts one half",
    "accuracy_with_ties": "over all pairs with people's opinion: those that people called equal count, too, and are right "
    "where the judge declares a tie",
    "consistent": "share of the pairs asked about in both orders where both replies name the same candidate, or a tie",
    "first": "share of the replies that name a candidate in which it is the one shown first",
    "parsed": "share of the replies that say who wins (or score the candidate)",
    "tokens": "mean completion tokens of a verdict; of a family that scores, both candidates' replies together",
    "prompt_tokens": "the same of the prompt",
    "seconds": "mean time that a verdict took to come, with as many questions in flight as concurrency says",
    "anchors": "share of the pairs that people decided in which the anchor's winner is theirs, where it names one",
    "unanswered": "pairs left out because the server gave no answer",
}
_TIED = 1e-9
Shown = tuple[int, ...]
"""Candidates as given, in the order in which a question shows them."""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Which questions to ask, and where the replies are kept."""

    families: Mapping[str, ChatFamily]
    """By the name under which the figures are reported."""
    replies: Path
    endpoint: Endpoint = field(default_factory=Endpoint)
    seed: int = 0
    """Of the order in which two candidates are shown."""
    both_orders: bool = True
    resume: bool = False
    """Go on with the replies that are there. Nobody can tell whether they come from the same judge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One instance as a family judged it."""

    preference: Preference
    winner: float | None
    """As the data gives the candidates: 0.0, 1.0, a tie 0.5, or None where the reply does not say."""
    swapped: float | None = None
    """The same from the other order."""
    both: bool = False
    """Whether the other order was asked about."""
    anchors: Mapping[str, float]
    records: tuple[Mapping[str, Any], ...]
    replies: tuple[Reply, ...]


# ---------------------------------------------------------------- asking


async def collect(preferences: Sequence[Preference], asked: Questions) -> tuple[list[dict[str, Any]], Counter[str]]:
    """All replies, those of an earlier run included, and why questions had none.

    Raises:
        ValueError: missing files, replies of an earlier run without ``resume``, an endpoint that is away.
    """
    check(preferences, list(asked.families.values()))
    unanswered: Counter[str] = Counter()
    with ExitStack() as files:
        ledger = files.enter_context(Ledger(asked.replies, _key))
        if ledger.done and not asked.resume:
            raise ValueError(
                f"{str(asked.replies)!r} holds {len(ledger.done)} replies of an earlier run: --resume goes on with them, "
                "if the judge is the same; else name another place"
            )
        items = [(name, p) for p in preferences for name in asked.families]
        progress = ProgressLine(len(items), lambda: f"{len(ledger.done):,} replies, {unanswered.total()} unanswered")
        async with Asker(asked.endpoint) as judge:

            async def one(item: tuple[str, Preference]) -> None:
                try:
                    await _ask(judge, ledger, asked, *item)
                except Unanswered as error:
                    unanswered[str(error)] += 1
                progress.step()

            await for_each(items, one, asked.endpoint.concurrency)
        return list(ledger), unanswered


def _key(record: Mapping[str, Any]) -> str:
    return json.dumps([record["family"], record["id"], record["shown"]])


async def _ask(judge: Asker, ledger: Ledger, asked: Questions, name: str, preference: Preference) -> None:
    """Asks what is missing of one instance and adds the replies."""
    family = replace(asked.families[name], medium=preference.medium)
    about = {"family": name, "id": preference.id}
    due = [
        shown
        for shown in orders(family, preference, asked.seed, asked.both_orders)
        if _key({**about, "shown": list(shown)}) not in ledger.done
    ]
    if not due:
        return
    sources, candidates = await shown_urls(family, preference)
    for shown in due:
        answer = await judge.ask(family, preference.prompt, [*sources, *(candidates[k] for k in shown)])
        ledger.add(
            {
                **about,
                "shown": list(shown),
                "text": answer.text,
                "finish_reason": answer.finish_reason,
                "first_token": answer.first_token,
                "prompt_tokens": answer.prompt_tokens,
                "tokens": answer.tokens,
                "seconds": round(answer.seconds, 4),
                "model": judge.model,
            }
        )


def orders(family: ChatFamily, preference: Preference, seed: int, both: bool = True) -> list[Shown]:
    """The questions about one instance: either candidate alone, or both in random order (and then swapped)."""
    if family.candidates == 1:
        return [(0,), (1,)]
    order = shown_order(preference, seed)
    return [order, order[::-1]] if both else [order]


# ---------------------------------------------------------------- reading


def cases(
    preferences: Sequence[Preference], records: Iterable[Mapping[str, Any]], asked: Questions, name: str
) -> list[Case]:
    """The instances that a family judged; those without an answer are left out."""
    found = {(r["id"], tuple(r["shown"])): r for r in records if r["family"] == name}
    made = []
    for preference in preferences:
        family = replace(asked.families[name], medium=preference.medium)
        shown = orders(family, preference, asked.seed, asked.both_orders)
        there = [order for order in shown if (preference.id, order) in found]
        if shown[0] not in there or (family.candidates == 1 and len(there) < 2):
            continue
        own = tuple(found[preference.id, order] for order in there)
        replies = tuple(family.read(completion(record)) for record in own)
        made.append(
            _scored(family, preference, own, replies)
            if family.candidates == 1
            else _compared(preference, there, own, replies)
        )
    return made


def completion(record: Mapping[str, Any]) -> Completion:
    """A kept reply as families read it."""
    first = tuple((str(token), float(logprob)) for token, logprob in record["first_token"])
    return Completion(text=record["text"], finish_reason=record["finish_reason"], first_token=first)


def _compared(
    preference: Preference, shown: Sequence[Shown], records: tuple[Mapping[str, Any], ...], replies: tuple[Reply, ...]
) -> Case:
    winners = [_as_given(reply.winner, order) for reply, order in zip(replies, shown, strict=True)]
    anchors = {name: _as_given(won, shown[0]) for name, won in replies[0].dimensions.items()}
    return Case(
        preference=preference,
        winner=winners[0],
        swapped=winners[1] if len(winners) > 1 else None,
        both=len(winners) > 1,
        anchors={name: won for name, won in anchors.items() if won is not None},
        records=records,
        replies=replies,
    )


def _as_given(winner: float | None, shown: Shown) -> float | None:
    return winner if winner is None or shown == (0, 1) else 1 - winner


def _scored(
    family: ChatFamily, preference: Preference, records: tuple[Mapping[str, Any], ...], replies: tuple[Reply, ...]
) -> Case:
    names = family.decisive or tuple(replies[0].scores)
    anchors = {name: _higher(replies, (name,)) for name in replies[0].scores}
    return Case(
        preference=preference,
        winner=_higher(replies, names),
        anchors={name: won for name, won in anchors.items() if won is not None},
        records=records,
        replies=replies,
    )


def _higher(replies: Sequence[Reply], names: Sequence[str]) -> float | None:
    """The winner by the mean of the named scores, or None where one is missing."""
    if not names or any(name not in reply.scores for reply in replies for name in names):
        return None
    one, two = (sum(reply.scores[name][0] for name in names) / len(names) for reply in replies)
    return TIE if abs(one - two) < _TIED else FIRST if one > two else SECOND


# ---------------------------------------------------------------- figures


def figures(judged: Sequence[Case], candidates: int) -> dict[str, Any]:
    """What ``DEFINITIONS`` says, of some cases of one family that shows so many candidates; None where undefined."""
    decided = [c for c in judged if c.preference.label is not None]
    opinions = [c for c in judged if c.preference.tie or c.preference.label is not None]
    replies = [reply for c in judged for reply in c.replies]
    sides = [reply.winner for reply in replies if candidates == 2 and reply.winner in (FIRST, SECOND)]
    right = [c.winner == c.preference.label for c in decided]
    verdicts = len(replies) * candidates / 2
    low, high = wilson(sum(right), len(right))
    return {
        "pairs": len(judged),
        "decided": len(decided),
        "ties": len(opinions) - len(decided),
        "accuracy": _mean(right),
        "accuracy_low": low,
        "accuracy_high": high,
        "accuracy_tie_half": _mean(0.5 if c.winner == TIE else c.winner == c.preference.label for c in decided),
        "accuracy_with_ties": _mean(c.winner == (TIE if c.preference.tie else c.preference.label) for c in opinions),
        "consistent": _mean(c.winner is not None and c.winner == c.swapped for c in judged if c.both),
        "first": _mean(winner == FIRST for winner in sides),
        "parsed": _mean(_says(reply, candidates) for reply in replies),
        **{name: _each(judged, name, verdicts) for name in ("tokens", "prompt_tokens", "seconds")},
        "anchors": _anchors(decided),
    }


def _says(reply: Reply, candidates: int) -> bool:
    return reply.status == "ok" and (candidates == 1 or reply.winner is not None)


def _each(judged: Sequence[Case], name: str, verdicts: float) -> float | None:
    return sum(record[name] for c in judged for record in c.records) / verdicts if verdicts else None


def _anchors(decided: Sequence[Case]) -> dict[str, float | None]:
    names = sorted({name for c in decided for name in c.anchors})
    return {
        name: _mean(c.anchors[name] == c.preference.label for c in decided if c.anchors.get(name, TIE) != TIE)
        for name in names
    }


def _mean(values: Iterable[float]) -> float | None:
    listed = list(values)
    return sum(listed) / len(listed) if listed else None


def wilson(right: int, asked: int) -> tuple[float | None, float | None]:
    """Wilson's 95 % interval of a share (Wilson 1927).

    >>> [round(bound, 3) for bound in wilson(8, 10)]
    [0.49, 0.943]
    """
    if not asked:
        return None, None
    z, share = 1.959964, right / asked
    middle = share + z * z / (2 * asked)
    half = z * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    scale = 1 + z * z / asked
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


async def benchmark(preferences: Sequence[Preference], asked: Questions) -> dict[str, Any]:
    """Asks and measures: per family the figures of all pairs ("all") and of each category, and ``DEFINITIONS``."""
    records, unanswered = await collect(preferences, asked)
    measured = {}
    for name, family in asked.families.items():
        judged = cases(preferences, records, asked, name)
        categories = sorted({c.preference.category for c in judged} - {""})
        of = {kind: [c for c in judged if c.preference.category == kind] for kind in categories}
        measured[name] = {
            "all": figures(judged, family.candidates) | {"unanswered": len(preferences) - len(judged)},
            "categories": {kind: figures(some, family.candidates) for kind, some in of.items()},
        }
    end = asked.endpoint
    settings = {"temperature": end.temperature, "max_tokens": end.max_tokens, "concurrency": end.concurrency}
    return {
        "models": sorted({str(record["model"]) for record in records}),
        "endpoint": end.url,
        "settings": settings | {"seed": asked.seed, "both_orders": asked.both_orders},
        "families": measured,
        "unanswered": dict(unanswered),
        "definitions": DEFINITIONS,
    }


# ---------------------------------------------------------------- showing


def table(measured: Mapping[str, Any]) -> Table:
    """A line for each family and category."""
    from rich.table import Table

    made = Table(title=f"{', '.join(measured['models'])} at {measured['endpoint']}", title_justify="left")
    for name in ("family", "category"):
        made.add_column(name)
    heads = ("pairs", "accuracy", "95 %", "tie = ½", "with ties", "consistent", "first", "parsed", "tokens", "s")
    for name in heads:
        made.add_column(name, justify="right")
    for family, found in measured["families"].items():
        for category, line in _lines(found):
            made.add_row(family, category, *line)
    return made


def _lines(found: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    for category, some in (("all", found["all"]), *found["categories"].items()):
        interval = "" if some["accuracy"] is None else f"{some['accuracy_low']:.3f} … {some['accuracy_high']:.3f}"
        shares = [
            "" if some[name] is None else f"{some[name]:.3f}"
            for name in ("accuracy_tie_half", "accuracy_with_ties", "consistent", "first", "parsed")
        ]
        accuracy = "" if some["accuracy"] is None else f"{some['accuracy']:.3f}"
        costs = [
            "" if some[name] is None else f"{some[name]:.{digits}f}" for name, digits in (("tokens", 0), ("seconds", 2))
        ]
        yield category, [str(some["pairs"]), accuracy, interval, *shares, *costs]
