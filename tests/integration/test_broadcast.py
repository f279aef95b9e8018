"""Full fine-tuning whose weights are broadcast: the same numbers as through the object store, also when a worker dies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grpo_flex.__main__ import main
from grpo_flex.config import Full, RunConfig
from grpo_flex.learner_group import LearnerGroup
from grpo_flex.objectives.nft import Nft
from tests.configs import judge_of, tiny_config
from tests.integration.processes import descendants, experiment_file, rows
from tests.integration.test_outages import SLOW
from tests.integration.test_run import numbers


def full(folder: Path, **placement: Any) -> RunConfig:
    """Two learners with a half of the weights each; what samples, what is shown and the base all differ."""
    folder.mkdir()
    config = tiny_config(folder, steps=3, adapter=Full(), objective=Nft(old_rate=0.5))
    placed = replace(config.placement, learners=2, shard_base=True, **placement)
    return replace(config, optimizer=replace(config.optimizer, lr=1e-3), placement=placed)


def test_how_weights_travel_and_that_a_worker_dies_does_not_show_in_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stored: list[str] = []
    publish: Callable[..., Any] = LearnerGroup.publish
    monkeypatch.setattr(LearnerGroup, "publish", lambda self, role: stored.append(role) or publish(self, role))
    apart, sent = tmp_path / "stored", tmp_path / "broadcast"
    assert main(["train", experiment_file(full(apart), apart)]) == 0
    assert len(stored) > 3
    stored.clear()

    config, run_dir = full(sent, broadcast=True, rollout_workers=2), sent / "runs" / "tiny"

    def kill_a_worker() -> list[str]:
        """After the first step: what had gone through the object store by then."""
        until = time.monotonic() + 300
        while len(rows(run_dir)) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        before = list(stored)
        os.kill(descendants(os.getpid(), "ray::RolloutActor")[0], signal.SIGKILL)
        return before

    with ThreadPoolExecutor(1) as pool:
        before = pool.submit(kill_a_worker)
        assert (
            main(["train", experiment_file(replace(config, judge=replace(judge_of(config), server=SLOW)), sent)]) == 0
        )
    assert before.result() == []  # broadcasts alone
    assert "died; starting it again" in capsys.readouterr().out
    assert numbers(run_dir) == numbers(apart / "runs" / "tiny")
