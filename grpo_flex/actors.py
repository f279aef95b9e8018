"""What runs inside Ray's actors: thin shells around workers, learners, scorers and the judge client.

Models are loaded on first use, so that a failure is an ordinary error of a call. Calls whose fate the driver follows
give two objects: a receipt, which it reads, and the result, which stays in the object store.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray
from ray.exceptions import ObjectLostError

from grpo_flex import verdicts
from grpo_flex.broadcast import Broken, Circle, Member
from grpo_flex.config import Judge, RunConfig
from grpo_flex.endpoints import EndpointState
from grpo_flex.generators.memory import grow_segments
from grpo_flex.judging import JudgeClient
from grpo_flex.learner import Learner
from grpo_flex.ranks import Ranks
from grpo_flex.rollout import RolloutWorker
from grpo_flex.scorers import score_group
from grpo_flex.types import (
    Adapter,
    GroupMedia,
    Prompt,
    Role,
    RolloutGroup,
    Sample,
    UpdateBatch,
    UpdateResult,
    Verdict,
)
from grpo_flex.weights import Parcel

T = TypeVar("T")

GIVE_WAY = 4
"""Niceness of workers that sample ahead, on top of Ray's 15: where they share cores with the learner, it is the one
that is waited for."""

_two: Any = ray.method(num_returns=2)
"""Marks a call that gives a receipt and a result; untyped, because outside of Ray it is an ordinary method."""


class RolloutActor:
    def __init__(self, config: RunConfig, device: str, name: str) -> None:
        _see_gpus(device != "cpu")
        self.config, self.device, self.name = config, device, name
        self.member = Member(device)
        if config.sampling.lookahead:
            os.nice(GIVE_WAY)

    @cached_property
    def worker(self) -> RolloutWorker:
        return RolloutWorker(self.config, self.device, self.name)

    def ready(self) -> None:
        """Returns when the model is loaded."""
        _ = self.worker

    @_two
    def prepare(self, prompts: Sequence[Prompt]) -> tuple[int, None]:
        """Refuse what the model could not take, and encode ahead what is kept on disk."""
        self.worker.model.prepare(prompts)
        return len(prompts), None

    @_two
    def together(self) -> tuple[float, tuple[int, int]]:
        """How many prompts one call of ``generate``, and one of ``evaluate``, is to have."""
        return 0.0, (self.worker.together, self.worker.heldout_together)

    def generate(self, step: int, prompts: Sequence[Prompt], adapter: Adapter) -> tuple[float | GroupMedia, ...]:
        """(seconds that it took, then for each prompt: its group's media, its group without them).

        Raises:
            ValueError: an adapter of another age than ``sampling.lookahead`` says.
        """
        _check_age(step - adapter.version, self.config.sampling.lookahead, f"step {step + 1} is to be sampled with")
        return _timed(self.worker.generate_together(step, prompts, adapter))

    @_two
    def evaluate(self, prompts: Sequence[Prompt], adapter: Adapter) -> tuple[int, list[Sample]]:
        return len(prompts), self.worker.evaluate(prompts, adapter)

    def receive(self, circle: Circle, rank: int, version: int, role: Role) -> str:
        """Take over the weights that rank 0 of the circle sends: what went wrong, or nothing."""
        try:
            self.worker.receive(version, role, partial(self.member.receive, circle, rank))
        except Broken as error:
            return str(error)
        return ""


class LearnerActor:
    """One of the learners. ``join`` comes first where there are several."""

    def __init__(self, config: RunConfig, device: str, rank: int = 0) -> None:
        _see_gpus(device != "cpu")
        self.config, self.device = config, device
        self.ranks = Ranks(rank, config.placement.learners, device)
        self.member = Member(device)

    @cached_property
    def learner(self) -> Learner:
        return Learner(self.config, self.device, self.ranks)

    def address(self) -> str:
        """Where rank 0 will wait for the others: "host:port"."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def join(self, address: str) -> None:
        self.ranks.join(address, self.config.placement.update_timeout_s)

    def ready(self) -> None:
        """Returns when the model is loaded."""
        _ = self.learner

    def begin(self, batch: UpdateBatch, of: int, step: int) -> None:
        """A head start on the update of ``of`` groups, with the first ones of them."""
        own = self.learner.to_begin(len(batch.groups), of)  # not what earlier calls have fetched
        with suppress(ObjectLostError):  # the update needs them too, and says so
            self.learner.begin(self._fetch(batch, own, self.learner.sharded), batch.advantages, of, step)

    @_two
    def update(self, batch: UpdateBatch, step: int) -> tuple[UpdateResult, dict[str, Any] | None]:
        """(result, rank 0's state after it)."""
        own = sorted({i for share in self.learner.shares(len(batch.groups)) for i in [*share.own, *share.filling]})
        result = self.learner.update(self._fetch(batch, own, True), batch.advantages, step)
        return result, self.state() if self.config.adapter.state_each_step else None

    def _fetch(self, batch: UpdateBatch, own: Sequence[int], alike: bool) -> dict[int, RolloutGroup]:
        """The groups of those indices.

        Args:
            alike: the ranks are about to compute together, so if one of them misses a group, all have to raise.

        Raises:
            ObjectLostError: a group is lost with its node. Nothing has been computed.
        """
        found, lost = _get([batch.groups[i] for i in own])
        for name in filter(None, self.ranks.gather(lost) if alike else [lost]):
            raise ObjectLostError(name, None, "")
        groups = dict(zip(own, found, strict=True))
        for group in groups.values():
            behind = self.learner.version - group.policy_version
            _check_age(behind, self.config.sampling.lookahead, f"version {self.learner.version} is to learn from")
        return groups

    @_two
    def adapter(self, role: Role) -> tuple[int, Adapter | None]:
        """(version, rank 0's adapter for sampling, evaluation, or the base model)."""
        learner = self.learner
        made = {"sampling": learner.adapter, "evaluation": learner.evaluation_adapter, "base": learner.base_adapter}
        adapter = self._of_rank_0(made[role])
        return learner.version, adapter and replace(adapter, tensors=Parcel(adapter.tensors))

    def version(self) -> int:
        return self.learner.version

    def listen(self) -> str:
        """Where receivers meet this process: "host:port"."""
        return f"{ray.util.get_node_ip_address()}:{self.member.listen()}"

    def send(self, circle: Circle, role: Role) -> str:
        """Broadcast rank 0's weights of that role to the circle: what went wrong, or nothing."""
        learner, values = self.learner, self.learner.each(role)
        try:
            if self.ranks.rank == 0:
                self.member.send(circle, learner.whole.held(), values)
        except Broken as error:
            return str(error)
        finally:
            if learner.weights.split:  # all ranks put every tensor together, whoever is there to receive it
                deque(values, maxlen=0)
        return ""

    def state(self) -> dict[str, Any] | None:
        """Rank 0's."""
        state = self._of_rank_0(self.learner.state)
        return state and Parcel(state)

    def _of_rank_0(self, make: Callable[[], T]) -> T | None:
        """Others take part where weights are split between them, and keep nothing."""
        made = make() if self.ranks.rank == 0 or self.learner.weights.split else None
        return made if self.ranks.rank == 0 else None

    def load_state(self, state: dict[str, Any]) -> None:
        self.learner.load_state(state)

    def adapter_files(self) -> dict[str, bytes]:
        """What ``save_adapter`` writes, by name: the run's directory need not be there on this node."""
        with tempfile.TemporaryDirectory() as folder:
            self._of_rank_0(lambda: self.learner.save_adapter(Path(folder)))
            files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
            return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class ColocatedActor(LearnerActor):
    """A learner that is a rollout worker too. Weights stay where they are; each task lends the adapter that it needs."""

    @cached_property
    def worker(self) -> RolloutWorker:
        return RolloutWorker(self.config, self.device, f"learner-{self.ranks.rank}", self.learner.model)

    @_two
    def prepare(self, prompts: Sequence[Prompt]) -> tuple[int, None]:
        """Refuse what the model could not take, and encode ahead what is kept on disk."""
        self.worker.model.prepare(prompts)
        return len(prompts), None

    @_two
    def together(self) -> tuple[float, tuple[int, int]]:
        return 0.0, (self.worker.together, self.worker.heldout_together)

    def generate(self, step: int, prompts: Sequence[Prompt], adapter: Adapter) -> tuple[float | GroupMedia, ...]:
        with self._holding(adapter):
            return _timed(self.worker.generate_together(step, prompts, adapter))

    @_two
    def evaluate(self, prompts: Sequence[Prompt], adapter: Adapter) -> tuple[int, list[Sample]]:
        with self._holding(adapter):
            return len(prompts), self.worker.evaluate(prompts, adapter)

    @_two
    def adapter(self, role: Role) -> tuple[int, Adapter]:
        """(version, an adapter without tensors: every process has its own)."""
        return self.learner.version, Adapter(version=self.learner.version, tensors={}, role=role)

    @contextmanager
    def _holding(self, adapter: Adapter) -> Iterator[None]:
        """The shared model holds the adapter, and torch the threads that sampling is to have."""
        import torch

        _check_age(self.learner.version - adapter.version, 0, f"version {self.learner.version} is to sample with")
        worker, place = self.worker, self.config.placement
        worker.loaded = (adapter.version, adapter.role)
        torch.set_num_threads(place.threads_per_worker)
        try:
            with self.learner.lending(adapter.role):
                yield
        finally:
            torch.set_num_threads(place.learner_threads)


class ScorerActor:
    def __init__(self, scorer: Any, threads: int, gpus: float) -> None:
        _see_gpus(gpus > 0)
        import torch

        torch.set_num_threads(threads)
        self.scorer = scorer

    def load(self) -> None:
        _ = self._loaded

    @cached_property
    def _loaded(self) -> None:
        load: Any = getattr(self.scorer, "load", None)
        if load is not None:
            load()

    def score(self, group: GroupMedia) -> list[Verdict]:
        self.load()  # one that Ray has started again was not asked to
        return score_group(self.scorer, group.media_G, group.prompt)


class Scribe:
    """Keeps the verdicts' file, which has one writer; all that a run without a judge needs of the judge's actor."""

    def __init__(self, verdict_path: str) -> None:
        self.log = verdicts.VerdictLog(verdict_path)

    async def record(self, step: int, prompt: Prompt, given: Sequence[Verdict]) -> None:
        for verdict in given:
            self.log.add(step + 1, prompt.id, prompt.text, verdict)
        self.log.flush()

    async def report(self) -> dict[str, float]:
        """Figures since the last call; what was said until then is in the file."""
        self.log.sync()
        return {}

    async def states(self) -> list[EndpointState]:
        return []

    async def close(self) -> None:
        self.log.flush()


class JudgeActor(Scribe):
    """The judge client in an event loop of its own: one connection pool for the whole run."""

    def __init__(self, verdict_path: str, judge: Judge, endpoints: tuple[str, ...], api_key: str) -> None:
        self.client = JudgeClient(judge, verdict_path, endpoints, api_key)
        self.log = self.client.log

    async def judge(self, group: GroupMedia, seed: int, previous: Sequence[Verdict] = ()) -> list[Verdict]:
        return await self.client.judge(group, seed, previous)

    async def compare(
        self, prompt: Prompt, step: int, seed: int, one: np.ndarray, two: np.ndarray, about: str
    ) -> list[Verdict]:
        return await self.client.compare(prompt, step, seed, one, two, about)

    async def healthy(self) -> bool:
        return await self.client.wait_until_healthy(0.0, heartbeat=lambda _: None)

    async def report(self) -> dict[str, float]:
        self.log.sync()
        return self.client.counters() | await self.client.cache_hit_rates()

    async def states(self) -> list[EndpointState]:
        return self.client.states()

    async def close(self) -> None:
        await self.client.close()


def _see_gpus(own: bool) -> None:
    """Before torch looks for GPUs: Ray leaves all of them visible to an actor that asked for none.

    Args:
        own: whether this actor has asked for some.
    """
    if own:
        grow_segments()
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _timed(groups: Sequence[RolloutGroup]) -> tuple[float | GroupMedia, ...]:
    return sum(group.seconds for group in groups), *(part for group in groups for part in group.parted())


def _get(refs: Sequence[Any]) -> tuple[list[Any], str]:
    """All of them, or the id of one that is lost."""
    try:
        return ray.get(list(refs)), ""
    except ObjectLostError as error:
        return [], error.object_ref_hex


def _check_age(updates: int, bound: int, what: str) -> None:
    if not 0 <= updates <= bound:
        raise ValueError(
            f"{what} an adapter that is {updates} updates old, but sampling.lookahead={bound} allows 0 to {bound}; "
            "this is a fault of the program, not of the configuration"
        )
