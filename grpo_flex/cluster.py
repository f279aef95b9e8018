"""Ray placement, and nothing else: which actor sits where, and how work reaches it.

The driver holds references and scalars; media, latents and adapters stay in Ray's object store.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import ray
import ray.exceptions
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from grpo_flex import verdicts
from grpo_flex.actors import ColocatedActor, JudgeActor, LearnerActor, RolloutActor, ScorerActor, Scribe
from grpo_flex.config import ConfigError, Judge, RunConfig
from grpo_flex.delivery import Delivery
from grpo_flex.endpoints import EndpointState
from grpo_flex.fleet import Fleet, Job, Published
from grpo_flex.learner_group import LearnerGroup
from grpo_flex.rollout import HELDOUT_BATCH
from grpo_flex.scorers import label
from grpo_flex.types import Adapter, Prompt, Role, RolloutGroup, Sample, UpdateBatch, UpdateResult, Verdict

if TYPE_CHECKING:
    AdapterRef = ray.ObjectRef[Adapter] | Published

_STATES = {"ALIVE": "alive", "RESTARTING": "restarting", "DEAD": "dead"}
"""Ray's words for an actor, and ours; all others are on the way to "alive"."""

PREPARED_TOGETHER = 64
"""Prompts of one call to a worker: few enough to be encoded long before it would be taken for hung."""

REVIVED: dict[str, Any] = {"max_restarts": 5, "max_task_retries": 5}
"""Ray's options for an actor that Ray itself starts again: its calls are made again too, so they have to bear that."""

Resources = dict[str, float]
"""What one process asks for, e.g. {"CPU": 1.0, "GPU": 1.0}; without what it does not need."""


