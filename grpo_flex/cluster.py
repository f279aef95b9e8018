"""A run's actors, and how work reaches them; where each may sit is reserved beforehand (``placement.py``).

The driver holds references and scalars; media, latents and adapters stay in Ray's object store.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from grpo_flex import verdicts
from grpo_flex.actors import ColocatedActor, JudgeActor, LearnerActor, RolloutActor, ScorerActor, Scribe
from grpo_flex.config import Judge, RunConfig
from grpo_flex.delivery import Delivery
from grpo_flex.endpoints import EndpointState
from grpo_flex.fleet import Fleet, Job, Published
from grpo_flex.learner_group import LearnerGroup
from grpo_flex.placement import Reservation, asks, learner_names, node_name, worker_names
from grpo_flex.scorers import label
from grpo_flex.types import Adapter, GroupMedia, Prompt, Role, Sample, UpdateBatch, UpdateResult, Verdict

if TYPE_CHECKING:
    AdapterRef = ray.ObjectRef[Adapter] | Published

_STATES = {"ALIVE": "alive", "RESTARTING": "restarting", "DEAD": "dead"}
"""Ray's words for an actor, and ours; all others are on the way to "alive"."""

PREPARED_TOGETHER = 64
"""Prompts of one call to a worker: few enough to be encoded long before it would be taken for hung."""

REVIVED: dict[str, Any] = {"max_restarts": -1, "max_task_retries": 5}
"""Ray's options for an actor that Ray itself starts again: its calls are made again too, five times each, so they have to
bear that."""

SCORER = REVIVED | {"allow_out_of_order_execution": True}
"""In order, one group that is late would hold up the scoring of all others."""


