"""Steps whose judge says too little: what is left out of the update, and how a run that gives its judge up goes on.

All is real but Ray and the judge: one process samples, learns and saves in its own time, and a function says how many of
a group's questions are answered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from grpo_flex import checkpoint, cluster, judging, report, run, train
from grpo_flex.__main__ import main
from grpo_flex.config import RunConfig
from grpo_flex.fleet import Job
from grpo_flex.learner import Learner
from grpo_flex.metrics import read_metrics
from grpo_flex.rollout import RolloutWorker
from grpo_flex.types import Adapter, Prompt, RolloutGroup, Sample, UpdateBatch, UpdateResult, Verdict
from tests.configs import judge_of

AWAY = "cannot connect"
LACKING = f"3 of 3 groups lack verdicts (mostly: {AWAY})"
ADAPTER = "adapter/pytorch_lora_weights.safetensors"


@dataclass
class StandInJudge:
    """Prefers the brighter of two pictures, as long as it answers."""

    answers: Callable[[RolloutGroup], int]
    """How many of a group's questions."""
    healthy: bool = True
    """What its health probe finds."""
    asked: int = 0

    def verdicts(self, group: RolloutGroup) -> list[Verdict]:
        self.asked += 1
        light = [media.mean() for media in group.media_G]
        pairs = [(i, j) for i in range(len(light)) for j in range(i)]
        ok = self.answers(group)
        said = [Verdict(members=(i, j), status="ok", winner=float(light[j] > light[i])) for i, j in pairs[:ok]]
        return said + [Verdict(members=pair, status="failed", problem=AWAY) for pair in pairs[ok:]]


