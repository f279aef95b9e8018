"""What several files of integration tests compare with."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo_flex.__main__ import main
from tests.configs import tiny_config
from tests.integration.processes import experiment_file

HEAD = """
import sys
from ray.cluster_utils import Cluster
node = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
print(node.address, flush=True)
sys.stdin.read()
node.shutdown()
"""


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps that was never stopped."""
    folder = tmp_path_factory.mktemp("straight")
    assert main(["train", experiment_file(tiny_config(folder, steps=4), folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def head() -> Iterator[str]:
    """The address of a Ray cluster of one node, which outlives its runs: joining it takes a fraction of starting one.

    In a process of its own, because a test that shuts its Ray down takes along what the same process has started.
    """
    with subprocess.Popen(
        [sys.executable, "-c", HEAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as node:
        assert node.stdin and node.stdout
        yield node.stdout.readline().strip()
        node.stdin.close()


@pytest.fixture(autouse=True)
def swept() -> Iterator[None]:
    """No actor's handle outlives its test: the next cluster's actors may have the same ids, and would end with the handle."""
    yield
    gc.collect()


@pytest.fixture
def joining(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that name no cluster join that one."""
    monkeypatch.setenv("RAY_ADDRESS", head)
