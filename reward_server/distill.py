"""Stage 1 of training a judge (arXiv 2602.02380): a teacher writes a structured trace for each preference instance.

A trace is kept if the Flex parser reads all of it without complaint and its winner is the known one. It stands in a
file of JSON lines:

    {"id", "prompt", "media": [[frames of the candidate shown first], [of the second]], "reply", "label": 0 | 1 | null, …}

``media`` and ``label`` are in the order in which the candidates were shown, so ``label`` 0 means that the one shown
first is better. Other instances go to a second file with what was wrong with each try.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from reward_server.ask import Answer
from reward_server.asking import Asker, Endpoint, ProgressLine, Unanswered, check, for_each, shown_urls
from reward_server.begun import begun_with, wordings
from reward_server.families.base import TIE, json_object
from reward_server.families.flex import ANCHORS, Flex
from reward_server.ledger import Ledger
from reward_server.preferences import Label, Preference, shown_order

NO_LABEL_REACHED = "the winner is not the label's"


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Settings of a distillation."""

    out: Path
    """Traces; those that are there already are not asked for again."""
    rejected: Path
    """Instances without a trace, with the reasons; remove the file to ask about them again."""
    endpoint: Endpoint = field(default_factory=lambda: Endpoint(temperature=0.7, max_tokens=4096))
    family: Flex = field(default_factory=Flex)
    tries: int = 3
    """Replies asked for, each with a seed of its own, until one is a trace."""
    seed: int = 0
    """Of the order in which candidates are shown, and of the teacher."""

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise ValueError(f"tries is {self.tries}; it needs to be at least 1")
        if self.out.absolute() == self.rejected.absolute():
            raise ValueError(f"traces and rejected instances would both go to {str(self.out)!r}")


@dataclass(kw_only=True)
class Tally:
    """What a distillation has come to, earlier runs with the same files included."""

    traces: int = 0
    first_wins: int = 0
    """Traces in which the candidate shown first wins: about half of them, or the teacher goes by position."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Reason of the last try -> instances."""
    unanswered: Counter[str] = field(default_factory=Counter)
    """Reason -> instances of this run that the same command asks about again."""
    ties: int = 0
    """Instances that people saw as equal: there is no winner that a trace could reach."""
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def count(self, record: dict[str, Any]) -> None:
        """Adds a record of either file."""
        self.spend(record)
        if "reply" in record:
            self.traces += 1
            self.first_wins += record["winner"] == 0
        else:
            self.rejected[record["problems"][-1]] += 1

    def spend(self, record: Mapping[str, Any]) -> None:
        """Adds the tokens of answers, also of those that came to nothing."""
        self.prompt_tokens += record["prompt_tokens"]
        self.completion_tokens += record["completion_tokens"]

    def line(self) -> str:
        """For the progress line."""
        lost = f", {self.unanswered.total():,} unanswered" if self.unanswered else ""
        return (
            f"{self.traces:,} traces, {self.rejected.total():,} set aside{lost}; "
            f"tokens {self.prompt_tokens:,} in, {self.completion_tokens:,} out"
        )


async def distil(preferences: Sequence[Preference], settings: Distillation) -> Tally:
    """Asks the teacher about all instances that have no record yet.

    Raises:
        ValueError: missing files, an endpoint that is away or refuses everything; what is done is kept.
    """
    check(preferences, [settings.family])
    decided = [p for p in preferences if not p.tie]
    async with Asker(settings.endpoint) as teacher:
        with ExitStack() as files:
            traces, rejected = (files.enter_context(Ledger(path)) for path in (settings.out, settings.rejected))
            asked = {"seed": settings.seed, "teacher": teacher.model, "temperature": settings.endpoint.temperature}
            about = settings.out.with_suffix(".settings.json")
            if not traces.done and not rejected.done:
                about.unlink(missing_ok=True)  # a try that came to nothing binds nobody
            media = {preference.medium for preference in decided}
            said = wordings(*(replace(settings.family, medium=medium) for medium in sorted(media)))
            begun_with(about, asked | said, f"give another --out, or move {settings.out} and what lies beside it away")
            _check_same({p.id: p for p in decided}, (*traces, *rejected), settings.out)
            work = _Work(settings, teacher, traces, rejected)
            work.tally.ties = len(preferences) - len(decided)
            for record in (*traces, *rejected):
                work.tally.count(record)
            due = [p for p in decided if p.id not in traces.done and p.id not in rejected.done]
            progress = ProgressLine(len(due), work.tally.line)

            async def one(preference: Preference) -> None:
                await work.do(preference)
                progress.step()

            await for_each(due, one, settings.endpoint.concurrency)
    return work.tally


