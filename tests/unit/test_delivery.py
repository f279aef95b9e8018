"""A broadcast to workers over a real local Ray cluster, by actors that load no model; one of those that take part dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from grpo_flex.broadcast import Broken, Circle, Member
from grpo_flex.delivery import Delivery
from grpo_flex.fleet import Fleet, Published
from grpo_flex.learner_group import LearnerGroup
from grpo_flex.types import Adapter

VALUES = {"sampling": 1.0, "evaluation": 2.0, "base": 3.0}
NAMES = "abcdef"


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


class _Process:
    """Dies once, if that is its fate, in the middle of the weights of that role."""

    def __init__(self, fate: str, folder: str) -> None:
        self.fate, self.met, self.member = fate, Path(folder) / "met", Member()

    def ready(self) -> None:
        pass

    def pass_by(self, role: str) -> None:
        if role == self.fate and not self.met.exists():
            self.met.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class _Learner(_Process):
    def version(self) -> int:
        return 0

    def listen(self) -> str:
        return f"127.0.0.1:{self.member.listen()}"

    def send(self, circle: Circle, role: str) -> str:
        try:
            self.member.send(circle, dict(_weights(role)), self._passing(role))
        except Broken as error:
            return str(error)
        return ""

    def _passing(self, role: str) -> Iterator[tuple[str, torch.Tensor]]:
        for i, named in enumerate(_weights(role)):
            if i == 3:
                self.pass_by(role)
            yield named

    @ray.method(num_returns=2)
    def adapter(self, role: Any) -> tuple[int, Adapter]:
        return 0, Adapter(version=0, tensors=dict(_weights(role)), role=role)


class _Worker(_Process):
    def __init__(self, fate: str, folder: str) -> None:
        super().__init__(fate, folder)
        self.held = dict(_weights("base"))

    def receive(self, circle: Circle, rank: int, version: int, role: str) -> str:
        try:
            self.member.receive(circle, rank, _Doomed(self.held, lambda: self.pass_by(role)))
        except Broken as error:
            return str(error)
        return ""

    @ray.method(num_returns=2)
    def sample(self, adapter: Adapter) -> tuple[float, tuple[bool, float]]:
        """(whether weights came with the call, the sum of those that are held)."""
        for name, tensor in adapter.tensors.items():
            self.held[name].copy_(tensor)
        return 0.0, (bool(adapter.tensors), float(sum(t.sum() for t in self.held.values())))


class _Doomed(dict[str, torch.Tensor]):
    """Weights of a process whose end comes when the fourth is asked for."""

    def __init__(self, weights: dict[str, torch.Tensor], end: Any) -> None:
        super().__init__(weights)
        self.end = end

    def __getitem__(self, name: str) -> torch.Tensor:
        if name == NAMES[3]:
            self.end()
        return super().__getitem__(name)


def _weights(role: str) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, torch.full((500,), VALUES[role])) for name in NAMES)


@pytest.mark.parametrize("victim", ["worker", "learner"])
def test_whoever_dies_on_the_way_every_worker_samples_with_what_was_published(tmp_path: Path, victim: str) -> None:
    said: list[str] = []
    learner, worker = (ray.remote(kind).options(num_cpus=0) for kind in (_Learner, _Worker))  # pyright: ignore
    fates = {"b" if victim == "worker" else "learner": "evaluation"}

    def start(name: str) -> Any:
        return (learner if name == "learner" else worker).remote(fates.get(name, ""), str(tmp_path))

    learners = LearnerGroup(lambda rank: start("learner"), 1, restarts=1, timeout_s=60.0, say=said.append)
    learners.meet()
    fleet = Fleet(lambda name, lost: start(name), ["a", "b"], timeout_s=60.0, restarts=1, say=said.append)
    fleet.wait_until_ready()
    delivery = Delivery(learners, fleet, 30.0, said.append)

    def sampled(weights: Published) -> list[bool]:
        """Whether weights came with the calls; workers that are there have as many each."""
        jobs = []
        for _ in range(2):
            delivery.send(weights)
            jobs.append(fleet.submit("sample", weights))
        fleet.wait(jobs)
        came, sums = zip(*(ray.get(job.result) for job in jobs), strict=True)
        assert set(sums) == {VALUES[weights.role] * 500 * len(NAMES)}
        return sorted(came)

    assert sampled(delivery.publish("sampling")) == [False, False] and said == []
    came = sampled(weights := delivery.publish("evaluation"))
    if victim == "worker":  # the other one may have got all of it or not
        assert any("of 2 workers get them through the object store" in line for line in said)
        assert "b died; starting it again" in said and len(said) == 2
    else:
        assert came == [False, False] and said == ["a learner died; starting again from the last completed step"]
    fleet.wait_until_ready()
    assert sampled(weights) == [False, victim == "worker"]  # one that was started again gets them with its first call
    assert sampled(delivery.publish("base")) == [False, False]  # in a circle of its own
