"""Too little memory is refused before anything is loaded, where it can be known."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grpo_flex import placement, plan, room
from grpo_flex.config import ConfigError, RunConfig
from grpo_flex.overrides import override
from grpo_flex.plan import GIB, Plan, Process
from reward_server.serve import VllmJudge
from testbed.oracle_judge import OracleJudge


@pytest.fixture
def on_gpus(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Worker and learner, one to a card, 30 GiB of 40 for good."""
    parts = {"weights": 30 * GIB, "activations": 10 * GIB}
    processes = tuple(
        Process(name=name, count=1, gpus=1, moments={"updating": parts}, stays={"weights": 30 * GIB})
        for name in ("a", "b")
    )
    made = Plan(
        config=config, parameters={}, adapter=0, processes=processes, stored=0, forward_flops=0, rollout_flops=0,
        update_flops=0, judge_calls=0,
    )  # fmt: skip
    monkeypatch.setattr(plan, "make_plan", lambda _: made)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return replace(config, placement=replace(config.placement, rollout_gpus=1.0, learner_gpus=1.0))


@pytest.mark.parametrize(
    ("memory", "said"), [(80, ""), (39, "warning: by the plan one GPU will hold 40.0 GiB"), (0, "")]
)
def test_what_may_be_too_little_is_said(
    on_gpus: RunConfig, memory: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "smallest_gpu", lambda *_: memory * GIB)
    heard: list[str] = []
    room.check_room(on_gpus, heard.append)
    assert "".join(heard).startswith(said) and bool(heard) == bool(said)


def test_what_another_process_holds_is_said(on_gpus: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"memory.total": 80, "memory.free": 12}
    monkeypatch.setattr(room, "smallest_gpu", lambda of="memory.total": sizes[of] * GIB)
    heard: list[str] = []
    room.check_room(on_gpus, heard.append)
    (warning,) = heard
    assert "will hold 40.0 GiB, and one of this machine's has 12.0 GiB free: something else, a judge perhaps" in warning


def test_what_is_too_little_is_refused(on_gpus: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "smallest_gpu", lambda *_: 24 * GIB)
    with pytest.raises(
        ConfigError,
        match=r"30\.0 GiB on one GPU for weights and optimiser alone.*have 24\.0 GiB; .*plan.*CUDA_VISIBLE_DEVICES",
    ):
        room.check_room(on_gpus, print)


@pytest.mark.parametrize(
    ("cuda", "said"),
    [
        ("13.0", r"built for CUDA 13\.0.*driver \(version 550\.54\).*580 or newer; update the driver"),
        (None, "is a build for CPUs; .*make setup"),
    ],
)
def test_gpus_that_torch_does_not_see_are_told_of(
    on_gpus: RunConfig, cuda: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        room, "_of_each_gpu", lambda what: {"driver_version": [["550.54"]] * 2}.get(what, [["0", "GPU-a", "81920"]])
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(ConfigError, match=said):
        room.check_room(on_gpus, print)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")  # whose nodes have drivers of their own
    room.check_room(on_gpus, print)


@pytest.mark.parametrize(
    ("visible", "gib"),
    [(None, 4), ("1,2", 24), ("2", 80), ("GPU-bb, GPU-cccc", 24), ("0,1", 4), ("", 0), ("7", 0)],
)
def test_a_gpu_that_this_process_may_not_use_does_not_count(
    visible: str | None, gib: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small card for the display beside two for work, as a driver would tell of them."""
    told = "".join(f"{i}, GPU-{4 * 'abc'[i]}-0, {size * 1024}\n" for i, size in enumerate((4, 24, 80)))
    (tmp_path / "nvidia-smi").write_text(
        '#!/bin/sh\ncase "$1" in *=index,uuid,memory.total) cat "$0.txt";; *=index) echo 0; echo 1; echo 2;; *) exit 1;; esac\n'
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    (tmp_path / "nvidia-smi.txt").write_text(told)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        assert room.visible_gpus() == ["0", "1", "2"]
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert room.smallest_gpu() == gib * GIB


def test_a_judge_keeps_its_gpus_where_the_run_can_do_with_the_others(
    on_gpus: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 1,2")
    heard: list[str] = []
    assert room.apart(on_gpus, ["3"], 2.0, heard.append) == ["1", "2"] and heard == []
    assert room.apart(on_gpus, [], 2.0, heard.append) == room.apart(on_gpus, ["3"], 0.0, heard.append) == []
    assert room.apart(on_gpus, ["3"], 2.5, heard.append) == [] and "judge that this run started has GPU 3" in heard[0]
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")  # whose daemon on this machine knows nothing of the judge
    assert room.apart(on_gpus, ["3"], 1.0, heard.append) == [] and len(heard) == 2


def test_a_cluster_without_room_for_the_judge_too_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seats = {"learner": {"GPU": 1.0}, "rollout-0": {"GPU": 1.0, "CPU": 1.0}}
    judge = VllmJudge(preset="flex-qwen3vl-8b", replicas=2, ray_address="head:6379")
    monkeypatch.setattr(placement.ray, "cluster_resources", lambda: {"GPU": 3.0, "CPU": 8.0})
    with pytest.raises(
        ConfigError, match=r"needs 4 GPUs \(learner 1, rollout-0 1, judge-0 1, judge-1 1\).*judge.server.replicas"
    ):
        placement._check_judge(seats, judge, "head:6379")
    elsewhere = replace(judge, ray_address="judges:6379")
    for other in (elsewhere, replace(judge, wait_s=60.0), replace(judge, replicas=1), OracleJudge()):
        placement._check_judge(seats, other, "head:6379")


def test_a_run_whose_quantisation_is_not_installed_is_refused(
    on_gpus: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(room, "smallest_gpu", lambda *_: 0)
    quantised = override(on_gpus, ["generator.memory.base_bits=8"])
    with pytest.raises(ConfigError, match=r"base_bits is 8.*pip install bitsandbytes"):
        room.check_room(quantised, print)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")  # what is installed there is not known here
    room.check_room(quantised, print)


def test_a_model_that_cannot_be_planned_stops_no_run(on_gpus: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(_: RunConfig) -> Plan:
        raise KeyError("keep")

    monkeypatch.setattr(plan, "make_plan", refuses)
    monkeypatch.setattr(room, "smallest_gpu", lambda *_: 24 * GIB)
    heard: list[str] = []
    room.check_room(on_gpus, heard.append)
    assert heard == ["memory was not checked: KeyError: 'keep'"]