class Cluster:
    """The actors of one run. Use as a context manager: leaving it stops them, and leaves Ray (or stops it, if it is local).

    Args:
        endpoints: where the judge is asked.
        gpus: those that a local cluster is to have; empty: all that it finds.
    """

    def __init__(self, config: RunConfig, run_dir: Path, endpoints: tuple[str, ...], gpus: Sequence[str] = ()) -> None:
        self.config = config
        self.say: Callable[[str], None] = lambda text: None
        """Where to tell a person that a process was lost or joined."""
        self.stopping: Callable[[], bool] = lambda: False
        """Whether the run is being stopped, so that nobody is to be started again."""
        place = config.placement
        local = connect(config, gpus)
        try:
            self._bundles = seats(config)
            self._group = reserve(self._bundles, 0.0 if local else place.wait_s)
        except ConfigError:
            ray.shutdown()
            raise
        self._judge = _start_judge(config.judge, endpoints, str((run_dir / verdicts.FILE_NAME).resolve()))
        scorer: Any = ray.remote(ScorerActor)
        self._scorers = {
            label(s): scorer.options(**REVIVED, **self._seat(label(s))).remote(
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
            keeps=config.adapter.state_each_step,
        )
        self._fleet = Fleet(
            self._colocated_worker if place.colocated else self._start_worker,
            _learner_names(config) if place.colocated else _worker_names(config),
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

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors().values():
            ray.kill(actor)
        ray.util.remove_placement_group(self._group)
        ray.shutdown()

    def wait_until_ready(self) -> None:
        """Block until every actor has loaded its model.

        Raises:
            ValueError: what a constructor refused (a model that cannot be loaded, targets that match nothing).
        """
        with _plain_errors():
            self._learners.meet()
            self._fleet.wait_until_ready()
            if self.config.sampling.batch_tokens:
                self.together = self._prompts_together()
            ray.get([scorer.load.remote() for scorer in self._scorers.values()])

    def _prompts_together(self) -> int:
        asked = self._fleet.submit("together")
        return cast("int", self._fleet.fetch(asked))

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
        """Let a worker sample the groups of some prompts, ``together`` at most; see ``Job.follow``."""
        return self._submit("generate", adapter, step, prompts, follow=follow, count=len(prompts))

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
        self, group: ray.ObjectRef[RolloutGroup], seed: int, previous: Sequence[Verdict] = ()
    ) -> ray.ObjectRef[list[Verdict]]:
        """Verdicts on one group; asking begins as soon as the group exists. Usable ``previous`` ones are kept."""
        return self._judge.judge.remote(group, seed, previous)

    def compare(
        self, prompt: Prompt, step: int, seed: int, one: ray.ObjectRef[np.ndarray], two: np.ndarray
    ) -> ray.ObjectRef[list[Verdict]]:
        """The judge's verdicts on two media of one prompt: a group of two without trajectories."""
        return self._judge.compare.remote(prompt, step, seed, one, two)

    def score(self, group: ray.ObjectRef[RolloutGroup]) -> list[ray.ObjectRef[list[Verdict]]]:
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

    def evaluate(self, prompts: Sequence[Prompt], adapter: AdapterRef) -> Iterator[Sample]:
        """Held-out samples in the order of the prompts."""
        chunks = [list(prompts[i : i + HELDOUT_BATCH]) for i in range(0, len(prompts), HELDOUT_BATCH)]
        jobs = [self._submit("evaluate", adapter, chunk) for chunk in chunks]
        self._fleet.wait(jobs)
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
        restarts |= dict.fromkeys(_learner_names(self.config), self._learners.restarts)
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
            node = _node(where.get("IPAddress", "?"), where.get("NodeID", ""))
            asked = self._bundles.get(name, {})
            rows.append((name, node, ", ".join(f"{n:g} {kind}" for kind, n in asked.items()) or "-"))
        return rows

    def _table(self) -> dict[str, Any]:
        """Ray's own table of actors: its public state API needs the dashboard, which a run does without."""
        from ray._private.state import actors

        return actors(job_id=ray.JobID.from_hex(ray.get_runtime_context().get_job_id()))

    def _actors(self) -> dict[str, Any]:
        learners = dict(zip(_learner_names(self.config), self._learners.actors, strict=True))
        workers = {name: worker.actor for name, worker in sorted(self._fleet.workers.items())}
        return workers | learners | self._scorers | {"judge client": self._judge}

    # ------------------------------------------------------------ starting

    def _seat(self, name: str) -> dict[str, Any]:
        """Ray's options for a process: its bundle of the reservation, or, for one that joined, any free place."""
        asked = self._bundles.get(name, {})
        options: dict[str, Any] = {"num_cpus": asked.get("CPU", 0.0), "num_gpus": asked.get("GPU", 0.0)}
        if name not in self._reserved:
            return options
        strategy = PlacementGroupSchedulingStrategy(self._group, self._reserved.index(name))
        return options | {"scheduling_strategy": strategy}

    @property
    def _reserved(self) -> list[str]:
        return [name for name, asked in self._bundles.items() if asked][: self._group.bundle_count]

    def _start_worker(self, name: str, lost: Any = None) -> Any:
        actor: Any = ray.remote(RolloutActor)
        device = "cuda" if self.config.placement.rollout_gpus else "cpu"
        return actor.options(**self._seat(name)).remote(self.config, device, name)

    def _start_learner(self, rank: int) -> Any:
        place = self.config.placement
        actor: Any = ray.remote(ColocatedActor if place.colocated else LearnerActor)
        name = _learner_names(self.config)[rank]
        return actor.options(**self._seat(name)).remote(self.config, "cuda" if place.learner_gpus else "cpu", rank)

    def _colocated_worker(self, name: str, lost: Any = None) -> Any:
        """The learner of that name; started again, with all others, if it is the one that is lost."""
        if lost is not None:
            self._learners.replace(lost)
        return self._learners.actors[_learner_names(self.config).index(name)]

    def _joining(self, there: int) -> str | None:
        """The name of one more worker, if ``placement.rollout_workers_max`` allows it and a node has room."""
        place = self.config.placement
        if place.colocated or there >= place.rollout_workers_max or time.monotonic() < self._next_join:
            return None
        self._next_join = time.monotonic() + JOIN_S
        asked = _asks(place.rollout_cpus, place.rollout_gpus)
        if not any(_has(free, asked) for free in _free_by_node().values()):
            return None
        name = next(n for i in range(place.rollout_workers_max) if (n := f"rollout-{i}") not in self._fleet.workers)
        self._bundles.setdefault(name, asked)
        return name


JOIN_S = 5.0
"""Between two looks for room for one more worker."""


def seats(config: RunConfig) -> dict[str, Resources]:
    """Every process by name with what it asks for, in the order of the reservation."""
    place = config.placement
    learners = dict.fromkeys(_learner_names(config), _asks(place.learner_cpus, place.learner_gpus))
    workers = [] if place.colocated else _worker_names(config)
    rollout = dict.fromkeys(workers, _asks(place.rollout_cpus, place.rollout_gpus))
    return learners | rollout | {label(s): _asks(place.scorer_cpus, place.scorer_gpus) for s in config.scorers}


def in_all(seats: dict[str, Resources], kind: str) -> float:
    return sum(asked.get(kind, 0.0) for asked in seats.values())


def _learner_names(config: RunConfig) -> list[str]:
    count = config.placement.learners
    return ["learner"] if count == 1 else [f"learner-{rank}" for rank in range(count)]


def _worker_names(config: RunConfig) -> list[str]:
    return [f"rollout-{i}" for i in range(config.placement.rollout_workers)]


def _asks(cpus: float, gpus: float) -> Resources:
    return {kind: float(n) for kind, n in (("CPU", cpus), ("GPU", gpus)) if n}


def reserve(wanted: dict[str, Resources], wait_s: float) -> Any:
    """A placement group with one bundle for each process that asks for something, in the order of ``wanted``.

    Args:
        wait_s: how long an autoscaler may take to start the nodes.

    Raises:
        ConfigError: the cluster does not offer that much, in all or on single nodes.
    """
    until = time.monotonic() + wait_s
    while complaint := _too_little(wanted):
        if time.monotonic() > until:
            raise ConfigError(complaint)
        time.sleep(min(1.0, wait_s))
    bundles = [asked for asked in wanted.values() if asked]
    group = placement_group(bundles or [{"CPU": 0.001}], strategy="PACK")
    if not group.wait(max(RESERVE_S, until - time.monotonic())):
        ray.util.remove_placement_group(group)
        free = "; ".join(f"{node}: {_spell(has)}" for node, has in sorted(_free_by_node().items()))
        asked = ", ".join(f"{name} {_spell(ask)}" for name, ask in wanted.items())
        raise ConfigError(
            f"placement cannot be met: no arrangement on these nodes holds {asked} (free: {free}); something else may be "
            "running there; ask for less with placement.*, or wait longer with placement.wait_s"
        )
    return group


RESERVE_S = 30.0
"""How long Ray may take to reserve what is free."""


def _too_little(wanted: dict[str, Resources]) -> str | None:
    """What the whole cluster lacks."""
    there = ray.cluster_resources()
    for kind in ("CPU", "GPU"):
        needed = in_all(wanted, kind)
        if needed > there.get(kind, 0.0):
            parts = ", ".join(f"{name} {asked[kind]:g}" for name, asked in wanted.items() if kind in asked)
            return (
                f"placement needs {needed:g} {kind}s ({parts}), but the Ray cluster has {there.get(kind, 0.0):g}; lower "
                f"placement.rollout_workers, placement.learners or placement.*_{kind.lower()}s"
            )
    return None


def _free_by_node() -> dict[str, Resources]:
    """Each living node -> what nobody uses there."""
    from ray._private.state import available_resources_per_node

    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    free: dict[str, Any] = available_resources_per_node()
    return {_node(addresses[i], i): dict(has) for i, has in free.items() if i in addresses}


def _node(address: str, node_id: str) -> str:
    """A node's name for a person: several may share an address."""
    return f"{address}/{node_id[:4]}"


def _has(free: Resources, asked: Resources) -> bool:
    return all(free.get(kind, 0.0) >= n for kind, n in asked.items())


def _spell(resources: Resources) -> str:
    return " ".join(f"{resources.get(kind, 0.0):g} {kind}" for kind in ("CPU", "GPU") if kind in resources) or "nothing"


def _start_judge(judge: Judge | None, endpoints: tuple[str, ...], verdict_path: str) -> Any:
    """The judge client's actor, or the one that only keeps the scorers' verdicts; where the run's directory is."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 1000, "scheduling_strategy": here, **REVIVED}
    if judge is None:
        scribe: Any = ray.remote(Scribe).options(**options)
        return scribe.remote(verdict_path)
    actor: Any = ray.remote(JudgeActor).options(**options)
    return actor.remote(verdict_path, judge, endpoints)


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


def _listens(address: str, timeout_s: float = 5.0) -> bool:
    """Whether something accepts connections there; True for addresses without a port ("auto"), which Ray resolves."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return True
    try:
        with socket.create_connection((host.strip("[]") or "127.0.0.1", int(port)), timeout_s):
            return True
    except OSError:
        return False


def connect(config: RunConfig, gpus: Sequence[str] = ()) -> bool:
    """Join the announced Ray cluster, or start a local one, with these GPUs or all; True if it is ours to shut down."""
    address = config.placement.ray_address or os.environ.get("RAY_ADDRESS", "")
    if address:
        if not _listens(address):  # Ray itself goes on trying for minutes
            raise ConfigError(
                f"no Ray cluster answers at '{address}' (placement.ray_address or RAY_ADDRESS); start one with `ray start --head`, or leave both empty for a local one"
            )
        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        except ConnectionError as error:
            raise ConfigError(
                f"what listens at '{address}' (placement.ray_address or RAY_ADDRESS) does not let this process join: is it a "
                "Ray cluster? One that was started while its user had a token wants that token (~/.ray/auth_token) and "
                "RAY_AUTH_MODE=token here too; see docs/cluster.md"
            ) from error
        return False
    # Rollout and update take turns on a small machine, so logical CPUs may exceed the real ones.
    cpus = max(os.cpu_count() or 1, int(in_all(seats(config), "CPU") + 0.999))
    with _seeing(gpus):
        ray.init(
            address="local", num_cpus=cpus, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False
        )
    return True


@contextmanager
def _seeing(gpus: Sequence[str]) -> Iterator[None]:
    """What is started meanwhile sees these GPUs alone; all, where there are none of them."""
    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    if gpus:
        os.environ[name] = ",".join(gpus)
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before
        elif gpus:
            del os.environ[name]
