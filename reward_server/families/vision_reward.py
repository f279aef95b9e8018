"""VisionReward (arXiv 2412.21059): a yes/no checklist, weighted into one number.

Questions and weights are a JSON file: ``[{"id", "axis", "question", "weight", "needs"?}, …]``. ``needs`` names
an earlier question: where that is answered "no", this one counts as "no" whatever the reply says (the
checklist is hierarchical). The reward is the weights' sum over the questions answered "yes".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from reward_server.families.base import PROMPTS, ChatFamily, Reply, number, plain_lines, unparsed

_LINE = re.compile(r"(?:q(?:uestion)? ?)?(\d{1,3}) ?[.):-] ?(yes|no)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One line of the checklist."""

    id: str
    axis: str
    question: str
    weight: float
    needs: str = ""


def parse(text: str, questions: int) -> tuple[tuple[bool, ...] | None, str]:
    """Answers of a reply with lines such as "3: yes", or None and the reason why not.

    Numbers beyond the list are ignored; a missing one or one that is answered both ways is a failure.
    """
    given: dict[int, bool] = {}
    for line in plain_lines(text):
        match = _LINE.fullmatch(line)
        if match is None:
            continue
        index, answer = int(match[1]), match[2] == "yes"
        if given.get(index, answer) != answer:
            return None, "two answers"
        given[index] = answer
    if not given:
        return None, "no answer" if text.strip() else "empty reply"
    if any(k not in given for k in range(1, questions + 1)):
        return None, "answers missing"
    return tuple(given[k] for k in range(1, questions + 1)), ""


def weigh(questions: Sequence[Question], answers: Sequence[bool]) -> dict[str, float]:
    """The reward ("checklist") and its part from each axis.

    >>> q = [Question(id="a", axis="x", question="?", weight=1.0),
    ...      Question(id="b", axis="x", question="?", weight=0.5, needs="a")]
    >>> weigh(q, [False, True]), weigh(q, [True, True])
    ({'checklist': 0.0, 'x': 0.0}, {'checklist': 1.5, 'x': 1.5})
    """
    totals = {"checklist": 0.0, **{q.axis: 0.0 for q in questions}}
    for q, holds in zip(questions, held(questions, answers), strict=True):
        totals["checklist"] += q.weight * holds
        totals[q.axis] += q.weight * holds
    return totals


def held(questions: Sequence[Question], answers: Sequence[bool]) -> tuple[bool, ...]:
    """What counts as "yes": the answer, unless a question that it needs does not."""
    found: dict[str, bool] = {}
    for q, answer in zip(questions, answers, strict=True):
        found[q.id] = answer and found.get(q.needs, True)
    return tuple(found[q.id] for q in questions)


@cache
def read_checklist(path: Path) -> tuple[Question, ...]:
    """The questions of a file as this process first read them, like a wording. Raises ValueError naming what is wrong."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        questions = tuple(_question(r) for r in records)
    except OSError as error:
        raise ValueError(f"is {str(path)!r}, which cannot be read: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"is {str(path)!r}, which is no checklist: {type(error).__name__}: {error}") from error
    known: set[str] = set()
    for q in questions:
        if q.id in known or (q.needs and q.needs not in known):
            raise ValueError(f"is {str(path)!r}, where {q.id!r} is repeated or needs a question that is not before it")
        known.add(q.id)
    if not questions:
        raise ValueError(f"is {str(path)!r}, which holds no question")
    return questions


def _question(record: Mapping[str, Any]) -> Question:
    weight = number(record["weight"])
    if weight is None:
        raise ValueError(f"the weight of {record['id']!r} is no number")
    text = {name: str(record.get(name, "")) for name in ("id", "axis", "question", "needs")}
    if not (text["id"] and text["axis"] and text["question"]) or text["axis"] == "checklist":
        raise ValueError(f"{record!r} lacks its id, axis or question")
    return Question(weight=weight, **text)


@dataclass(frozen=True, kw_only=True)
class VisionReward(ChatFamily):
    """Scores one candidate by a weighted checklist, all questions in one request."""

    name: ClassVar[str] = "vision_reward"
    open_ended = True
    candidates = 1
    decisive = ("checklist",)

    checklist_file: str = ""
    """A JSON file with other questions and weights, e.g. the published regression's; empty: our own."""

    def checklist(self) -> tuple[Question, ...]:
        own = PROMPTS / f"{self.name}_{self.medium}.json"
        return read_checklist(Path(self.checklist_file) if self.checklist_file else own)

    def wording(self) -> str:
        text = super().wording()
        if "{questions}" not in text:
            raise ValueError(
                f"is {self.prompt_file!r}, without a {{questions}} mark: the judge would not see the checklist"
            )
        listed = "\n".join(f"{k}. {q.question}" for k, q in enumerate(self.checklist(), start=1))
        return text.replace("{questions}", listed)

    def parse(self, text: str) -> Reply:
        questions = self.checklist()
        answers, problem = parse(text, len(questions))
        if answers is None:
            return unparsed(problem)
        return Reply(status="ok", scores={n: (v,) for n, v in weigh(questions, answers).items()})

    def problems(self) -> Iterator[tuple[str, str]]:
        try:
            self.checklist()
        except ValueError as error:
            yield "checklist_file", str(error)
        else:
            yield from super().problems()
