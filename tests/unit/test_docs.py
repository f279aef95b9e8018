"""The how-to for objectives is tried literally: its files are written, imported, configured, trained with and tested."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import grpo_flex.objectives
from grpo_flex.__main__ import main
from grpo_flex.config import RunConfig
from grpo_flex.config_file import from_json, load_experiment, to_json
from grpo_flex.learner import Learner
from grpo_flex.overrides import override
from grpo_flex.rollout import RolloutWorker
from grpo_flex.types import Prompt

PAGE = Path("docs/add-an-objective.md")
MODULE = "grpo_flex.objectives.imitate"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page's objective where the page says, as far as imports can tell; gives the experiment's file."""
    objective, experiment, _ = blocks("python")
    (tmp_path / "imitate.py").write_text(objective, encoding="utf-8")
    monkeypatch.setattr(grpo_flex.objectives, "__path__", [*grpo_flex.objectives.__path__, str(tmp_path)])
    file = tmp_path / "shapes_imitate.py"
    file.write_text(experiment, encoding="utf-8")
    yield file
    sys.modules.pop(MODULE, None)
    if hasattr(grpo_flex.objectives, "imitate"):
        delattr(grpo_flex.objectives, "imitate")


def test_it_is_short() -> None:
    assert len(blocks("python")[0].splitlines()) < 60


def test_the_experiment_is_valid_and_survives_json(written: Path) -> None:
    config = load_experiment(written)
    config.validate()
    assert from_json(to_json(config)) == config
    assert override(config, ["objective.draws=4"]).objective.passes(Any) == 4  # pyright: ignore[reportArgumentType]


def test_the_commands_are_understood(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dry, _ = blocks("bash")[0].strip().splitlines()
    arguments = [str(written) if a.endswith(".py") else a for a in dry.split()[3:]]
    assert main(arguments) == 0 and "Traceback" not in capsys.readouterr().err


def test_the_learner_takes_it(written: Path, config: RunConfig) -> None:
    theirs = load_experiment(written)
    sampling = replace(
        config.sampling, dynamics=theirs.sampling.dynamics, solver=theirs.sampling.solver, same_noise=False
    )
    config = replace(config, objective=theirs.objective, sampling=sampling)
    config.validate()
    learner = Learner(config)
    group = RolloutWorker(config).generate(0, Prompt(id="p", text="a red circle"), learner.adapter())
    errors = [
        learner.update([group], [np.array([1.0, -1.0, 1.0, -1.0])], 0).metrics["policy/matching_error"]
        for _ in range(3)
    ]
    assert errors[-1] < errors[0]


def test_its_test_passes(written: Path) -> None:
    space: dict[str, Any] = {}
    exec(compile(blocks("python")[2], str(PAGE), "exec"), space)
    importlib.import_module(MODULE)
    (test,) = [value for name, value in space.items() if name.startswith("test_")]
    test()
