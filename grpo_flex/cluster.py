"""Ray placement, and nothing else: which actor sits where, and how work reaches it.

The driver holds references and scalars; media, latents and adapters stay in Ray's object store.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from grpo_flex import verdicts
from grpo_flex.config import ConfigError, RunConfig
from grpo_flex.judging import JudgeClient
from grpo_flex.learner import Learner
from grpo_flex.rollout import HELDOUT_BATCH, RolloutWorker
from grpo_flex.types import Adapter, Prompt, RolloutGroup, Sample, UpdateBatch, UpdateResult, Verdict


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

    def state(self) -> dict[str, Any]:
        return self.learner.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.learner.load_state(state)

    def save_adapter(self, folder: str) -> str:
        return str(self.learner.save_adapter(Path(folder)))


class _JudgeActor:
    """The judge client in an event loop of its own: one connection pool for the whole run."""

    def __init__(self, config: RunConfig, endpoints: tuple[str, ...], verdict_path: str) -> None:
        self.client = JudgeClient(config.judge, verdict_path, endpoints)

    async def judge(self, group: RolloutGroup, seed: int, previous: Sequence[Verdict] = ()) -> list[Verdict]:
        return await self.client.judge(group, seed, previous)

    async def healthy(self) -> bool:
        return await self.client.wait_until_healthy(0.0, heartbeat=lambda _: None)

    async def counters(self) -> dict[str, float]:
        return self.client.counters()

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
        judge: Any = ray.remote(_JudgeActor).options(num_cpus=0, max_concurrency=1000)
        self._judge: Any = judge.remote(config, endpoints, str((run_dir / verdicts.FILE_NAME).resolve()))
        self._turn = 0

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in (*self._workers, self._learner, self._judge):
            ray.kill(actor)
        if self._local:
            ray.shutdown()

    def _check_resources(self) -> None:
        place, there = self.config.placement, ray.cluster_resources()
        for kind, rollout, learner in (
            ("CPU", place.rollout_cpus, place.learner_cpus),
            ("GPU", place.rollout_gpus, place.learner_gpus),
        ):
            needed = place.rollout_workers * rollout + learner
            if needed > there.get(kind, 0):
                raise ConfigError(
                    f"placement needs {needed:g} {kind}s ({place.rollout_workers} rollout workers × {rollout:g} + learner {learner:g}), "
                    f"but the Ray cluster has {there.get(kind, 0):g}; lower placement.rollout_workers or placement.*_{kind.lower()}s"
                )

    def wait_until_ready(self) -> None:
        """Block until every actor has loaded its model.

        Raises:
            ValueError: what a constructor refused (a model that cannot be loaded, targets that match nothing).
        """
        with _plain_errors():
            ray.get([w.use.remote(self.publish()) for w in self._workers])

    def publish(self) -> ray.ObjectRef[Adapter]:
        """Put the learner's current adapter into the object store; workers fetch it by this reference."""
        return self._learner.adapter.remote()

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

    def judge_counters(self) -> dict[str, float]:
        """``judge/…`` figures of the client since the last call: requests, retries, cache hits."""
        return ray.get(self._judge.counters.remote())

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


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What an actor refused as a ValueError, without Ray's trace around it."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise ValueError(str(error.cause)) from error
        raise


def connect(config: RunConfig) -> bool:
    """Join the announced Ray cluster, or start a local one; True if it is ours to shut down."""
    address = config.placement.ray_address or os.environ.get("RAY_ADDRESS", "")
    if address:
        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        except ConnectionError as error:
            raise ConfigError(
                f"no Ray cluster answers at '{address}' (placement.ray_address or RAY_ADDRESS); start one with `ray start --head`, or leave both empty for a local one"
            ) from error
        return False
    place = config.placement
    needed = place.rollout_workers * place.rollout_cpus + place.learner_cpus
    # Rollout and update take turns on a small machine, so logical CPUs may exceed the real ones.
    cpus = max(os.cpu_count() or 1, int(needed + 0.999))
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    return True
