"""Replicas as actors of a real Ray cluster; vLLM itself is a stand-in."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import ray

from reward_server import machine
from tests.fake_vllm import fake_judge, living, pids

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of one node without GPUs."""
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def test_replicas_are_actors_and_leave_nothing(address: str, tmp_path: Path) -> None:
    """The run's own process keeps its Ray session; a `serve` process beside it has the actors."""
    with fake_judge(tmp_path, ray_address=address, replicas=2).start(tmp_path / "logs") as judge:
        first, second = (urlsplit(url).port or 0 for url in judge.endpoints)
        assert second == first + 1  # so that a start at the first one's port gives the same two
        assert judge.alive() and judge.reserved == ("-", "-")
        for url in judge.endpoints:
            assert b"UnifiedReward" in machine.get(url + "/models")
        assert len(living(pids(tmp_path))) == 6
    assert living(pids(tmp_path), 15) == [] and not judge.alive()


def test_a_killed_serve_process_takes_the_actors_and_what_they_reserved_along(address: str, tmp_path: Path) -> None:
    judge = fake_judge(tmp_path, ray_address=address, cpu_threads=1).start(tmp_path / "logs")
    assert judge.reserved == ("1 CPU",) and ray.available_resources().get("CPU", 0) == 0
    os.kill(judge.pid, signal.SIGKILL)  # its keeper
    assert living(pids(tmp_path), 30) == []
    judge.stop()
    until = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < 1:
        assert time.monotonic() < until
        time.sleep(0.1)


def test_what_cannot_be_placed_is_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 replicas × 1 GPUs each need 1 GPUs, and the Ray cluster has 0 free"):
        fake_judge(tmp_path, ray_address=address, device="gpu").start(tmp_path / "logs")
    with pytest.raises(ValueError, match="2 replicas × 1 CPUs each need 2 CPUs, and the Ray cluster has 1 free"):
        fake_judge(tmp_path, ray_address=address, cpu_threads=1, replicas=2).start(tmp_path / "logs")
    with pytest.raises(ValueError, match="OutOfMemoryError: not enough of it"):
        fake_judge(tmp_path, "crash", ray_address=address).start(tmp_path / "logs")
    assert living(pids(tmp_path), 15) == []


def test_no_cluster_at_the_address(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no Ray cluster answers at '127\.0\.0\.1:1'"):
        fake_judge(tmp_path, ray_address="127.0.0.1:1").start(tmp_path / "logs")
