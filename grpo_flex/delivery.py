"""Whole sets of weights on their way from the learners to the rollout workers (``placement.broadcast``).

All workers that are there get them at once, by a collective broadcast. Whoever misses it, because it joined, was started
again or was lost on the way, is given them with its first call, through the object store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from grpo_flex.broadcast import Circle
from grpo_flex.fleet import Fleet, Published, Worker
from grpo_flex.learner_group import LearnerGroup
from grpo_flex.types import Role


class Delivery:
    """
    Args:
        timeout_s: how long members of a broadcast wait for each other, and for any one tensor.
        say: tells a person what happened.
    """

    def __init__(self, learners: LearnerGroup, fleet: Fleet, timeout_s: float, say: Callable[[str], None]) -> None:
        self._learners, self._fleet, self._timeout_s, self._say = learners, fleet, timeout_s, say
        self._met: tuple[Any, ...] = ()
        """Address and workers of the present circle."""
        self._circles = 0

    def publish(self, role: Role) -> Published:
        """The learners' weights of that role; nothing is sent before somebody is to work with them (``send``)."""
        return Published(version=self._learners.version(), role=role, store=partial(self._learners.publish, role))

    def send(self, weights: Published) -> None:
        """Broadcast them to the workers that have nothing to do; once, however often it is called.

        Raises:
            RayTaskError: a worker has another model than the learners.
        """
        if weights.sent:
            return
        weights.sent = True
        # One that died while it had nothing to do is found out here, and not waited for below.
        asked = {worker: worker.actor.ready.remote() for worker in self._fleet.free()}
        if there := list(self._fleet.answers(asked, self._timeout_s)):
            problem, called = self._learners.send(weights.role, partial(self._invite, weights, there))
            self._conclude(weights, problem, there, self._fleet.answers(called, self._timeout_s))

    def _invite(self, weights: Published, workers: Sequence[Worker], address: str) -> tuple[Circle, dict[Worker, Any]]:
        """The circle in which rank 0 of the learners, at the address, and the workers meet; these are called to it."""
        if self._met != (met := (address, *workers)):
            self._met, self._circles = met, self._circles + 1
        name, size = str(self._circles), len(workers) + 1
        circle = Circle(address=address, name=name, size=size, timeout_s=self._timeout_s)
        arguments = (weights.version, weights.role)
        return circle, {w: w.actor.receive.remote(circle, i, *arguments) for i, w in enumerate(workers, 1)}

    def _conclude(self, weights: Published, problem: str, called: Sequence[Worker], said: dict[Worker, str]) -> None:
        """Note who has them; ``problem`` and what the workers said are empty where all went well."""
        holders = [worker for worker in called if said.get(worker) == ""]
        for worker in holders:
            worker.holds = weights.key
        problems = [text for text in (problem, *said.values()) if text]
        if problems or len(holders) < len(called):
            self._met = ()  # nobody meets in that circle again
            self._say(
                f"the broadcast of weights failed ({problems[0] if problems else 'no answer'}); "
                f"{len(called) - len(holders)} of {len(called)} workers get them through the object store"
            )
