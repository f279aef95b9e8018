"""What a run reserves of Ray, before any model is loaded: one bundle of a placement group for each process.

``Reservation`` joins the announced cluster or starts a local one, refuses what is not there with the numbers, and says where
each process is to be started. ``cluster.py`` starts them.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from grpo_flex.config import ConfigError, RunConfig
from grpo_flex.room import elsewhere
from grpo_flex.scorers import label

Resources = dict[str, float]
"""What one process asks for, e.g. {"CPU": 1.0, "GPU": 1.0}; without what it does not need."""


class Reservation:
    """A run's place in Ray. A context manager: leaving it gives the place back and leaves Ray, or stops it if it is local.

    Args:
        gpus: those that a local cluster is to have; empty: all that it finds.

    Raises:
        ConfigError: no cluster answers where one is announced, or it does not offer what the run asks for.
    """

    def __init__(self, config: RunConfig, gpus: Sequence[str] = ()) -> None:
        local = connect(config, gpus)
        self.bundles = seats(config)
        """Every process with what it asks for, those that join later too."""
        try:
            self._group = reserve(self.bundles, 0.0 if local else config.placement.wait_s)
            if not local:
                _check_judge(self.bundles, getattr(config.judge, "server", None), elsewhere(config))
        except BaseException:  # a Ctrl-C, too, gives back what was asked for
            ray.shutdown()
            raise
        self._reserved = [name for name, asked in self.bundles.items() if asked]
        """In the order of the group's bundles."""

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *_: object) -> None:
        ray.util.remove_placement_group(self._group)
        ray.shutdown()

    def options(self, name: str) -> dict[str, Any]:
        """Ray's options for a process: its bundle, or, for one that joined, any free place."""
        asked = self.bundles.get(name, {})
        options: dict[str, Any] = {"num_cpus": asked.get("CPU", 0.0), "num_gpus": asked.get("GPU", 0.0)}
        if name not in self._reserved:
            return options
        strategy = PlacementGroupSchedulingStrategy(self._group, self._reserved.index(name))
        return options | {"scheduling_strategy": strategy}

    def room_for_one_more(self, name: str, asked: Resources) -> bool:
        """Whether a node has so much free for a process that joins; if so, it is noted as what it asks for."""
        found = any(_has(free, asked) for free in _free_by_node().values())
        if found:
            self.bundles.setdefault(name, asked)
        return found

    def spell(self, name: str) -> str:
        """What a process asked for, for a person."""
        asked = self.bundles.get(name, {})
        return ", ".join(f"{n:g} {kind}" for kind, n in asked.items()) or "-"


def seats(config: RunConfig) -> dict[str, Resources]:
    """Every process by name with what it asks for, in the order of the reservation."""
    place = config.placement
    learners = dict.fromkeys(learner_names(config), asks(place.learner_cpus, place.learner_gpus))
    workers = [] if place.colocated else worker_names(config)
    rollout = dict.fromkeys(workers, asks(place.rollout_cpus, place.rollout_gpus))
    return learners | rollout | {label(s): asks(place.scorer_cpus, place.scorer_gpus) for s in config.scorers}


def in_all(seats: dict[str, Resources], kind: str) -> float:
    return sum(asked.get(kind, 0.0) for asked in seats.values())


def learner_names(config: RunConfig) -> list[str]:
    count = config.placement.learners
    return ["learner"] if count == 1 else [f"learner-{rank}" for rank in range(count)]


def worker_names(config: RunConfig) -> list[str]:
    return [f"rollout-{i}" for i in range(config.placement.rollout_workers)]


def asks(cpus: float, gpus: float) -> Resources:
    return {kind: float(n) for kind, n in (("CPU", cpus), ("GPU", gpus)) if n}


def reserve(wanted: dict[str, Resources], wait_s: float) -> Any:
    """A placement group with one bundle for each process that asks for something, in the order of ``wanted``.

    Args:
        wait_s: how long an autoscaler may take to start the nodes.

    Raises:
        ConfigError: the cluster does not offer that much, in all or on single nodes.
    """
    complaint = _too_little(wanted)
    bundles = [asked for asked in wanted.values() if asked]
    # What is asked for and not there is what makes an autoscaler start nodes.
    group = placement_group(bundles or [{"CPU": 0.001}], strategy="PACK")
    if not _granted(group, wait_s if complaint else max(RESERVE_S, wait_s)):
        ray.util.remove_placement_group(group)
        if complaint := _too_little(wanted):
            raise ConfigError(complaint)
        free = "; ".join(f"{node}: {_spell(has)}" for node, has in sorted(_free_by_node().items()))
        asked = ", ".join(f"{name} {_spell(ask)}" for name, ask in wanted.items())
        raise ConfigError(
            f"placement cannot be met: no arrangement on these nodes holds {asked} (free: {free}); something else may be "
            "running there; ask for less with placement.*, or wait longer with placement.wait_s"
        )
    return group


def _granted(group: Any, limit_s: float) -> bool:
    """Whether a placement group comes to be in time. Ray waits deaf to signals, so it is asked to for a second at a time."""
    until = time.monotonic() + limit_s
    while not group.wait(max(0.0, min(1.0, until - time.monotonic()))):
        if time.monotonic() >= until:
            return False
    return True


RESERVE_S = 30.0
"""How long Ray may take to reserve what is free."""


def _check_judge(seats: dict[str, Resources], server: Any, address: str) -> None:
    """Refuse a judge that the run would start on its cluster and that has no room beside the run, before anything is loaded.

    Raises:
        ConfigError: the cluster has too little for both.
    """
    asks_of_ray = getattr(server, "asks_of_ray", lambda address, there: [])
    judges = {f"judge-{k}": asked for k, asked in enumerate(asks_of_ray(address, ray.cluster_resources()))}
    if complaint := _too_little(seats | judges) if judges else None:
        raise ConfigError(f"{complaint}, or judge.server.replicas; a cluster that grows: judge.server.wait_s")


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
    return {node_name(addresses[i], i): dict(has) for i, has in free.items() if i in addresses}


def node_name(address: str, node_id: str) -> str:
    """A node's name for a person: several may share an address."""
    return f"{address}/{node_id[:4]}"


def _has(free: Resources, asked: Resources) -> bool:
    return all(free.get(kind, 0.0) >= n for kind, n in asked.items())


def _spell(resources: Resources) -> str:
    return " ".join(f"{resources.get(kind, 0.0):g} {kind}" for kind in ("CPU", "GPU") if kind in resources) or "nothing"


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
    if address := elsewhere(config):
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
