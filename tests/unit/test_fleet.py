"""Workers and learners that die, hang, leave and join, with actors that load nothing; a real local Ray cluster."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
from ray._private.state import actors
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from grpo_flex import cluster as placing
from grpo_flex import fleet as fleets
from grpo_flex.actors import ScorerActor
from grpo_flex.fleet import Fleet, Stranded
from grpo_flex.learner_group import Hung, LearnerGroup, StateLost
from grpo_flex.types import Prompt, UpdateBatch, UpdateResult, Verdict
from grpo_flex.verdicts import read_verdicts


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


class _Doubler:
    """A worker whose result depends on its argument alone. The first to meet an argument of ``fates`` suffers it."""

    def __init__(self, name: str, fates: dict[int, str], folder: str) -> None:
        self.name, self.fates, self.folder = name, fates, Path(folder)

    def ready(self) -> None:
        if (self.folder / f"away-{self.name}").exists():
            time.sleep(600)
        if (self.folder / f"no-mount-{self.name}").exists():
            raise ValueError("there is no model here")

    def pid(self) -> int:
        return os.getpid()

    @ray.method(num_returns=2)
    def double(self, n: int) -> tuple[float, tuple[int, str]]:
        fate, met = self.fates.get(n), self.folder / f"met-{n}"
        if fate and (fate == "fails" or not met.exists()):
            met.touch()
            if "fails" in fate:
                raise RuntimeError("CUDA error: uncorrectable ECC error")
            os.kill(os.getpid(), {"dies": signal.SIGKILL, "hangs": signal.SIGSTOP}[fate])
        if n < 0:
            raise ValueError("a negative number")
        return 0.0, (2 * n, self.name)

    @ray.method(num_returns=3)
    def both(self, n: int) -> tuple[float, int, int]:
        return 0.0, n, -n


@ray.remote(num_cpus=0)
def lost_with_its_node() -> Any:
    """What Ray gives for a result of which no copy is left; a real one in ``tests/integration/test_cluster.py``."""
    raise ObjectLostError("ab" * 28, None, "")


def fleet_of(names: list[str], fates: dict[int, str], folder: Path, **options: Any) -> tuple[Fleet, list[str]]:
    said: list[str] = []
    actor: Any = ray.remote(_Doubler)
    settings: dict[str, Any] = {"timeout_s": 5.0, "restarts": 1, "say": said.append} | options
    fleet = Fleet(lambda name, lost: actor.options(num_cpus=0).remote(name, fates, str(folder)), names, **settings)
    fleet.wait_until_ready()
    return fleet, said


def test_what_a_lost_worker_had_is_done_by_others(tmp_path: Path) -> None:
    fleet, said = fleet_of(["a", "b"], {3: "dies", 4: "hangs"}, tmp_path)
    followed: dict[int, list[Any]] = {n: [] for n in range(8)}
    jobs = [fleet.submit("double", n, follow=followed[n].append) for n in range(8)]
    fleet.wait(jobs)
    assert [ray.get(job.result)[0] for job in jobs] == [2 * n for n in range(8)]
    # Whoever depends on a result was told the reference that holds in the end.
    assert all(followed[n][-1] is jobs[n].result for n in range(8)) and len(followed[3]) > 1 and len(followed[4]) > 1
    assert len(said) == 2 and any("died" in s for s in said) and any("taken for hung" in s for s in said)
    assert sum(w.restarts for w in fleet.workers.values()) == 2


def test_a_worker_that_is_killed_for_memory_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's memory monitor ends a process with an error of its own."""
    fleet, said = fleet_of(["a"], {}, tmp_path)
    get, killed = ray.get, list[Any]()

    def killed_once(refs: Any, **options: Any) -> Any:
        if not killed and refs is job.receipt:
            killed.append(refs)
            raise OutOfMemoryError("Task was killed due to the node running low on memory")
        return get(refs, **options)

    job = fleet.submit("double", 1)
    monkeypatch.setattr(ray, "get", killed_once)
    fleet.wait([job])
    assert killed and get(job.result)[0] == 2
    assert said == ["a was killed by Ray, because its node ran out of memory; starting it again"]


