"""What several files of integration tests compare with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from grpo_flex.__main__ import main
from tests.configs import tiny_config
from tests.integration.processes import experiment_file


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps with two workers that was never stopped."""
    folder = tmp_path_factory.mktemp("straight")
    config = tiny_config(folder, steps=4)
    config = replace(config, placement=replace(config.placement, rollout_workers=2))
    assert main(["train", experiment_file(config, folder)]) == 0
    return folder
