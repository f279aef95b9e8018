"""Workers and learners that die, hang, leave and join, with actors that load nothing; a real local Ray cluster."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError, RayTaskError

from grpo_flex.fleet import Fleet, Stranded
from grpo_flex.learner_group import LearnerGroup
from grpo_flex.types import UpdateBatch, UpdateResult


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
        pass

    def pid(self) -> int:
        return os.getpid()

    @ray.method(num_returns=2)
    def double(self, n: int) -> tuple[float, tuple[int, str]]:
        fate, met = self.fates.get(n), self.folder / f"met-{n}"
        if fate and not met.exists():
            met.touch()
            os.kill(os.getpid(), {"dies": signal.SIGKILL, "hangs": signal.SIGSTOP}[fate])
        if n < 0:
            raise ValueError("a negative number")
        return 0.0, (2 * n, self.name)


def fleet_of(names: list[str], fates: dict[int, str], folder: Path, **options: Any) -> tuple[Fleet, list[str]]:
    said: list[str] = []
    actor: Any = ray.remote(_Doubler)
    settings: dict[str, Any] = {"timeout_s": 15.0, "restarts": 1, "say": said.append} | options
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


def test_work_that_fails_by_itself_is_not_repeated(tmp_path: Path) -> None:
    fleet, said = fleet_of(["a"], {}, tmp_path)
    with pytest.raises(RayTaskError, match="a negative number"):
        fleet.wait([fleet.submit("double", -1)])
    assert said == []


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


class _Adder:
    """A learner whose state is a sum. Rank 1 meets its fate when the sum would become ``at``."""

    def __init__(self, rank: int, fate: str, at: int, folder: str) -> None:
        self.rank, self.fate, self.at, self.met, self.total = rank, fate, at, Path(folder) / "met", 0

    def address(self) -> str:
        return "nowhere:0"

    def join(self, address: str) -> None: ...

    def ready(self) -> None: ...

    def begin(self, batch: UpdateBatch, of: int, step: int) -> None:
        if of == 0:
            raise ValueError("out of memory")

    @ray.method(num_returns=2)
    def update(self, batch: UpdateBatch, step: int) -> tuple[UpdateResult, dict[str, int] | None]:
        if self.total + step == self.at and self.rank == 1 and (self.fate == "fails" or not self.met.exists()):
            self.met.touch()
            if self.fate == "fails":
                raise ValueError("out of memory")
            os.kill(os.getpid(), {"dies": signal.SIGKILL, "hangs": signal.SIGSTOP}[self.fate])
        self.total += step
        return UpdateResult(policy_version=self.total, metrics={}), {"total": self.total} if self.rank == 0 else None

    def load_state(self, state: dict[str, int]) -> None:
        self.total = state["total"]


def group_of(fate: str, folder: Path, restarts: int = 1) -> tuple[LearnerGroup, list[str]]:
    said: list[str] = []
    actor: Any = ray.remote(_Adder)
    start = lambda rank: actor.options(num_cpus=0).remote(rank, fate, 6, str(folder))  # noqa: E731
    group = LearnerGroup(start, 2, restarts=restarts, timeout_s=15.0, say=said.append)
    group.meet()
    return group, said


NOTHING = UpdateBatch(groups=(), advantages=())


def totals(group: LearnerGroup) -> list[int]:
    found = []
    for step in (1, 2, 3, 4):
        group.begin(NOTHING, 2, step)
        found.append(group.update(NOTHING, step).policy_version)
    return found


@pytest.mark.parametrize("fate", ["dies", "hangs"])
def test_learners_go_on_from_the_last_completed_step(tmp_path: Path, fate: str) -> None:
    group, said = group_of(fate, tmp_path)
    assert totals(group) == [1, 3, 6, 10]
    assert group.restarts == len(said) == 1 and group.state() == {"total": 10}


def test_learners_that_die_once_too_often_leave_their_state(tmp_path: Path) -> None:
    group, _ = group_of("dies", tmp_path, restarts=0)
    with pytest.raises(RayActorError):
        totals(group)
    assert group.state() == {"total": 3}


def test_a_learner_that_fails_by_itself_is_an_error(tmp_path: Path) -> None:
    group, said = group_of("fails", tmp_path)
    with pytest.raises(RayTaskError, match="out of memory"):
        totals(group)
    group, _ = group_of("fails", tmp_path)
    group.begin(NOTHING, 0, 1)  # its gradient would be half there
    with pytest.raises(RayTaskError, match="out of memory"):
        group.update(NOTHING, 1)
    assert said == []
