"""Ray placement, and nothing else: which actor sits where, and how work reaches it.

The driver holds references and scalars; media, latents and adapters stay in Ray's object store.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from grpo_flex import verdicts
from grpo_flex.config import ConfigError, Judge, RunConfig
from grpo_flex.endpoints import EndpointState
from grpo_flex.judging import JudgeClient
from grpo_flex.learner import Learner
from grpo_flex.rollout import HELDOUT_BATCH, RolloutWorker
from grpo_flex.scorers import label, score_group
from grpo_flex.types import Adapter, Prompt, RolloutGroup, Sample, UpdateBatch, UpdateResult, Verdict

_STATES = {"ALIVE": "alive", "RESTARTING": "restarting", "DEAD": "dead"}
"""Ray's words for an actor, and ours; all others are on the way to "alive"."""


class _RolloutActor:
    """Loads on first use: a failure is then an ordinary error of a call, and a restarted actor heals itself."""

    def __init__(self, config: RunConfig, device: str, name: str) -> None:
        self.arguments = (config, device, name)

    @cached_property
    def worker(self) -> RolloutWorker:
        return RolloutWorker(*self.arguments)

    def use(self, adapter: Adapter) -> None:
        self.worker.use(adapter)

    def generate(self, step: int, prompt: Prompt, adapter: Adapter) -> RolloutGroup:
        return self.worker.generate(step, prompt, adapter)

    def evaluate(self, prompts: Sequence[Prompt], adapter: Adapter) -> list[Sample]:
        return self.worker.evaluate(prompts, adapter)


class _LearnerActor:
    def __init__(self, config: RunConfig, device: str) -> None:
        self.arguments = (config, device)

    @cached_property
    def learner(self) -> Learner:
        return Learner(*self.arguments)

    def update(self, batch: UpdateBatch, step: int) -> UpdateResult:
        return self.learner.update(ray.get(list(batch.groups)), batch.advantages, step)

    def adapter(self) -> Adapter:
        return self.learner.adapter()

    def evaluation_adapter(self) -> Adapter:
        return self.learner.evaluation_adapter()

    def state(self) -> dict[str, Any]:
        return self.learner.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.learner.load_state(state)

    def save_adapter(self, folder: str) -> str:
        return str(self.learner.save_adapter(Path(folder)))


class _ScorerActor:
    def __init__(self, scorer: Any, threads: int, gpus: float) -> None:
        if not gpus:  # Ray leaves all devices visible to an actor that asked for none
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        import torch

        torch.set_num_threads(threads)
        self.scorer = scorer

    def load(self) -> None:
        load: Any = getattr(self.scorer, "load", None)
        if load is not None:
            load()

    def score(self, group: RolloutGroup) -> list[Verdict]:
        return score_group(self.scorer, group.media_G, group.prompt)


class _Scribe:
    """Keeps the verdicts' file, which has one writer; all that a run without a judge needs of the judge's actor."""

    def __init__(self, verdict_path: str) -> None:
        self.log = verdicts.VerdictLog(verdict_path)

    async def record(self, step: int, prompt: Prompt, given: Sequence[Verdict]) -> None:
        for verdict in given:
            self.log.add(step + 1, prompt.id, prompt.text, verdict)
        self.log.flush()

    async def report(self) -> dict[str, float]:
        return {}

    async def states(self) -> list[EndpointState]:
        return []

    async def close(self) -> None:
        self.log.flush()


class _JudgeActor(_Scribe):
    """The judge client in an event loop of its own: one connection pool for the whole run."""

    def __init__(self, verdict_path: str, judge: Judge, endpoints: tuple[str, ...]) -> None:
        self.client = JudgeClient(judge, verdict_path, endpoints)
        self.log = self.client.log

    async def judge(self, group: RolloutGroup, seed: int, previous: Sequence[Verdict] = ()) -> list[Verdict]:
        return await self.client.judge(group, seed, previous)

    async def healthy(self) -> bool:
        return await self.client.wait_until_healthy(0.0, heartbeat=lambda _: None)

    async def report(self) -> dict[str, float]:
        return self.client.counters() | await self.client.cache_hit_rates()

    async def states(self) -> list[EndpointState]:
        return self.client.states()

    async def close(self) -> None:
        await self.client.close()


