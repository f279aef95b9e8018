"""What several files of integration tests compare with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster as Raylets

from grpo_flex.__main__ import main
from tests.configs import tiny_config
from tests.integration.processes import experiment_file


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps that was never stopped."""
    folder = tmp_path_factory.mktemp("straight")
    assert main(["train", experiment_file(tiny_config(folder, steps=4), folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def head() -> Iterator[str]:
    """The address of a Ray cluster of one node, which outlives its runs: joining it takes a fraction of starting one."""
    node = Raylets(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    yield str(node.address)
    node.shutdown()


@pytest.fixture
def joining(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that name no cluster join that one."""
    monkeypatch.setenv("RAY_ADDRESS", head)
