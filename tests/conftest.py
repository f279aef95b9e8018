"""Shared fixtures. Tests never reach for a hub, a W&B server or a GPU unless marked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if "PYTEST_XDIST_WORKER" in os.environ:  # two processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of one would wait for the other's
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's workers, 15 nicer than others by default, would starve

import pytest

from grpo_flex.config import RunConfig
from tests.configs import tiny_config


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random tiny FLUX and prompts, made once."""
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture
def config(tiny_folder: Path) -> RunConfig:
    return tiny_config(tiny_folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none here")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One process does all whole runs, which take most of the time and would only be in each other's way; others the rest."""
    from xdist.scheduler import LoadScopeScheduling

    class WholeRunsApart(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "whole runs" if "/integration/" in file else file

    return WholeRunsApart(config, log)