def test_work_that_fails_by_itself_is_not_repeated(tmp_path: Path) -> None:
    fleet, said = fleet_of(["a"], {}, tmp_path)
    with pytest.raises(RayTaskError, match="a negative number"):
        fleet.wait([fleet.submit("double", -1)])
    assert said == []


def test_work_that_a_machine_may_have_failed_at_is_tried_on_another(tmp_path: Path) -> None:
    fleet, said = fleet_of(["a", "b"], {1: "fails once", 2: "fails"}, tmp_path)
    job = fleet.submit("double", 1)
    fleet.wait([job])
    assert ray.get(job.result)[0] == 2 and job.failed
    assert said == ["a failed (RuntimeError: CUDA error: uncorrectable ECC error); starting it again"]
    with pytest.raises(RayTaskError, match="uncorrectable"):
        fleet.wait([fleet.submit("double", 2)])


def test_what_lost_workers_had_waits_for_the_first_that_is_back(tmp_path: Path) -> None:
    fleet, said = fleet_of(["a", "b"], {0: "dies", 1: "dies"}, tmp_path)
    (tmp_path / "away-b").touch()  # its node stays away
    jobs = [fleet.submit("double", n) for n in range(6)]
    fleet.wait(jobs)
    assert [ray.get(job.result) for job in jobs] == [(2 * n, "a") for n in range(6)] and len(said) == 2
    assert fleet.workers["b"].loading is not None


def test_a_worker_that_cannot_load_is_done_without_where_others_could(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, said = fleet_of(["a"], {}, tmp_path)
    (tmp_path / "no-mount-b").touch()
    fleet._add("b")
    fleet.wait_until_ready()
    assert list(fleet.workers) == ["a"] and "going on without it" in said[-1] and "there is no model here" in said[-1]
    (tmp_path / "away-c").touch()
    fleet._add("c")
    monkeypatch.setattr(fleets, "START_S", 0.0)
    fleet.tend()
    assert said[-1] == "c has not loaded its model for 0 s; starting it again"


def test_workers_that_all_cannot_load_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "no-mount-a").touch()
    with pytest.raises(RayTaskError, match="there is no model here"):
        fleet_of(["a"], {}, tmp_path)


def test_only_deaths_without_a_result_in_between_count(tmp_path: Path) -> None:
    fleet, said = fleet_of(["a"], {1: "dies", 3: "dies"}, tmp_path)
    for n in range(4):  # one after the other: what a worker says just before it dies may be lost with it
        fleet.wait([fleet.submit("double", n)])
    assert fleet.workers["a"].restarts == len(said) == 2


def test_a_worker_that_dies_too_often_is_done_without_and_the_last_one_is_missed(tmp_path: Path) -> None:
    fleet, said = fleet_of(["a", "b"], {1: "dies"}, tmp_path, restarts=0)
    job = fleet.submit("double", 1)
    fleet.wait([job])
    assert len(fleet.workers) == 1 and "going on without it" in said[0]
    (last,) = fleet.workers.values()
    ray.kill(last.actor)
    with pytest.raises(RayActorError):  # which takes a moment
        while True:
            ray.get(last.actor.pid.remote())
    with pytest.raises(Stranded, match="every rollout worker has died too often"):
        fleet.wait([fleet.submit("double", 2)])


def test_one_that_joins_gets_work(tmp_path: Path) -> None:
    fleet, said = fleet_of(["a"], {}, tmp_path, joining=lambda there: "b" if there < 2 else None)
    fleet.tend()
    fleet.wait_until_ready()
    jobs = [fleet.submit("double", n) for n in range(4)]
    fleet.wait(jobs)
    assert {ray.get(job.result)[1] for job in jobs} == {"a", "b"} and said == ["b joins"]


