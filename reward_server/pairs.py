"""Pairs for stage 2 of a judge's training: two sampled traces for each instance, and which of them is preferred.

UnifiedReward-Flex's rule (arXiv 2602.02380): the trace that reaches the label is preferred to the one that does not;
where both do, a judge of reasoning quality decides; where neither does, the instance is discarded. A reply that cannot
be parsed, and a tie, do not reach the label. What came of every instance stands in one file, so that asking goes on
where it was stopped and the counts can be checked.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reward_server.asking import Asker, ProgressLine, Unanswered, check, for_each, shown_urls
from reward_server.begun import begun_with, fingerprint, wordings
from reward_server.families.base import FIRST, SECOND
from reward_server.families.reasoning import Reasoning
from reward_server.judge_training import JudgeTraining
from reward_server.ledger import Ledger
from reward_server.preferences import Preference, read, shown_order

FILE, COUNTS, SETTINGS = "pairs.jsonl", "pairs.json", "pairs.settings.json"
ONE_RIGHT, BY_REASONING = "one right", "both right, decided by reasoning"
SAME, UNDECIDED, NOT_ASKED = "both right, the same text", "both right, undecided", "both right, no reasoning judge"
NONE_RIGHT = "none right"


async def build(config: JudgeTraining) -> dict[str, int]:
    """Asks about every labelled instance that has no outcome yet; returns how many have which, and writes it down.

    Instances without an answer have no outcome: the same command asks about them again. Those that lacked a judge of
    reasoning are decided by their old replies once there is one.

    Raises:
        ValueError: preferences that cannot be read, or an endpoint that is away or refuses everything.
    """
    if not config.pairs.preferences:
        raise ValueError("pairs.preferences is not set: give a file of labelled preferences, pairs.preferences=FILE")
    found = read(config.pairs.preferences).preferences
    labelled = [p for p in found if p.label is not None]
    check(labelled, [])
    begun_with(
        config.folder / SETTINGS, _settings(config), f"give the run another name, or move {FILE} and {SETTINGS} away"
    )
    with Ledger(config.folder / FILE) as file:
        known = {record["id"]: record for record in file}
        again = NOT_ASKED if config.pairs.reasoning.url else ""
        due = [p for p in labelled if p.id not in known or known[p.id]["outcome"] == again]
        unanswered = await _ask_all(config, due, known, file) if due else Counter()
    counts = tally(known[p.id] for p in labelled if p.id in known)
    counts |= {"without a label": len(found) - len(labelled), "unanswered": unanswered.total()}
    (config.folder / COUNTS).write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    return counts | {f"unanswered: {reason}": count for reason, count in unanswered.most_common(5)}


def _settings(config: JudgeTraining) -> dict[str, Any]:
    """What all pairs of one file have in common. The judge is stage 1's, where there is one, whatever serves it."""
    judge = config.folder / "sft" / "model"
    return wordings(config.image, config.video) | {
        "seed": config.seed,
        "temperature": config.pairs.endpoint.temperature,
        "judge": fingerprint(judge) if judge.is_dir() else config.pairs.endpoint.model,
    }


def tally(records: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Instances by outcome, and how many of the replies could be read and were right."""
    listed = list(records)
    outcomes = Counter(record["outcome"] for record in listed)
    winners = [(winner, record["label"]) for record in listed for winner in record["winners"]]
    return {
        "instances": len(listed),
        "pairs": sum("chosen" in record for record in listed),
        **{kind: outcomes[kind] for kind in (ONE_RIGHT, BY_REASONING, SAME, UNDECIDED, NOT_ASKED, NONE_RIGHT)},
        "replies": len(winners),
        "replies parsed": sum(winner is not None for winner, _ in winners),
        "replies right": sum(winner == label for winner, label in winners),
    }


async def _ask_all(
    config: JudgeTraining, due: Sequence[Preference], known: dict[str, Any], file: Ledger
) -> Counter[str]:
    """Adds a record of each instance to ``known`` and to the file; returns the reasons of those without an answer."""
    unanswered: Counter[str] = Counter()
    async with AsyncExitStack() as open_ones:
        judge = await open_ones.enter_async_context(Asker(config.pairs.endpoint))
        reasoning = config.pairs.reasoning.url and await open_ones.enter_async_context(Asker(config.pairs.reasoning))
        work = _Work(config=config, judge=judge, reasoning=reasoning or None)
        progress = ProgressLine(len(due), lambda: f"{unanswered.total()} unanswered")

        async def one(preference: Preference) -> None:
            try:
                record = await work.record(preference, known.get(preference.id))
            except Unanswered as error:
                unanswered[str(error)] += 1
            else:
                known[record["id"]] = record
                file.add(record)
            progress.step()

        await for_each(due, one, config.pairs.endpoint.concurrency)
    return unanswered


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What one instance is asked with."""

    config: JudgeTraining
    judge: Asker
    reasoning: Asker | None

    async def record(self, preference: Preference, before: Mapping[str, Any] | None) -> dict[str, Any]:
        """What came of one instance. Raises Unanswered.

        Args:
            before: An earlier record, whose replies are used again.
        """
        family = self.config.family(preference.medium)
        order = shown_order(preference, self.config.seed)
        _, given = await shown_urls(family, preference)
        media, label = [given[k] for k in order], order.index(preference.label or 0)
        if before is None:
            seeds = [self._chance(f"sample {k}", preference).getrandbits(31) for k in range(2)]
            answers = [await self.judge.ask(family, preference.prompt, media, seed) for seed in seeds]
            before = {"replies": [a.text for a in answers], "winners": [a.reply.winner for a in answers]}
        replies, right = before["replies"], [winner == label for winner in before["winners"]]
        outcome, chosen = await self._choose(preference, media, replies, right)
        made = {
            "id": preference.id,
            "prompt": preference.prompt,
            "media": [[str(Path(path).absolute()) for path in preference.candidates[k]] for k in order],
            "label": label,
            "replies": replies,
            "winners": before["winners"],
            "outcome": outcome,
        }
        return made | ({} if chosen is None else {"chosen": replies[chosen], "rejected": replies[1 - chosen]})

    async def _choose(
        self, preference: Preference, media: Sequence[Sequence[str]], replies: Sequence[str], right: Sequence[bool]
    ) -> tuple[str, int | None]:
        """The outcome, and which reply is preferred, if any."""
        if not any(right):
            return NONE_RIGHT, None
        if not all(right):
            return ONE_RIGHT, right.index(True)
        if replies[0] == replies[1]:
            return SAME, None
        if self.reasoning is None:
            return NOT_ASKED, None
        swapped = self._chance("reasoning", preference).random() < 0.5
        answers = (replies[1], replies[0]) if swapped else (replies[0], replies[1])
        family = Reasoning(medium=preference.medium, answers=answers)
        winner = (await self.reasoning.ask(family, preference.prompt, media)).reply.winner
        if winner not in (FIRST, SECOND):
            return UNDECIDED, None
        return BY_REASONING, int((winner == FIRST) == swapped)

    def _chance(self, purpose: str, preference: Preference) -> random.Random:
        return random.Random(f"{purpose} {self.config.seed} {preference.id}")
