"""`grpo_flex evaluate` with a named adapter: what it scores is that adapter, in the shape that its file says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from grpo_flex import rollout
from grpo_flex.__main__ import main
from grpo_flex.config import Adapter, Placement, RunConfig
from grpo_flex.evaluate import evaluate, mean_scores
from grpo_flex.learner import Learner
from grpo_flex.prompts import read_prompts
from grpo_flex.rollout import UNTRAINED, RolloutWorker
from tests.integration.processes import experiment_file
from tests.invariants.test_learning import nudged


def test_a_named_adapter_is_scored_beside_the_base_model(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The experiment says another rank and alpha than the adapter has."""
    trained = replace(config, adapter=Adapter(rank=2, alpha=16))
    learner = Learner(trained)
    adapter, folder = nudged(learner, 0.3), learner.save_adapter(tmp_path / "adapter").parent
    worker, heldout = RolloutWorker(trained), read_prompts(config.prompts.heldout, "prompts.heldout")
    base, tuned = (mean_scores(worker.evaluate(heldout, one))["oracle"] for one in (UNTRAINED, adapter))
    assert f"{base:.3f}" != f"{tuned:.3f}"

    words = ["evaluate", "--experiment", experiment_file(config, tmp_path), "--out", str(tmp_path / "grid.png")]
    assert main([*words, "--adapter", str(folder)]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "oracle" in line)
    assert f"{base:.3f}" in row and f"{tuned:.3f}" in row and f"{tuned - base:+.3f}" in row
    assert (tmp_path / "grid.png").stat().st_size > 0

    assert main([*words, "--adapter", str(tmp_path / "elsewhere")]) == 2
    assert "no adapter at" in capsys.readouterr().err
    assert main(["evaluate", "--adapter", str(folder)]) == 2
    assert "with --experiment FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("placement", "device"),
    [
        (Placement(colocated=True, learner_gpus=1.0), "cuda"),
        (Placement(colocated=True, rollout_gpus=1.0), "cpu"),
        (Placement(rollout_gpus=0.5), "cuda"),
        (Placement(learner_gpus=1.0), "cpu"),
    ],
)
def test_it_samples_where_the_run_does(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, placement: Placement, device: str
) -> None:
    class Stop(Exception):
        pass

    asked: list[str] = []

    def worker(_: RunConfig, device: str) -> None:
        asked.append(device)
        raise Stop

    monkeypatch.setattr(rollout, "RolloutWorker", worker)
    adapter = Learner(config).save_adapter(tmp_path / "adapter").parent
    experiment = experiment_file(replace(config, placement=placement), tmp_path)
    with pytest.raises(Stop):
        evaluate(None, str(adapter), experiment, None)
    assert asked == [device]