def test_results_that_are_lost_are_made_again(tmp_path: Path) -> None:
    fleet, said = fleet_of(["a", "b"], {}, tmp_path)
    told: dict[int, list[Any]] = {n: [] for n in range(3)}
    jobs = [fleet.submit("both", n, follow=lambda *refs, n=n: told[n].append(refs), count=2) for n in range(3)]
    fleet.wait(jobs)
    assert fleet.again(jobs) == []
    jobs[1].results[1] = lost_with_its_node.remote()
    assert fleet.again(jobs) == [jobs[1]] and not jobs[1].done
    fleet.wait(jobs)
    assert [ray.get(job.results[1]) for job in jobs] == [0, -1, -2]
    assert [len(told[n]) for n in range(3)] == [1, 2, 1] and list(told[1][1]) == jobs[1].results and said == []


@ray.remote(num_cpus=0)
def later() -> None:
    time.sleep(600)


@dataclass(frozen=True, kw_only=True)
class _Mortal:
    """A scorer that dies with the first group that it sees, and scores by what it has loaded."""

    folder: str
    name: str = "mortal"

    def load(self) -> None:
        os.environ["LOADED"] = "1"

    def batch(self, media_G: list[np.ndarray], prompt: Prompt) -> list[dict[str, float]]:
        if not (met := Path(self.folder) / "met").exists():
            met.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return [{"mean": float(media.mean()) * float(os.environ["LOADED"])} for media in media_G]

    def __call__(self, media: np.ndarray, prompt: Prompt) -> dict[str, float]:
        raise AssertionError("siblings are scored together")


PROMPT = Prompt(id="p", text="a red circle")


def test_a_scorer_that_dies_is_started_again_and_scores_what_it_was_given(tmp_path: Path) -> None:
    group = SimpleNamespace(prompt=PROMPT, media_G=[np.full((1, 4, 4, 3), n, np.uint8) for n in (10, 30)])
    actor: Any = ray.remote(ScorerActor)
    scorer = actor.options(num_cpus=0, **placing.SCORER).remote(_Mortal(folder=str(tmp_path)), 1, 0.0)
    ray.get(scorer.load.remote())
    late = scorer.score.remote(later.remote())  # a group that is still being sampled holds up no other
    given = ray.get(scorer.score.remote(group), timeout=60)
    assert not ray.wait([late], timeout=0)[0]
    assert [(v.status, v.scores["mean"]) for v in given] == [("ok", (10.0,)), ("ok", (30.0,))]


def test_the_keeper_of_the_verdicts_that_dies_goes_on_with_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl.gz"
    scribe = placing._start_judge(None, (), str(path))
    said = [Verdict(members=(0,), status="ok", scorer="mortal")]
    ray.get(scribe.record.remote(0, PROMPT, said))
    os.kill(actors()[scribe._actor_id.hex()]["Pid"], signal.SIGKILL)
    ray.get(scribe.record.remote(1, PROMPT, said))
    assert [entry.step for entry in read_verdicts(path)] == [1, 2]
    assert actors()[scribe._actor_id.hex()]["NumRestarts"] == 1


class _Adder:
    """A learner whose state is a sum. Rank 1 meets its fate when the sum would become ``at``."""

    def __init__(self, rank: int, fate: str, at: int, folder: str) -> None:
        self.rank, self.fate, self.at, self.met, self.total = rank, fate, at, Path(folder) / "met", 0

    def address(self) -> str:
        return "nowhere:0"

    def join(self, address: str) -> None: ...

    def ready(self) -> None: ...

    def sleep(self) -> None:
        time.sleep(600)

    def begin(self, batch: UpdateBatch, of: int, step: int) -> None:
        if of == 0:
            raise ValueError("out of memory")

    @ray.method(num_returns=2)
    def update(self, batch: UpdateBatch, step: int) -> tuple[UpdateResult, dict[str, int] | None]:
        if self.total + step == self.at and self.rank == 1 and (self.fate == "fails" or not self.met.exists()):
            self.met.touch()
            if self.fate == "fails":
                raise ValueError("out of memory")
            if self.fate == "fails once":
                raise RuntimeError("CUDA error: uncorrectable ECC error")
            os.kill(os.getpid(), {"dies": signal.SIGKILL, "hangs": signal.SIGSTOP}[self.fate])
        self.total += step
        return UpdateResult(policy_version=self.total, metrics={}), {"total": self.total} if self.rank == 0 else None

    def load_state(self, state: dict[str, int]) -> None:
        self.total = state["total"]


