"""Whole runs in one process: all is real but Ray and the judge.

The process samples, learns and saves in its own time; a function says how many of a group's questions are answered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_flex import cluster, judge_watch, judging, placement, report, train
from grpo_flex.config import RunConfig
from grpo_flex.fleet import Job
from grpo_flex.learner import Learner
from grpo_flex.rollout import RolloutWorker
from grpo_flex.scorers import score_group
from grpo_flex.types import Adapter, GroupMedia, Prompt, Sample, UpdateBatch, UpdateResult, Verdict

AWAY = "cannot connect"


@dataclass
class StandInJudge:
    """Prefers the brighter of two pictures, as long as it answers."""

    answers: Callable[[GroupMedia], int]
    """How many of a group's questions."""
    healthy: bool = True
    """What its health probe finds."""
    asked: int = 0
    problem: str = AWAY
    said: str = ""

    def verdicts(self, group: GroupMedia) -> list[Verdict]:
        self.asked += 1
        light = [media.mean() for media in group.media_G]
        pairs = [(i, j) for i in range(len(light)) for j in range(i)]
        ok = self.answers(group)
        said = [Verdict(members=(i, j), status="ok", winner=float(light[j] > light[i])) for i, j in pairs[:ok]]
        return said + [
            Verdict(members=pair, status="failed", problem=self.problem, rationale=self.said) for pair in pairs[ok:]
        ]


class OneProcess:
    """The calls of ``Cluster``, done where they are made."""

    together = 1

    def __init__(self, config: RunConfig, judge: StandInJudge) -> None:
        self.config, self.learner, self.worker, self._judge = config, Learner(config), RolloutWorker(config), judge
        self.updates: list[UpdateBatch] = []
        self.begun = 0
        self.publish, self.publish_evaluation = self.learner.adapter, self.learner.evaluation_adapter
        self.learner_state, self.load_learner_state = self.learner.state, self.learner.load_state

    def __enter__(self) -> OneProcess:
        return self

    def __exit__(self, *_: object) -> None: ...
    def ask(self, *_: object) -> None: ...
    def wait_until_ready(self) -> None: ...
    def tend(self) -> None: ...
    def close_judge(self) -> None: ...

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        self.worker.model.prepare(prompts)

    def generate(self, step: int, prompts: Sequence[Prompt], adapter: Adapter, follow: Callable[..., None]) -> Job:
        job = Job(method="generate", arguments=(), follow=follow, count=2 * len(prompts), done=True)
        job.results = [
            part for group in self.worker.generate_together(step, prompts, adapter) for part in group.parted()
        ]
        follow(*job.results)
        return job

    def wait(self, jobs: Sequence[Job], look: Callable[[], None]) -> None:
        look()

    def judge(self, group: GroupMedia, seed: int, previous: Sequence[Verdict] = ()) -> list[Verdict]:
        assert type(group) is GroupMedia  # nothing that a judge has no use for travels to it
        return self._judge.verdicts(group)

    def judge_is_healthy(self) -> bool:
        return self._judge.healthy

    def judge_report(self) -> dict[str, float]:
        return {}

    def judge_states(self) -> list[Any]:
        return []

    def score(self, group: GroupMedia) -> list[list[Verdict]]:
        return [score_group(scorer, group.media_G, group.prompt) for scorer in self.config.scorers]

    def record(self, step: int, prompt: Prompt, given: Sequence[Verdict]) -> None: ...

    def evaluate(
        self, prompts: Sequence[Prompt], adapter: Adapter, look: Callable[[], None] = lambda: None
    ) -> Iterator[Sample]:
        look()
        yield from self.worker.evaluate(prompts, adapter)

    def begin(self, batch: UpdateBatch, of: int, step: int) -> None:
        self.begun = len(batch.groups)
        self.learner.begin(batch.groups, batch.advantages, of, step)

    def update(self, batch: UpdateBatch, step: int) -> UpdateResult:
        assert not any(group.media_G for group in batch.groups)
        self.updates.append(batch)
        return self.learner.update(batch.groups, batch.advantages, step)

    def save_adapter(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.learner.save_adapter(folder)

    def worker_states(self) -> dict[str, str]:
        return {"learner": "alive"}

    def seating(self) -> list[tuple[str, str, str]]:
        return []


def in_one_process(monkeypatch: pytest.MonkeyPatch, judge: StandInJudge) -> list[OneProcess]:
    """Runs take place in this process from here on, with this judge; the list of those that were started."""
    same = SimpleNamespace(put=lambda it: it, get=lambda it: it, wait=lambda refs, **_: (refs, []))
    monkeypatch.setattr(train, "ray", same)
    monkeypatch.setattr(judge_watch, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(judging, "check_endpoints", lambda *_: [])
    monkeypatch.setattr(report, "write_report", lambda _: None)  # many drawings
    made: list[OneProcess] = []

    def start(config: RunConfig, *_: object) -> OneProcess:
        made.append(OneProcess(config, judge))
        return made[-1]

    monkeypatch.setattr(cluster, "Cluster", start)
    monkeypatch.setattr(placement, "Reservation", lambda *_: nullcontext())
    return made
