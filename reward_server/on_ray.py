"""Replicas as Ray actors: one vLLM server each, on whatever node has its GPUs, in a placement group of their own.

The actor is only a keeper's parent: when the actor, its node's Ray or the process that made it goes, so does vLLM.
Every node needs the repository and the judge's environment under the same path. The API key travels as an
argument, never in Ray's runtime environment, which its dashboard shows.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reward_server import machine
from reward_server.serve import Replica, Revivals, VllmJudge, end_of_log, tensor_parallel


class ReplicaActor:
    """Runs inside Ray; one replica on its node."""

    def __init__(self) -> None:
        self.replica: Replica | None = None

    def first_port(self, host: str, count: int) -> int:
        """The first of ``count`` consecutive ports that are free on its node."""
        return machine.free_ports(host, 0, count)

    def has_free(self, host: str, port: int) -> bool:
        """Whether nobody uses the port on its node."""
        try:
            return machine.free_ports(host, port, 1) == port
        except ValueError:
            return False

    def start(self, judge: VllmJudge, key: str, on_gpu: bool, port: int, log: str) -> str:
        """Starts the server and returns its endpoint when it answers. Ray has set CUDA_VISIBLE_DEVICES."""
        import ray

        address = ray.util.get_node_ip_address()
        self.replica = Replica(judge, key, on_gpu, (), port, Path(log), address)
        self.replica.wait(time.monotonic() + judge.start_s)
        return self.replica.endpoint

    def loss(self) -> str:
        """What happened if the server has ended, else nothing."""
        kept = self.replica.kept if self.replica else None
        if kept is None or kept.alive():
            return ""
        return f"has ended with status {kept.status}; {end_of_log(kept.log)}"

    def again(self) -> None:
        """Starts the server once more where it was; does not wait."""
        if self.replica:
            self.replica.again()

    def stop(self) -> None:
        if self.replica:
            self.replica.kept.stop()


class RayJudge:
    """The replicas of one judge on a Ray cluster; ends with ``stop()`` or with this process.

    Raises:
        ValueError: no Ray here, no cluster at the address, too few GPUs, or a replica that does not come up.
    """

    def __init__(self, judge: VllmJudge, log_dir: Path) -> None:
        self._ray = connect(judge.ray)
        try:
            on_gpu = self._on_gpu(judge)
            self._group = self._reserve(judge, asked := asks(judge, on_gpu))
            self._check_reachable(judge)  # once more: there may be more nodes now
        except BaseException:
            self._ray.shutdown()
            raise
        self.reserved = (", ".join(f"{n:g} {kind}" for kind, n in asked.items()) or "-",) * judge.replicas
        self._revivals = Revivals(judge.replicas)
        self._actors = [self._seated(k, asked) for k in range(judge.replicas)]
        try:
            first = judge.port or self._first_port(judge)
            starting = [
                actor.start.remote(judge, judge.key, on_gpu, first + k, str((log_dir / f"judge_{k}.log").absolute()))
                for k, actor in enumerate(self._actors)
            ]
            self.endpoints: tuple[str, ...] = tuple(self._ray.get(starting, timeout=judge.start_s + 60))
        except BaseException as error:
            self.stop()
            raise _plain(error) from error

    def _on_gpu(self, judge: VllmJudge) -> bool:
        """Whether the replicas go on GPUs. Raises ValueError where they could not be reached."""
        self._check_reachable(judge)
        return on_gpu(judge, self._ray.cluster_resources())

    def _check_reachable(self, judge: VllmJudge) -> None:
        nodes = [n for n in self._ray.nodes() if n["Alive"]]
        if len(nodes) > 1 and machine.is_loopback(judge.host):
            raise ValueError(
                f"the Ray cluster has {len(nodes)} nodes, and replicas that listen on {judge.host} cannot be reached from "
                f"another: give --host 0.0.0.0 and an API key in {judge.api_key_env}"
            )

    def _reserve(self, judge: VllmJudge, asked: dict[str, float]) -> Any:
        """A placement group with a bundle for each replica, on as many nodes as possible; None if they ask for nothing."""
        if not asked:
            return None
        from ray.util.placement_group import placement_group, remove_placement_group

        (kind, each), *_ = asked.items()
        free, needed = self._ray.available_resources().get(kind, 0), judge.replicas * each
        wait_s = judge.wait_s if free < needed else max(RESERVE_S, judge.wait_s)
        # What is asked for and not there is what makes an autoscaler start nodes.
        group = placement_group([asked] * judge.replicas, strategy="SPREAD")
        until = time.monotonic() + wait_s
        # Ray waits deaf to signals, so it is asked to for a second at a time.
        while not (there := group.wait(max(0.0, min(1.0, until - time.monotonic())))) and time.monotonic() < until:
            pass
        if not there:
            remove_placement_group(group)
            whose = f"{free:g} free" if free < needed else f"{free:g} free, but not so many together on single nodes"
            raise ValueError(
                f"{judge.replicas} replicas × {each:g} {kind}s each need {needed:g} {kind}s, and the Ray cluster has {whose}: "
                "fewer replicas, a smaller tensor parallel size, or --wait-s for a cluster that grows"
            )
        return group

    def _seated(self, k: int, asked: dict[str, float]) -> Any:
        """The actor of replica ``k``, in its bundle."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        where = PlacementGroupSchedulingStrategy(self._group, k) if self._group else "SPREAD"
        make: Any = self._ray.remote(ReplicaActor)
        return make.options(
            num_cpus=asked.get("CPU", 0), num_gpus=asked.get("GPU", 0), scheduling_strategy=where
        ).remote()

    def _first_port(self, judge: VllmJudge) -> int:
        """The first replica's port where nobody chose it; the next ones are free on the nodes of the others.

        So they are consecutive as on one machine: started again at the first one's, all come back as they were.
        """
        for _ in range(20):
            first = self._ray.get(
                self._actors[0].first_port.remote(judge.host, judge.replicas), timeout=judge.start_s + 60
            )
            asked = [actor.has_free.remote(judge.host, first + k) for k, actor in enumerate(self._actors)]
            if all(self._ray.get(asked, timeout=judge.start_s + 60)):
                return first
        raise ValueError(
            f"no {judge.replicas} consecutive ports were found that are free on the replicas' nodes: give the first one with "
            "--port"
        )

    def alive(self) -> bool:
        return bool(self._revivals.left())

    def tend(self) -> list[str]:
        """Start replicas again that have ended by themselves; a text for each that has ended.

        One whose actor is gone, with its node, would come up at another address, which nobody asks: it is given up.
        """
        found = []
        for k in self._revivals.left():
            why, there = self._loss(self._actors[k])
            if why and there and self._revivals.take(k):
                self._actors[k].again.remote()
                found.append(f"replica {k} is started again: it {why}")
            elif why:
                self._revivals.give_up(k)
                found.append(f"replica {k} {why}")
        return found

    def _loss(self, actor: Any) -> tuple[str, bool]:
        """What happened to a replica, or nothing, and whether its actor is there."""
        try:
            return self._ray.get(actor.loss.remote(), timeout=30), True
        except self._ray.exceptions.GetTimeoutError:
            return "", True  # a busy cluster is no loss
        except self._ray.exceptions.RayError as error:
            return f"has lost its actor: {str(error).strip().splitlines()[0]}", False

    def stop(self) -> None:
        """Stops every server, then the actors and this process's part in the cluster."""
        stopping = [actor.stop.remote() for actor in self._actors]
        self._ray.wait(stopping, num_returns=len(stopping), timeout=30)
        for actor in self._actors:
            self._ray.kill(actor)  # also one that is still starting: its keeper notices
        self._ray.shutdown()