class Cluster:
    """The actors of one run. Use as a context manager: leaving it stops them, and a local Ray cluster too."""

    def __init__(self, config: RunConfig, run_dir: Path, endpoints: tuple[str, ...]) -> None:
        self.config = config
        place = config.placement
        self._local = connect(config)
        try:
            self._check_resources()
        except ConfigError:
            ray.shutdown()
            raise
        rollout: Any = ray.remote(_RolloutActor).options(
            num_cpus=place.rollout_cpus, num_gpus=place.rollout_gpus, max_restarts=5, max_task_retries=5
        )  # a worker that dies is started again and its group sampled again, from the same seeds
        device = "cuda" if place.rollout_gpus else "cpu"
        self._workers = [rollout.remote(config, device, f"rollout-{i}") for i in range(place.rollout_workers)]
        learner: Any = ray.remote(_LearnerActor).options(num_cpus=place.learner_cpus, num_gpus=place.learner_gpus)
        self._learner: Any = learner.remote(config, "cuda" if place.learner_gpus else "cpu")
        scorer: Any = ray.remote(_ScorerActor).options(
            num_cpus=place.scorer_cpus, num_gpus=place.scorer_gpus, max_restarts=5, max_task_retries=5
        )
        self._scorers = [scorer.remote(s, place.threads_per_worker, place.scorer_gpus) for s in config.scorers]
        self._judge = _start_judge(config.judge, endpoints, str((run_dir / verdicts.FILE_NAME).resolve()))
        self._named = self._names()
        self._states: list[EndpointState] = []
        self._states_asked: ray.ObjectRef[list[EndpointState]] | None = None
        self._turn = 0

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._named.values():
            ray.kill(actor)
        if self._local:
            ray.shutdown()

    def _check_resources(self) -> None:
        place, there, scorers = self.config.placement, ray.cluster_resources(), len(self.config.scorers)
        for kind, rollout, learner, scorer in (
            ("CPU", place.rollout_cpus, place.learner_cpus, place.scorer_cpus),
            ("GPU", place.rollout_gpus, place.learner_gpus, place.scorer_gpus),
        ):
            needed = place.rollout_workers * rollout + learner + scorers * scorer
            more = f" + {scorers} scorers × {scorer:g}" if scorers else ""
            if needed > there.get(kind, 0):
                raise ConfigError(
                    f"placement needs {needed:g} {kind}s ({place.rollout_workers} rollout workers × {rollout:g} + learner {learner:g}{more}), "
                    f"but the Ray cluster has {there.get(kind, 0):g}; lower placement.rollout_workers or placement.*_{kind.lower()}s"
                )

    def _names(self) -> dict[str, Any]:
        workers = {f"rollout-{i}": actor for i, actor in enumerate(self._workers)}
        scorers = {label(s): actor for s, actor in zip(self.config.scorers, self._scorers, strict=True)}
        return workers | {"learner": self._learner} | scorers | {"judge client": self._judge}

    def wait_until_ready(self) -> None:
        """Block until every actor has loaded its model.

        Raises:
            ValueError: what a constructor refused (a model that cannot be loaded, targets that match nothing).
        """
        with _plain_errors():
            ready = [worker.use.remote(self.publish()) for worker in self._workers]
            ray.get([*ready, *(scorer.load.remote() for scorer in self._scorers)])

    def publish(self) -> ray.ObjectRef[Adapter]:
        """Put the learner's current adapter into the object store; workers fetch it by this reference."""
        return self._learner.adapter.remote()

    def publish_evaluation(self) -> ray.ObjectRef[Adapter]:
        """The same for held-out samples: the adapter's average."""
        return self._learner.evaluation_adapter.remote()

    def generate(
        self, step: int, prompts: Sequence[Prompt], adapter: ray.ObjectRef[Adapter]
    ) -> list[ray.ObjectRef[RolloutGroup]]:
        """One reference for each prompt's group, dealt out among the workers at once."""
        return [self._next_worker().generate.remote(step, prompt, adapter) for prompt in prompts]

    def judge(
        self, group: ray.ObjectRef[RolloutGroup], seed: int, previous: Sequence[Verdict] = ()
    ) -> ray.ObjectRef[list[Verdict]]:
        """Verdicts on one group; asking begins as soon as the group exists. Usable ``previous`` ones are kept."""
        return self._judge.judge.remote(group, seed, previous)

    def score(self, group: ray.ObjectRef[RolloutGroup]) -> list[ray.ObjectRef[list[Verdict]]]:
        """One reference for each scorer's verdicts on one group; scoring begins as soon as the group exists."""
        return [scorer.score.remote(group) for scorer in self._scorers]

    def record(self, step: int, prompt: Prompt, given: Sequence[Verdict]) -> None:
        """Write a scorer's verdicts to the verdicts' file, beside the judge's; returns at once."""
        self._judge.record.remote(step, prompt, given)

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

    def worker_states(self) -> dict[str, str]:
        """What became of each process, e.g. {"rollout-0": "alive, restarted once"}; about a millisecond.

        From Ray's own table: its public state API needs the dashboard, which a run does without.
        """
        from ray._private.state import actors

        table = actors(job_id=ray.JobID.from_hex(ray.get_runtime_context().get_job_id()))
        return {name: _state(table.get(actor._actor_id.hex(), {})) for name, actor in self._named.items()}

    def judge_is_healthy(self) -> bool:
        return ray.get(self._judge.healthy.remote())

    def evaluate(self, prompts: Sequence[Prompt], adapter: ray.ObjectRef[Adapter]) -> Iterator[Sample]:
        """Held-out samples in the order of the prompts."""
        chunks = [list(prompts[i : i + HELDOUT_BATCH]) for i in range(0, len(prompts), HELDOUT_BATCH)]
        for samples in [self._next_worker().evaluate.remote(chunk, adapter) for chunk in chunks]:
            yield from ray.get(samples)

    def update(self, batch: UpdateBatch, step: int) -> UpdateResult:
        return ray.get(self._learner.update.remote(batch, step))

    def learner_state(self) -> dict[str, Any]:
        return ray.get(self._learner.state.remote())

    def load_learner_state(self, state: dict[str, Any]) -> None:
        with _plain_errors():
            ray.get(self._learner.load_state.remote(state))

    def save_adapter(self, folder: Path) -> Path:
        return Path(ray.get(self._learner.save_adapter.remote(str(folder.resolve()))))

    def close_judge(self) -> None:
        ray.get(self._judge.close.remote())

    def _next_worker(self) -> Any:
        self._turn += 1
        return self._workers[self._turn % len(self._workers)]