def _check_same(asked: Mapping[str, Preference], records: Iterable[Mapping[str, Any]], out: Path) -> None:
    """Raises ValueError where a record is of another instance with the same id, such as the same row of another file."""
    for record in records:
        preference = asked.get(record["id"])
        if preference and record.get("instance") not in (None, _instance(preference)):
            raise ValueError(
                f"{out} has a record of another instance with the id {record['id']!r}: give the preferences ids of their own "
                "(a row without one has its number), or another --out"
            )


def _instance(preference: Preference) -> str:
    """What tells an instance from another with the same id, wherever its files lie."""
    names = [[Path(frame).name for frame in candidate] for candidate in preference.candidates]
    said = json.dumps([preference.prompt, names, preference.label, preference.medium])
    return hashlib.sha256(said.encode()).hexdigest()[:12]


class _Work:
    """One distillation under way."""

    def __init__(self, settings: Distillation, teacher: Asker, traces: Ledger, rejected: Ledger) -> None:
        self.settings, self.teacher, self.tally = settings, teacher, Tally()
        self._traces, self._rejected = traces, rejected

    async def do(self, preference: Preference) -> None:
        """Asks until there is a trace; writes one record, or none where the teacher gave no answer."""
        answers: list[Answer] = []
        try:
            record = await self._record(preference, answers)
        except Unanswered as error:
            # Before the first answer a refusal says more about the endpoint than about the instance.
            if not error.refused or not self.teacher.answered:
                self.tally.unanswered[str(error)] += 1
                self.tally.spend(_spent(answers))
                return
            record = {"id": preference.id, "problems": [str(error)], **_spent(answers)}
        record["instance"] = _instance(preference)
        (self._traces if "reply" in record else self._rejected).add(record)
        self.tally.count(record)

    async def _record(self, preference: Preference, answers: list[Answer]) -> dict[str, Any]:
        """The trace, or what was wrong with each try; what the teacher said is added to ``answers``."""
        settings = self.settings
        family = replace(settings.family, medium=preference.medium)
        order = shown_order(preference, settings.seed)
        sources, candidates = await shown_urls(family, preference)
        shown = [*sources, *(candidates[k] for k in order)]
        label = _shown_label(preference, order)
        problems: list[str] = []
        while len(answers) < settings.tries:
            seed = _seed(settings.seed, preference.id, len(answers))
            answers.append(await self.teacher.ask(family, preference.prompt, shown, seed))
            problem = fault(answers[-1], label)
            if not problem:
                return self._trace(preference, order, label, answers)
            problems.append(problem)
        spent = _spent(answers)
        return {"id": preference.id, "problems": problems, "replies": [a.text for a in answers], **spent}

    def _trace(
        self, preference: Preference, order: tuple[int, int], label: Label, answers: Sequence[Answer]
    ) -> dict[str, Any]:
        return {
            "id": preference.id,
            "prompt": preference.prompt,
            "media": [[str(Path(frame).absolute()) for frame in preference.candidates[k]] for k in order],
            "reply": compact(answers[-1].text),
            "label": label,
            "winner": int(answers[-1].reply.winner or 0),
            "order": list(order),
            "medium": preference.medium,
            "category": preference.category,
            "teacher": self.teacher.model,
            "tries": len(answers),
            **_spent(answers),
        }


def _shown_label(preference: Preference, order: tuple[int, int]) -> Label:
    """Which of the candidates as shown is better."""
    if preference.label is None:
        return None
    return 0 if order[0] == preference.label else 1


def fault(answer: Answer, label: Label) -> str:
    """Why a reply is no trace, or "". ``label``: which of the candidates as shown is better, where that is known."""
    reply = answer.reply
    if reply.status != "ok" or reply.problem:
        return reply.problem
    if reply.winner == TIE:
        return "a tie is no winner"
    if set(ANCHORS) - set(reply.scores):
        return "a category without dimensions"
    return "" if label is None or reply.winner == label else NO_LABEL_REACHED


def compact(text: str) -> str:
    """The reply's object without fences, prose, thoughts or white space between its tokens."""
    return json.dumps(json_object(text)[0], ensure_ascii=False, separators=(",", ":"))


def _spent(answers: Sequence[Answer]) -> dict[str, int]:
    return {
        "prompt_tokens": sum(a.prompt_tokens for a in answers),
        "completion_tokens": sum(a.tokens for a in answers),
    }


def _seed(seed: int, name: str, attempt: int) -> int:
    digest = hashlib.blake2b(f"{seed} {name} {attempt}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1  # servers take 31 bits


def report(tally: Tally) -> str:
    """What came of it, for the terminal."""
    lines = [tally.line()]
    if tally.traces:
        lines.append(f"the candidate shown first wins in {tally.first_wins / tally.traces:.1%} of the traces")
    if tally.ties:
        lines.append(f"{tally.ties:,} ties were not asked about")
    lines += [f"{count:,} set aside: {reason}" for reason, count in tally.rejected.most_common(8)]
    lines += [f"{count:,} unanswered, start again to ask: {why}" for why, count in tally.unanswered.most_common(5)]
    return "\n".join(lines)
