"""Shared fixtures. Tests never reach for a hub, a W&B server or a GPU unless marked."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

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


GPU_TESTS = Path(__file__).parent / "gpu"


def pytest_configure(config: pytest.Config) -> None:
    """Hides GPUs, from child processes too, where other tests run than theirs: those are about the CPU, bit for bit."""
    asked = [Path(argument.partition("::")[0]).resolve() for argument in config.args]
    if not all(GPU_TESTS in (path, *path.parents) for path in asked):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        why = "needs a CUDA device, and torch sees none here; where there is one: pytest tests/gpu, without other tests"
        skip = pytest.mark.skip(reason=why)
        for item in items:
            if item.get_closest_marker("gpu"):  # not its keywords, which have the names of the folders above it
                item.add_marker(skip)