RESERVE_S = 30.0
"""How long Ray may take to reserve what is free."""


def on_gpu(judge: VllmJudge, there: Mapping[str, float]) -> bool:
    """Whether replicas go on GPUs, on a cluster that has so much in all."""
    return judge.device == "gpu" or (judge.device == "auto" and "GPU" in there)


def asks(judge: VllmJudge, on_gpu: bool) -> dict[str, float]:
    """What one replica reserves. On a CPU only what ``cpu_threads`` says: vLLM's own choice is known to nobody else."""
    cpus = {"CPU": float(judge.cpu_threads)} if judge.cpu_threads else {}
    return {"GPU": float(tensor_parallel(judge))} if on_gpu else cpus


def connect(address: str) -> Any:
    """The ``ray`` module, connected. Raises ValueError with the way out."""
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ValueError(
            f"replicas on the Ray cluster {address!r} need Ray, which this Python does not have: use the trainer's "
            "(.venv/bin/python -m reward_server serve …), or --ray-address none"
        ) from error
    try:
        _knock(address)
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except OSError as error:
        raise ValueError(
            f"no Ray cluster answers at {address!r} (--ray-address or RAY_ADDRESS): start one with `ray start --head`, "
            "or give --ray-address none"
        ) from error
    return ray


def _knock(address: str) -> None:
    """Raises OSError where nobody listens, at once: Ray itself tries for minutes and then ends the process."""
    host, _, port = address.rpartition(":")
    if port.isdigit():  # "auto" and the like are Ray's to find
        with socket.create_connection((host.removeprefix("ray://").strip("[]"), int(port)), timeout=10):
            pass


def _plain(error: BaseException) -> BaseException:
    """A user's message out of what Ray wraps around it."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, ValueError):
        return ValueError(str(cause))
    if type(error).__name__ == "GetTimeoutError":
        return ValueError("the replicas did not come up in time (start_s): has the cluster room for them?")
    return error