class OneProcess:
    """The calls of ``Cluster``, done where they are made."""

    together = 1

    def __init__(self, config: RunConfig, judge: StandInJudge) -> None:
        self.learner, self.worker, self._judge = Learner(config), RolloutWorker(config), judge
        self.updates: list[UpdateBatch] = []
        self.begun = 0
        self.publish, self.publish_evaluation = self.learner.adapter, self.learner.evaluation_adapter
        self.learner_state, self.load_learner_state = self.learner.state, self.learner.load_state

    def __enter__(self) -> OneProcess:
        return self

    def __exit__(self, *_: object) -> None: ...
    def wait_until_ready(self) -> None: ...
    def tend(self) -> None: ...
    def close_judge(self) -> None: ...

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        self.worker.model.prepare(prompts)

    def generate(self, step: int, prompts: Sequence[Prompt], adapter: Adapter, follow: Callable[..., None]) -> Job:
        job = Job(method="generate", arguments=(), follow=follow, count=len(prompts), done=True)
        job.results = self.worker.generate_together(step, prompts, adapter)
        follow(*job.results)
        return job

    def wait(self, jobs: Sequence[Job], look: Callable[[], None]) -> None:
        look()

    def judge(self, group: RolloutGroup, seed: int, previous: Sequence[Verdict] = ()) -> list[Verdict]:
        return self._judge.verdicts(group)

    def judge_is_healthy(self) -> bool:
        return self._judge.healthy

    def judge_report(self) -> dict[str, float]:
        return {}

    def judge_states(self) -> list[Any]:
        return []

    def score(self, group: RolloutGroup) -> list[Any]:
        return []

    def evaluate(self, prompts: Sequence[Prompt], adapter: Adapter) -> Iterator[Sample]:
        yield from self.worker.evaluate(prompts, adapter)

    def begin(self, batch: UpdateBatch, of: int, step: int) -> None:
        self.begun = len(batch.groups)
        self.learner.begin(batch.groups, batch.advantages, of, step)

    def update(self, batch: UpdateBatch, step: int) -> UpdateResult:
        self.updates.append(batch)
        return self.learner.update(batch.groups, batch.advantages, step)

    def save_adapter(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.learner.save_adapter(folder)

    def worker_states(self) -> dict[str, str]:
        return {"learner": "alive"}

    def seating(self) -> list[tuple[str, str, str]]:
        return []


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Callable[[StandInJudge], list[OneProcess]]:
    """Runs take place in this process from here on, with this judge; returns the list of those that were started."""
    same = SimpleNamespace(put=lambda it: it, get=lambda it: it, wait=lambda refs, **_: (refs, []))
    monkeypatch.setattr(train, "ray", same)
    monkeypatch.setattr(train, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(judging, "check_endpoints", lambda *_: [])
    monkeypatch.setattr(report, "write_report", lambda _: None)  # many drawings

    def with_judge(judge: StandInJudge) -> list[OneProcess]:
        made: list[OneProcess] = []

        def start(config: RunConfig, *_: object) -> OneProcess:
            made.append(OneProcess(config, judge))
            return made[-1]

        monkeypatch.setattr(cluster, "Cluster", start)
        return made

    return with_judge


def own(config: RunConfig, folder: Path, **judge: Any) -> RunConfig:
    """Two steps of three groups, saved at the end only."""
    given = replace(judge_of(config), server=None, endpoints=("http://judge/v1",), **judge)
    return replace(
        config,
        steps=2,
        runs_dir=str(folder),
        judge=given,
        prompts=replace(config.prompts, per_step=3),
        evaluation=replace(config.evaluation, versus_base=0),
        checkpoint=replace(config.checkpoint, every=100),
    )


def test_a_group_with_too_few_verdicts_has_no_part_in_the_update(
    config: RunConfig, tmp_path: Path, started: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of the second group's six pairs are judged, which gives rewards, but less than half."""
    config = replace(own(config, tmp_path), steps=1)
    judge = StandInJudge(lambda _: 2 if judge.asked == 2 else 6)
    runs = started(judge)
    assert run.train(config) == 0
    (process,) = runs
    (batch,) = process.updates
    assert [bool(np.isnan(a).all()) for a in batch.advantages] == [False, True, False]
    assert judge.asked == 3  # the step can do without it, so nobody is asked again
    assert process.begun == 1  # the head start ends before the group
    alone = Learner(config)
    result = alone.update([batch.groups[i] for i in (0, 2)], [batch.advantages[i] for i in (0, 2)], 0)
    assert all(map(torch.equal, process.learner.parameters, alone.parameters))
    assert not all(map(torch.equal, alone.parameters, Learner(config).parameters))
    row = read_metrics(tmp_path / config.name)[1]
    assert row["judge/dropped_groups"] == 1 and row["judge/masked_share"] == pytest.approx(4 / 18)
    assert row["policy/loss"] == result.metrics["policy/loss"]
    assert "step 1: 1 of 3 groups got too few verdicts and are left out of the update" in capsys.readouterr().out


def test_a_run_that_gives_its_judge_up_is_saved_and_resumes_as_if_nothing_had_been(
    config: RunConfig, tmp_path: Path, started: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = own(config, tmp_path, give_up_s=0.1)
    started(judge := StandInJudge(lambda group: 0 if group.step == 1 else 6, healthy=False))
    assert run.train(config) == run.RESUME_ME
    run_dir, out = tmp_path / config.name, capsys.readouterr().out
    assert f"step 2: {LACKING}; waiting for the judge" in out
    assert f"stopped: {LACKING} for longer than judge.give_up_s=0.1; bring the judge back, then resume" in out
    assert f"python -m grpo_flex train --resume {run_dir}" in out
    assert judge.asked == 6  # while its health probe fails it is not asked again
    assert checkpoint.load(run_dir)[0] == 1 and (run_dir / ADAPTER).is_file()
    judge.answers = lambda _: 6
    assert main(["train", "--resume", str(run_dir)]) == 0
    assert run.train(replace(config, name="whole")) == 0
    ended, whole = (read_metrics(folder)[-1] for folder in (run_dir, tmp_path / "whole"))
    same = [key for key in whole if not key.startswith("perf/")]
    assert [ended[key] for key in same] == [whole[key] for key in same]
    one, two = (load_file(folder / ADAPTER) for folder in (run_dir, tmp_path / "whole"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_judge_that_answers_its_health_probe_and_no_question_is_given_up_too(
    config: RunConfig, tmp_path: Path, started: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    started(judge := StandInJudge(lambda _: 0))
    assert run.train(replace(own(config, tmp_path, give_up_s=0.1), steps=1)) == run.RESUME_ME
    assert f"stopped: {LACKING} for longer than judge.give_up_s=0.1" in capsys.readouterr().out
    assert judge.asked > 3 and checkpoint.load(tmp_path / config.name)[0] == 0