def _start_judge(judge: Judge | None, endpoints: tuple[str, ...], verdict_path: str) -> Any:
    """The judge client's actor, or the one that only keeps the scorers' verdicts."""
    options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 1000}
    if judge is None:
        scribe: Any = ray.remote(_Scribe).options(**options)
        return scribe.remote(verdict_path)
    actor: Any = ray.remote(_JudgeActor).options(**options)
    return actor.remote(verdict_path, judge, endpoints)


def _state(actor: dict[str, Any]) -> str:
    """One line of Ray's table of actors, in words."""
    state, restarts = _STATES.get(actor.get("State", ""), "starting"), actor.get("NumRestarts", 0)
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


def connect(config: RunConfig) -> bool:
    """Join the announced Ray cluster, or start a local one; True if it is ours to shut down."""
    address = config.placement.ray_address or os.environ.get("RAY_ADDRESS", "")
    if address:
        nobody = ConfigError(
            f"no Ray cluster answers at '{address}' (placement.ray_address or RAY_ADDRESS); start one with `ray start --head`, or leave both empty for a local one"
        )
        if not _listens(address):  # Ray itself goes on trying for minutes
            raise nobody
        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        except ConnectionError as error:
            raise nobody from error
        return False
    place = config.placement
    needed = place.rollout_workers * place.rollout_cpus + place.learner_cpus + len(config.scorers) * place.scorer_cpus
    # Rollout and update take turns on a small machine, so logical CPUs may exceed the real ones.
    cpus = max(os.cpu_count() or 1, int(needed + 0.999))
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    return True
