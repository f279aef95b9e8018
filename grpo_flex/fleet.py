"""The rollout workers: calls are dealt out among those that are there, and again when a worker or a result is lost.

What a call gives depends on its arguments alone, never on the worker, so that it may be repeated anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from grpo_flex.types import Adapter, Role

T = TypeVar("T")

POLL_S = 0.5
"""Between two looks at the workers while waiting for them."""


START_S = 1800.0
"""So long a worker may be starting: models are large, and nodes may have to come back first."""


DIED = (RayActorError, OutOfMemoryError)
"""What Ray says of a call whose process is gone; the second of one that its memory monitor has killed."""


def fate(error: RayError) -> str:
    """How a process was lost, for a message."""
    if isinstance(error, RayTaskError) and not isinstance(error, DIED):
        return f"failed ({type(error.cause).__name__}: {(str(error.cause).strip().splitlines() or [''])[0]})"
    return "was killed by Ray, because its node ran out of memory" if isinstance(error, OutOfMemoryError) else "died"


def may_be_the_machines(error: RayTaskError) -> bool:
    """Whether a call that failed may do elsewhere: a GPU's faults are RuntimeErrors, a mount's are OSErrors.

    Too little memory on a GPU is not among them: it would be too little for the same call on another one.
    """
    cause = error.cause
    return isinstance(cause, RuntimeError | OSError) and type(cause).__name__ != "OutOfMemoryError"


class Stranded(Exception):
    """No rollout worker is left, and none can be started."""


@dataclass(kw_only=True, eq=False)
class Job:
    """A call that any worker can do."""

    method: str
    arguments: tuple[Any, ...]
    follow: Callable[..., None]
    """Given the references of the results at once, and other ones each time that the call is made again."""
    count: int = 1
    """How many results it has."""
    receipt: Any = None
    results: list[Any] = field(default_factory=list)
    """References of this try."""
    done: bool = False
    failed: bool = False
    """Whether it has failed once, on a worker that may have been to blame."""
    seconds: float = 0.0
    """What the receipt says, for a rollout: how long it took."""

    @property
    def result(self) -> Any:
        """The only one."""
        (result,) = self.results
        return result


@dataclass(kw_only=True, eq=False)
class Worker:
    name: str
    actor: Any
    loading: ray.ObjectRef[None] | None
    """None once the model is loaded: until then it gets no work."""
    jobs: list[Job] = field(default_factory=list)
    heard: float = field(default_factory=time.monotonic)
    """When it was started, had loaded, last gave a result, or got work after having had none."""
    restarts: int = 0
    in_a_row: int = 0
    """Those of them that no result has followed yet."""
    holds: tuple[int, Role] | None = None
    """Version and role of the ``Published`` weights that it has once it has done all its work; None: of none."""


@dataclass(kw_only=True, eq=False)
class Published:
    """An argument of a call: weights that go along with it only to a worker that does not hold them."""

    version: int
    role: Role
    store: Callable[[], ray.ObjectRef[Adapter]]
    """Puts them into the object store; called when the first worker needs them from there."""
    sent: bool = False
    """Whether they were broadcast (``delivery.py``)."""
    _stored: ray.ObjectRef[Adapter] | None = None

    @property
    def key(self) -> tuple[int, Role]:
        return self.version, self.role

    def given_to(self, worker: Worker) -> Adapter | ray.ObjectRef[Adapter]:
        """What a worker is called with, which then holds them."""
        if worker.holds == self.key:
            return Adapter(version=self.version, tensors={}, role=self.role)
        if self._stored is None:
            self._stored = self.store()
        worker.holds = self.key
        return self._stored


class Fleet:
    """Rollout workers that may die, hang, leave and join.

    Args:
        start: makes the actor of a name; given the one that is lost, where there was one.
        names: the workers to begin with.
        timeout_s: a worker that has work and gives no result for so long is taken for hung.
        restarts: how often each may be started again without a result in between.
        joining: a name and an actor whenever the cluster has room for one more.
        say: tells a person what happened.
    """

    def __init__(
        self, start: Callable[[str, Any], Any], names: Sequence[str], *, timeout_s: float, restarts: int,
        say: Callable[[str], None], joining: Callable[[int], str | None] = lambda _: None,
    ) -> None:  # fmt: skip
        self._start, self._timeout_s, self._restarts, self._say, self._joining = (
            start,
            timeout_s,
            restarts,
            say,
            joining,
        )
        self.workers: dict[str, Worker] = {}
        self._waiting: list[Job] = []
        """Work for the first worker that has loaded its model, while none has."""
        self._loaded = False
        """Whether any worker ever had: then the model can be loaded, and who cannot is to blame."""
        self._alone_since = time.monotonic()
        for name in names:
            self._add(name)

    def wait_until_ready(self) -> None:
        """Until every worker has loaded its model, or is given up.

        Raises:
            RayTaskError: what loading raised, if nobody has loaded it.
            Stranded: nobody is left to load it.
        """
        while loading := [w.loading for w in self.workers.values() if w.loading is not None]:
            ray.wait(loading, num_returns=len(loading), timeout=POLL_S)
            self.tend()

    def submit(
        self, method: str, *arguments: Any, follow: Callable[..., None] = lambda *_: None, count: int = 1
    ) -> Job:
        job = Job(method=method, arguments=arguments, follow=follow, count=count)
        self._deal(job)
        return job

    def wait(self, jobs: Sequence[Job], look: Callable[[], None] = lambda: None) -> None:
        """Until all jobs are done, lost ones again; ``look`` is called with each that is, and at least twice a second."""
        while left := [job for job in jobs if not job.done]:
            if under_way := list(dict.fromkeys(job.receipt for job in left if job.receipt is not None)):
                ray.wait(under_way, timeout=POLL_S, fetch_local=False)
            else:
                time.sleep(POLL_S)
            look()  # before lost workers are started again: the run may have been asked to end
            self.tend()

    def again(self, jobs: Iterable[Job]) -> list[Job]:
        """Deal out once more those that were done and whose results are lost with the node that had them; which ones.

        Every result is brought to this node to see, so ask only when one of them turned out to be lost.
        """
        lost = [job for job in jobs if job.done and any(map(_is_lost, job.results))]
        for job in lost:
            job.done = False
            self._deal(job)
        return lost

    def fetch(self, job: Job) -> Any:
        """The only result, once it is there; made again if it is lost before."""
        while True:
            self.wait([job])
            try:
                return ray.get(job.result)
            except ObjectLostError:
                self.again([job])

    def free(self) -> list[Worker]:
        """Those that have loaded their model and have nothing to do."""
        return [worker for worker in self.workers.values() if worker.loading is None and not worker.jobs]

    def answers(self, asked: Mapping[Worker, ray.ObjectRef[T]], timeout_s: float) -> dict[Worker, T]:
        """What workers say in time to calls that are no jobs; those that turn out to have died are lost."""
        if asked:
            ray.wait(list(asked.values()), num_returns=len(asked), timeout=timeout_s)
        said: dict[Worker, T] = {}
        for worker, ref in asked.items():
            try:
                if _is_there(ref):
                    said[worker] = ray.get(ref)
            except DIED as error:
                self._lose(worker, fate(error))
        return said

    def tend(self) -> None:
        """See who is done, who is lost, who has joined; a few milliseconds.

        Raises:
            RayTaskError: a call that failed by itself, which would fail elsewhere too, or has.
            Stranded: nobody is left to do the work.
        """
        for worker in list(self.workers.values()):
            self._collect(worker)
        now = time.monotonic()
        if any(w.loading is None for w in self.workers.values()):
            self._alone_since = now
        elif self.workers and now - self._alone_since > START_S:
            raise Stranded(
                f"no rollout worker could be started for {START_S:g} s; is there still a node with room for one?"
            )
        for worker in list(self.workers.values()):
            if worker.loading is None and worker.jobs and now - worker.heard > self._timeout_s:
                self._lose(worker, f"gave no result for {self._timeout_s:g} s and is taken for hung")
            elif worker.loading is not None and now - worker.heard > START_S and self._alone_since == now:
                self._lose(worker, f"has not loaded its model for {START_S:g} s")
        if name := self._joining(len(self.workers)):
            self._say(f"{name} joins")
            self._add(name)

    def _add(self, name: str, lost: Worker | None = None) -> None:
        actor = self._start(name, lost and lost.actor)
        restarts, in_a_row = (lost.restarts + 1, lost.in_a_row + 1) if lost else (0, 0)
        loading = actor.ready.remote()
        self.workers[name] = Worker(name=name, actor=actor, loading=loading, restarts=restarts, in_a_row=in_a_row)

    def _deal(self, job: Job) -> None:
        """To the worker that has the least to do, of those that can begin."""
        if not self.workers:
            raise Stranded("every rollout worker has died too often")
        ready = [w for w in self.workers.values() if w.loading is None]
        if not ready:
            job.receipt = None
            self._waiting.append(job)
            return
        worker = min(ready, key=lambda w: len(w.jobs))
        if not worker.jobs:
            worker.heard = time.monotonic()
        worker.jobs.append(job)
        call = getattr(worker.actor, job.method).options(num_returns=1 + job.count)
        arguments = [a.given_to(worker) if isinstance(a, Published) else a for a in job.arguments]
        job.receipt, *job.results = call.remote(*arguments)
        job.follow(*job.results)

    def _collect(self, worker: Worker) -> None:
        """Take note of what a worker has done, or that it has died."""
        job: Job | None = None
        try:
            if worker.loading is not None and _is_there(worker.loading):
                ray.get(worker.loading)
                self._has_loaded(worker)
            for job in [job for job in worker.jobs if _is_there(job.receipt)]:
                job.seconds = float(ray.get(job.receipt))
                worker.jobs.remove(job)
                worker.heard, worker.in_a_row, job.done = time.monotonic(), 0, True
        except RayTaskError as error:
            if job is None:
                if not self._loaded:
                    raise
            elif job.failed or not may_be_the_machines(error):
                raise
            else:
                job.failed = True
            self._lose(worker, fate(error))
        except DIED as error:
            self._lose(worker, fate(error))

    def _has_loaded(self, worker: Worker) -> None:
        worker.loading, worker.heard, self._loaded = None, time.monotonic(), True
        waiting, self._waiting = self._waiting, []
        for job in waiting:
            self._deal(job)

    def _lose(self, worker: Worker, how: str) -> None:
        """Start a worker again, and give its work to the others."""
        ray.kill(worker.actor)
        del self.workers[worker.name]
        if worker.in_a_row < self._restarts:
            self._add(worker.name, worker)
            self._say(f"{worker.name} {how}; starting it again")
        else:
            self._say(f"{worker.name} {how} once more, after {worker.in_a_row} restarts; going on without it")
        if not self.workers and not self._loaded:
            raise Stranded(f"no rollout worker could load its model; the last one, {worker.name}, {how}")
        waiting, self._waiting = self._waiting, []
        for job in [*waiting, *worker.jobs]:
            self._deal(job)


def _is_there(ref: Any) -> bool:
    return bool(ray.wait([ref], timeout=0, fetch_local=False)[0])


def _is_lost(ref: Any) -> bool:
    try:
        ray.get(ref)
    except ObjectLostError:
        return True
    return False