class Cluster:
    """The actors of one run. Use as a context manager: leaving it stops them.

    Args:
        reserved: the run's place in Ray, which outlasts the actors.
    """

    def __init__(self, config: RunConfig, reserved: Reservation) -> None:
        self.config = config
        self.say: Callable[[str], None] = lambda text: None
        """Where to tell a person that a process was lost or joined."""
        self.stopping: Callable[[], bool] = lambda: False
        self.stopped_s: Callable[[], float] = lambda: 0.0
        """Whether the run is being stopped, so that nobody is to be started again."""
        place = config.placement
        self._reserved = reserved
        self._judge: Any = None
        scorer: Any = ray.remote(ScorerActor)
        self._scorers = {
            label(s): scorer.options(**SCORER, **self._reserved.options(label(s))).remote(
                s, place.threads_per_worker, place.scorer_gpus
            )
            for s in config.scorers
        }
        self._learners = LearnerGroup(
            self._start_learner,
            place.learners,
            restarts=place.learner_restarts,
            timeout_s=place.update_timeout_s,
            say=lambda text: self.say(text),
            stopping=lambda: self.stopping(),
            stopped_s=lambda: self.stopped_s(),
            keeps=config.adapter.state_each_step,
        )
        # Beside the judge's start: all of it is waited for in ``wait_until_ready``.
        self._loading = [scorer.load.remote() for scorer in self._scorers.values()]
        if not place.colocated:
            self._learners.begin_to_load()
        self._fleet = Fleet(
            self._colocated_worker if place.colocated else self._start_worker,
            learner_names(config) if place.colocated else worker_names(config),
            timeout_s=place.rollout_timeout_s,
            restarts=place.rollout_restarts,
            joining=self._joining,
            say=lambda text: self.say(text),
        )
        self._delivery = Delivery(self._learners, self._fleet, place.broadcast_timeout_s, lambda text: self.say(text))
        self._states: list[EndpointState] = []
        self._states_asked: ray.ObjectRef[list[EndpointState]] | None = None
        self._next_join = 0.0
        self.together = 1
        """Prompts that a worker samples in one call."""
        self._heldout_together = 1
        """The same of held-out prompts."""

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        """The judge's client and the scorers end when the driver leaves Ray, which makes no call of theirs again."""
        for actor in self._learners_and_workers().values():
            ray.kill(actor)

    def ask(self, endpoints: tuple[str, ...], run_dir: Path) -> None:
        """Start the judge's client, which asks there; the others load their models meanwhile."""
        self._judge = _start_judge(self.config.judge, endpoints, str((run_dir / verdicts.FILE_NAME).resolve()))

    def wait_until_ready(self) -> None:
        """Block until every actor has loaded its model.

        Raises:
            ValueError: what a constructor refused (a model that cannot be loaded, targets that match nothing).
        """
        import torch  # noqa: F401  # a second, which would else be the first checkpoint's

        with _plain_errors():
            self._learners.meet()
            self._fleet.wait_until_ready()
            asked = self._fleet.submit("together")
            self.together, self._heldout_together = cast("tuple[int, int]", self._fleet.fetch(asked))
            ray.get(self._loading)

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        """Check all prompts of the run, and encode them where encodings are kept; the workers share it out.

        Raises:
            ValueError: a prompt that the generator could not take whole.
        """
        with _plain_errors():
            shares = [prompts[i : i + PREPARED_TOGETHER] for i in range(0, len(prompts), PREPARED_TOGETHER)]
            self._fleet.wait([self._fleet.submit("prepare", share) for share in shares])

    # ------------------------------------------------------------ work

    def publish(self) -> AdapterRef:
        """Put the learner's current adapter into the object store; workers fetch it by this reference.

        With ``placement.broadcast`` it is sent when the first call needs it, so nobody trains in between.
        """
        return self._publish("sampling")

    def publish_evaluation(self) -> AdapterRef:
        """The same for held-out samples: the adapter's average."""
        return self._publish("evaluation")

    def publish_base(self) -> AdapterRef:
        """The same for the base model."""
        return self._publish("base")

    def _publish(self, role: Role) -> AdapterRef:
        return self._delivery.publish(role) if self.config.placement.broadcast else self._learners.publish(role)

    def _submit(self, method: str, adapter: AdapterRef, *first: Any, **options: Any) -> Job:
        """A call of the workers whose last argument is the adapter."""
        if isinstance(adapter, Published):
            self._delivery.send(adapter)
        return self._fleet.submit(method, *first, adapter, **options)

    def generate(
        self,
        step: int,
        prompts: Sequence[Prompt],
        adapter: AdapterRef,
        follow: Callable[..., None],
    ) -> Job:
        """Let a worker sample the groups of some prompts, ``together`` at most; see ``Job.follow``.

        Two results for each prompt: the media for the judge, and what the learners need.
        """
        return self._submit("generate", adapter, step, prompts, follow=follow, count=2 * len(prompts))

    def wait(self, jobs: Sequence[Job], look: Callable[[], None]) -> None:
        """Until all groups are there; ``look`` is called about twice a second."""
        self._fleet.wait(jobs, look)

    def again(self, jobs: Iterable[Job]) -> list[Job]:
        """Sample once more what was complete and is lost with its node; those jobs."""
        return self._fleet.again(jobs)

    def tend(self) -> None:
        """Start lost workers again and give their work to others; let new ones join."""
        self._fleet.tend()

    def judge(
        self, group: ray.ObjectRef[GroupMedia], seed: int, previous: Sequence[Verdict] = ()
    ) -> ray.ObjectRef[list[Verdict]]:
        """Verdicts on one group; asking begins as soon as the group exists. Usable ``previous`` ones are kept."""
        return self._judge.judge.remote(group, seed, previous)

    def compare(
        self, prompt: Prompt, step: int, seed: int, one: ray.ObjectRef[np.ndarray], two: np.ndarray, about: str
    ) -> ray.ObjectRef[list[Verdict]]:
        """The judge's verdicts on two media of one prompt: a group of two without trajectories."""
        return self._judge.compare.remote(prompt, step, seed, one, two, about)

    def score(self, group: ray.ObjectRef[GroupMedia]) -> list[ray.ObjectRef[list[Verdict]]]:
        """One reference for each scorer's verdicts on one group; scoring begins as soon as the group exists."""
        return [scorer.score.remote(group) for scorer in self._scorers.values()]

    def record(self, step: int, prompt: Prompt, given: Sequence[Verdict]) -> ray.ObjectRef[None]:
        """Write a scorer's verdicts to the verdicts' file, beside the judge's; whoever waits for it learns of a full disk."""
        return self._judge.record.remote(step, prompt, given)

    def judge_report(self) -> ray.ObjectRef[dict[str, float]]:
        """``judge/…`` figures of the client since the last call: requests, retries, cache hits."""
        return self._judge.report.remote()

    def judge_states(self) -> list[EndpointState]:
        """The newest that is known of the judge's endpoints, at most two calls old; never waits."""
        if self._states_asked is None:
            self._states_asked = self._judge.states.remote()
        done, _ = ray.wait([self._states_asked], timeout=0)
        if done:
            self._states, self._states_asked = ray.get(done[0]), None
        return self._states

    def judge_is_healthy(self) -> bool:
        return ray.get(self._judge.healthy.remote())

    def evaluate(
        self, prompts: Sequence[Prompt], adapter: AdapterRef, look: Callable[[], None] = lambda: None
    ) -> Iterator[Sample]:
        """Held-out samples in the order of the prompts; ``look`` is called at least twice a second until they are there."""
        size = self._heldout_together
        chunks = [list(prompts[i : i + size]) for i in range(0, len(prompts), size)]
        jobs = [self._submit("evaluate", adapter, chunk) for chunk in chunks]
        self._fleet.wait(jobs, look)
        for job in jobs:
            yield from self._fleet.fetch(job)

    def begin(self, batch: UpdateBatch, of: int, step: int) -> None:
        """Let the learners begin the update of a step with those of its ``of`` groups that are complete."""
        self._learners.begin(batch, of, step)

    def update(self, batch: UpdateBatch, step: int) -> UpdateResult:
        return self._learners.update(batch, step)

    def learner_state(self) -> dict[str, Any]:
        """After the last completed step, even if every learner is gone."""
        return self._learners.state()

    def load_learner_state(self, state: dict[str, Any]) -> None:
        with _plain_errors():
            self._learners.load_state(state)

    def save_adapter(self, folder: Path) -> None:
        """Write the exported adapter's files."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._learners.adapter_files().items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    def close_judge(self) -> None:
        ray.get(self._judge.close.remote())

    # ------------------------------------------------------------ who is there

    def worker_states(self) -> dict[str, str]:
        """What became of each process, e.g. {"rollout-0": "alive, restarted once"}; about a millisecond."""
        restarts = {name: worker.restarts for name, worker in self._fleet.workers.items()}
        restarts |= dict.fromkeys(learner_names(self.config), self._learners.restarts)
        table = self._table()
        return {
            name: _state(table.get(actor._actor_id.hex(), {}), restarts.get(name, 0))
            for name, actor in self._actors().items()
        }

    def seating(self) -> list[tuple[str, str, str]]:
        """(process, node, what it asked for) of every process, for a person to read."""
        table, rows = self._table(), []
        for name, actor in self._actors().items():
            where = table.get(actor._actor_id.hex(), {}).get("Address", {})
            node = node_name(where.get("IPAddress", "?"), where.get("NodeID", ""))
            rows.append((name, node, self._reserved.spell(name)))
        return rows

    def _table(self) -> dict[str, Any]:
        """Ray's own table of actors: its public state API needs the dashboard, which a run does without."""
        from ray._private.state import actors

        return actors(job_id=ray.JobID.from_hex(ray.get_runtime_context().get_job_id()))

    def _learners_and_workers(self) -> dict[str, Any]:
        learners = dict(zip(learner_names(self.config), self._learners.actors, strict=True))
        return {name: worker.actor for name, worker in sorted(self._fleet.workers.items())} | learners

    def _actors(self) -> dict[str, Any]:
        return self._learners_and_workers() | self._scorers | ({"judge client": self._judge} if self._judge else {})

    # ------------------------------------------------------------ starting

    def _start_worker(self, name: str, lost: Any = None) -> Any:
        actor: Any = ray.remote(RolloutActor)
        device = "cuda" if self.config.placement.rollout_gpus else "cpu"
        return actor.options(**self._reserved.options(name)).remote(self.config, device, name)

    def _start_learner(self, rank: int) -> Any:
        place = self.config.placement
        actor: Any = ray.remote(ColocatedActor if place.colocated else LearnerActor)
        name = learner_names(self.config)[rank]
        return actor.options(**self._reserved.options(name)).remote(
            self.config, "cuda" if place.learner_gpus else "cpu", rank
        )

    def _colocated_worker(self, name: str, lost: Any = None) -> Any:
        """The learner of that name; started again, with all others, if it is the one that is lost."""
        if lost is not None:
            self._learners.replace(lost)
        return self._learners.actors[learner_names(self.config).index(name)]

    def _joining(self, there: int) -> str | None:
        """The name of one more worker, if ``placement.rollout_workers_max`` allows it and a node has room."""
        place = self.config.placement
        if place.colocated or there >= place.rollout_workers_max or time.monotonic() < self._next_join:
            return None
        self._next_join = time.monotonic() + JOIN_S
        # One that was given up has a name, and maybe a bundle on a node that is to blame, which are left to it.
        name = next(n for i in count() if (n := f"rollout-{i}") not in self._reserved.bundles)
        return name if self._reserved.room_for_one_more(name, asks(place.rollout_cpus, place.rollout_gpus)) else None


JOIN_S = 5.0
"""Between two looks for room for one more worker."""


def _start_judge(judge: Judge | None, endpoints: tuple[str, ...], verdict_path: str) -> Any:
    """The judge client's actor, or the one that only keeps the scorers' verdicts; where the run's directory is."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 1000, "scheduling_strategy": here, **REVIVED}
    if judge is None:
        scribe: Any = ray.remote(Scribe).options(**options)
        return scribe.remote(verdict_path)
    actor: Any = ray.remote(JudgeActor).options(**options)
    # On a cluster that was there before, its processes do not have this one's environment.
    return actor.remote(verdict_path, judge, endpoints, os.environ.get(judge.api_key_env, ""))


def _state(actor: dict[str, Any], restarts: int) -> str:
    """One line of Ray's table of actors, in words; ``restarts`` are those that we made."""
    state, restarts = _STATES.get(actor.get("State", ""), "starting"), actor.get("NumRestarts", 0) + restarts
    return state + (f", restarted {restarts} times" if restarts > 1 else ", restarted once" if restarts else "")


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What an actor refused as a ValueError, without Ray's trace around it."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise ValueError(str(error.cause)) from error
        raise