def group_of(fate: str, folder: Path, restarts: int = 1, **options: Any) -> tuple[LearnerGroup, list[str]]:
    said: list[str] = []
    actor: Any = ray.remote(_Adder)
    start = lambda rank: actor.options(num_cpus=0).remote(rank, fate, 6, str(folder))  # noqa: E731
    group = LearnerGroup(start, 2, **{"restarts": restarts, "timeout_s": 5.0, "say": said.append} | options)
    group.meet()
    return group, said


NOTHING = UpdateBatch(groups=(), advantages=())


def totals(group: LearnerGroup) -> list[int]:
    found = []
    for step in (1, 2, 3, 4):
        group.begin(NOTHING, 2, step)
        found.append(group.update(NOTHING, step).policy_version)
    return found


@pytest.mark.parametrize("fate", ["dies", "hangs", "fails once"])
def test_learners_go_on_from_the_last_completed_step(tmp_path: Path, fate: str) -> None:
    group, said = group_of(fate, tmp_path)
    assert totals(group) == [1, 3, 6, 10]
    assert group.restarts == len(said) == 1 and group.state() == {"total": 10}
    (tmp_path / "met").unlink()  # the updates since then have given back what was used up of ``restarts``
    for actor in group.actors:
        ray.get(actor.load_state.remote({"total": 1}))
    assert group.update(NOTHING, 5).policy_version == 15 and group.restarts == 2


def test_learners_that_die_once_too_often_leave_their_state(tmp_path: Path) -> None:
    group, _ = group_of("dies", tmp_path, restarts=0)
    with pytest.raises(RayActorError):
        totals(group)
    assert group.state() == {"total": 3}


def test_learners_that_hang_and_left_no_state_are_not_asked_for_it(tmp_path: Path) -> None:
    """They would never answer; the last checkpoint stands."""
    group, said = group_of("hangs", tmp_path, keeps=False, timeout_s=4.0)
    with pytest.raises(Hung):
        totals(group)
    with pytest.raises(Hung):
        group.state()
    assert said == []


def test_a_run_that_is_stopped_does_without_a_long_update(tmp_path: Path) -> None:
    """Who asks it to stop kills it soon, and the state before the update is at hand."""
    asked = [0.0]
    group, _ = group_of("hangs", tmp_path, timeout_s=600.0, stopping=lambda: True, stopped_s=lambda: asked[0])
    for step in (1, 2):
        group.update(NOTHING, step)
    asked[0] = 1000.0
    with pytest.raises(Hung, match="to stop"):
        group.update(NOTHING, 3)
    assert group.state() == {"total": 3}
    with pytest.raises(Hung):  # it would be the next call after the update
        group.adapter_files()


def test_a_run_that_is_stopped_does_without_learners_that_load(tmp_path: Path) -> None:
    asked = [0.0]
    group, said = group_of("dies", tmp_path, stopped_s=lambda: asked[0])
    start, group._start = group._start, lambda rank: start(rank) if asked[0] else _away(start(rank))

    def _away(actor: Any) -> Any:
        asked[0] = 1000.0
        actor.sleep.remote()
        return actor

    with pytest.raises(Hung, match="to stop"):
        totals(group)
    assert len(said) == 1 and group.state() == {"total": 3}


def test_learners_whose_state_is_lost_with_them_are_not_started_again(tmp_path: Path) -> None:
    group, said = group_of("dies", tmp_path)
    for step in (1, 2):
        group.update(NOTHING, step)
    group._state = lost_with_its_node.remote()
    with pytest.raises(StateLost, match="newest state is lost with its node"):
        group.update(NOTHING, 3)
    assert said == []


def test_a_learner_that_fails_by_itself_is_an_error(tmp_path: Path) -> None:
    group, said = group_of("fails", tmp_path)
    with pytest.raises(RayTaskError, match="out of memory"):
        totals(group)
    group, _ = group_of("fails", tmp_path)
    group.begin(NOTHING, 0, 1)  # its gradient would be half there
    with pytest.raises(RayTaskError, match="out of memory"):
        group.update(NOTHING, 1)
    assert said == []
