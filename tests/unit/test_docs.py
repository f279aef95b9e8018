"""The how-tos are tried literally: their files are written, imported, configured, trained with and tested."""

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

import experiments
import grpo_flex.objectives
from grpo_flex.__main__ import main
from grpo_flex.config import RunConfig
from grpo_flex.config_file import from_json, load_experiment, to_json
from grpo_flex.learner import Learner
from grpo_flex.overrides import override
from grpo_flex.rollout import RolloutWorker
from grpo_flex.scorers import score_group
from grpo_flex.types import Prompt, Verdict

PAGE, REWARD = Path("docs/add-an-objective.md"), Path("docs/add-a-reward.md")
MODULE = "grpo_flex.objectives.imitate"


def blocks(language: str, page: Path = PAGE) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


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


@pytest.fixture
def scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same of the page about rewards."""
    made, experiment, _ = blocks("python", REWARD)
    (tmp_path / "sharpness.py").write_text(made, encoding="utf-8")
    monkeypatch.setattr(experiments, "__path__", [*experiments.__path__, str(tmp_path)])
    file = tmp_path / "shapes_sharpness.py"
    file.write_text(experiment, encoding="utf-8")
    yield file
    sys.modules.pop("experiments.sharpness", None)
    if hasattr(experiments, "sharpness"):
        delattr(experiments, "sharpness")


def test_a_reward_and_its_experiment_are_understood(scorer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_experiment(scorer)
    config.validate()
    assert from_json(to_json(config)) == config
    dry, _ = blocks("bash", REWARD)[0].strip().splitlines()
    assert main([str(scorer) if a.endswith(".py") else a for a in dry.split()[3:]]) == 0
    said = capsys.readouterr()
    assert '"most": 0.3' in said.out and "and scores of Sharpness" in said.out and not said.err


def test_a_reward_becomes_an_advantage_beside_the_judges(scorer: Path) -> None:
    config, chance = load_experiment(scorer), np.random.default_rng(0)
    media = [chance.integers(90, 91 + 20 * i, (1, 8, 8, 3), np.uint8) for i in range(4)]
    scores = score_group(config.scorers[0], media, Prompt(id="p", text="a red circle"))
    wins = [Verdict(members=pair, status="ok", winner=0.5) for pair in ((0, 1), (1, 2), (2, 3), (3, 0))]
    rewarded = config.reward(4, [*wins, *scores], "p")
    (advantages,), _ = config.advantage([rewarded])
    assert list(np.argsort(advantages)) == [0, 1, 2, 3]


def test_a_rewards_test_passes(scorer: Path) -> None:
    space: dict[str, Any] = {}
    exec(compile(blocks("python", REWARD)[2], str(REWARD), "exec"), space)
    (test,) = [value for name, value in space.items() if name.startswith("test_")]
    test()
