"""The learner processes of a run, as one: started again from the last completed step when one of them dies or hangs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import ray
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from grpo_flex.broadcast import Circle
from grpo_flex.fleet import DIED, fate, may_be_the_machines
from grpo_flex.types import Adapter, UpdateBatch, UpdateResult
from grpo_flex.weights import Parcel

T = TypeVar("T")

GRACE_S = 10.0
"""When a learner fails, another's death may be why; so long it is waited for to show."""


POLL_S = 0.5
"""Between two looks, while an answer is waited for, at whether the run is to stop."""
STOP_S = 10.0
"""A run that is asked to stop waits so long for learners at work before it does without: who asks may kill it soon."""
START_S = 1800.0
"""Learners that died may take so long to start again: models are large, and a node may have to come back first."""


class Hung(RayError):
    """Learners that took longer than ``placement.update_timeout_s``, or than a run that is to stop waits for."""


class StateLost(RayError):
    """Nobody has the newest state any more, so there is nothing to start learners again from."""


class LearnerGroup:
    """N learner actors that act alike.

    Each update leaves rank 0's state in the object store, and the driver keeps the reference to the newest. A group of
    which one has died is ended as a whole, started anew and given that state; then the call is made again.

    Args:
        start: makes the actor of a rank.
        size: how many ranks there are.
        restarts: how often the group may be started again without an update in between.
        timeout_s: for one update.
        say: tells a person what happened.
        stopping: whether the run is being stopped, so that what died is not to be started again.
        stopped_s: for how many seconds it is being stopped.
        keeps: whether updates leave the state. Where they do not, there is nothing to start again from.
    """

    def __init__(
        self, start: Callable[[int], Any], size: int, *, restarts: int, timeout_s: float,
        say: Callable[[str], None], stopping: Callable[[], bool] = lambda: False, keeps: bool = True,
        stopped_s: Callable[[], float] = lambda: 0.0,
    ) -> None:  # fmt: skip
        self._start, self._size, self._say, self._stopping, self._keeps = start, size, say, stopping, keeps
        self._left, self._allowed, self._timeout_s, self._stopped_s = restarts, restarts, timeout_s, stopped_s
        self._lost: RayError | None = None
        """Why the present actors are not to be asked any more, where they are not started again."""
        self._state: ray.ObjectRef[dict[str, Any]] | None = None
        self._begun: list[ray.ObjectRef[None]] = []
        self.restarts = 0
        self._loading: list[Any] = []
        """What was asked of the present actors by ``begin_to_load``, until ``meet``."""
        self.actors = [start(rank) for rank in range(size)]

    def begin_to_load(self) -> None:
        """Let the ranks find each other and load their models, without waiting; ``meet`` waits for it."""
        joining = []
        if self._size > 1:
            address = self.actors[0].address.remote()
            joining = [actor.join.remote(address) for actor in self.actors]
        self._loading = joining + [actor.ready.remote() for actor in self.actors]

    def meet(self, within_s: float = math.inf) -> None:
        """Let the ranks find each other, load their models and take up the newest state.

        Raises:
            Hung: one of these steps took longer, or the run is to stop and has the state at hand.
        """
        loading, self._loading = self._loading, []
        wait = partial(_all, timeout_s=within_s, does_without=self._does_without)
        wait(loading)
        if self._size > 1 and not loading:
            (address,) = wait([self.actors[0].address.remote()])
            wait([actor.join.remote(address) for actor in self.actors])
        wait([actor.ready.remote() for actor in self.actors])
        if self._state is not None:
            wait([actor.load_state.remote(self._state) for actor in self.actors])

    def begin(self, batch: UpdateBatch, of: int, step: int) -> None:
        """Let all ranks begin an update of ``of`` groups with the first ones of them; returns at once.

        ``update`` gives the same without it, so learners that are started again in between lose nothing but time.
        """
        self._begun += [actor.begin.remote(batch, of, step) for actor in self.actors]

    def update(self, batch: UpdateBatch, step: int) -> UpdateResult:
        """The update on all ranks; what one of them says of it, for all say the same."""
        return self._until_done(lambda: self._update(batch, step))

    def publish(self, role: str) -> ray.ObjectRef[Adapter]:
        """Rank 0's adapter in the object store; there when this returns."""
        return self._until_done(lambda: self._publish(role))

    def version(self) -> int:
        """Of the weights that ``publish`` and ``send`` take."""
        said: Any = self._until_done(lambda: _all([self.actors[0].version.remote()], self._timeout_s))
        return said[0]

    def send(self, role: str, invite: Callable[[str], tuple[Circle, T]]) -> tuple[str, T]:
        """Broadcast rank 0's weights to the receivers that ``invite``, given rank 0's address, calls to a circle.

        Returns:
            What went wrong (or ""), and what ``invite`` gave beside the circle; the last time, if a learner died.
        """
        return self._until_done(lambda: self._send(role, invite))

    def adapter_files(self) -> dict[str, bytes]:
        """Rank 0's, as ``save_pretrained`` writes them.

        Raises:
            RayError: the learners have died for good, hang, or are busy with an update that the run does without.
        """
        if self._lost is not None:
            raise self._lost
        made: Any = self._until_done(lambda: self._each("adapter_files"))
        return made[0]

    def state(self) -> dict[str, Any]:
        """After the last completed step; needs no learner that is alive once there was an update that left it.

        Raises:
            RayError: it did not, and the learners have died or hang.
        """
        if self._state is not None:
            return ray.get(self._state)
        if self._lost is not None:  # one that hangs would be waited for in vain
            raise self._lost
        made: Any = self._each("state")
        return made[0]

    def load_state(self, state: dict[str, Any]) -> None:
        self._state = ray.put(Parcel(state))
        ray.get([actor.load_state.remote(self._state) for actor in self.actors])

    def replace(self, lost: Any) -> None:
        """Start the group again if ``lost`` is still one of it (colocated: a worker's death is a learner's)."""
        if lost in self.actors:
            self._restore(RayActorError())

    def _update(self, batch: UpdateBatch, step: int) -> UpdateResult:
        called = [actor.update.remote(batch, step) for actor in self.actors]
        refs: list[ray.ObjectRef[Any]] = [*self._begun, *(result for result, _ in called)]
        *_, result = _all(refs, self._timeout_s, self._does_without)
        self._begun, self._state, self._left = [], called[0][1] if self._keeps else None, self._allowed
        return result

    def _publish(self, role: str) -> ray.ObjectRef[Adapter]:
        called = [actor.adapter.remote(role) for actor in self.actors]
        _all([receipt for receipt, _ in called], self._timeout_s)
        return called[0][1]

    def _does_without(self) -> bool:
        """Whether what is under way is given up: the run is to stop, and the newest state is at hand."""
        return self._state is not None and self._stopped_s() > STOP_S

    def _each(self, method: str) -> list[Any]:
        return _all([getattr(actor, method).remote() for actor in self.actors], self._timeout_s)

    def _send(self, role: str, invite: Callable[[str], tuple[Circle, T]]) -> tuple[str, T]:
        (address,) = _all([self.actors[0].listen.remote()], self._timeout_s)
        circle, invited = invite(address)
        problem, *_ = _all([actor.send.remote(circle, role) for actor in self.actors], self._timeout_s)
        return problem, invited

    def _until_done(self, call: Callable[[], T]) -> T:
        failed = False
        while True:
            try:
                return call()
            except (*DIED, Hung) as error:
                self._restore(error)
            except RayTaskError as error:
                if failed or not may_be_the_machines(error):
                    raise
                failed = True
                self._restore(error)

    def _restore(self, reason: RayError) -> None:
        """End all learners and start them again from the newest state, as often as it takes.

        Raises:
            RayError: the reason, where they are not to be started again; Hung where they cannot be.
            StateLost: their node was lost, and the state with it.
        """
        while True:
            if self._left == 0 or self._stopping() or not self._keeps:
                self._lost = reason
                raise reason
            self._reach_state()
            self._left, self.restarts, self._begun, self._loading = self._left - 1, self.restarts + 1, [], []
            what = "hangs" if isinstance(reason, Hung) else fate(reason)
            self._say(f"a learner {what}; starting again from the last completed step")
            for actor in self.actors:
                ray.kill(actor)
            self.actors = [self._start(rank) for rank in range(self._size)]
            try:
                return self.meet(START_S)
            except DIED as error:
                reason = error
            except Hung as hung:
                why = f"learners could not be started for {START_S:g} s; is there still a node with room for them?"
                self._lost = hung if self._does_without() else Hung(why)
                raise self._lost from reason

    def _reach_state(self) -> None:
        """Bring the newest state, if there is one yet, to this node: learners may have to start on another one."""
        try:
            if self._state is not None:
                ray.get(self._state)
        except ObjectLostError as error:
            raise StateLost("the learners' newest state is lost with its node") from error


def _all(
    refs: Sequence[ray.ObjectRef[T]], timeout_s: float, does_without: Callable[[], bool] = lambda: False
) -> list[T]:
    """All results.

    Raises:
        RayActorError, OutOfMemoryError: a process died, whatever the others said of it.
        RayTaskError: one of them failed.
        Hung: they are not there in time, or are done without.
    """
    until, pending = time.monotonic() + timeout_s, list(refs)
    while pending:
        left = until - time.monotonic()
        done, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, min(POLL_S, left)))
        if not done and left <= 0:
            raise Hung(f"no answer within placement.update_timeout_s={timeout_s:g}")
        if not done and does_without():
            raise Hung("the run is to stop, and does without what its learners are at")
        try:
            ray.get(done)
        except RayTaskError as error:
            late = [_error(ref) for ref in ray.wait(pending, num_returns=len(pending), timeout=GRACE_S)[0]]
            raise next((e for e in late if isinstance(e, DIED)), error) from None
    return ray.get(list(refs))


def _error(ref: ray.ObjectRef[Any]) -> Exception | None:
    try:
        ray.get(ref)
    except (RayActorError, OutOfMemoryError, RayTaskError) as error:
        return error
    return None
