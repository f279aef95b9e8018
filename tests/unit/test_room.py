"""Too little memory is refused before anything is loaded, where it can be known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from grpo_flex import plan, room
from grpo_flex.config import ConfigError, RunConfig
from grpo_flex.plan import GIB, Plan, Process


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
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return replace(config, placement=replace(config.placement, rollout_gpus=1.0, learner_gpus=1.0))


@pytest.mark.parametrize(
    ("memory", "said"), [(80, ""), (39, "warning: by the plan one GPU will hold 40.0 GiB"), (0, "")]
)
def test_what_may_be_too_little_is_said(
    on_gpus: RunConfig, memory: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "smallest_gpu", lambda: memory * GIB)
    heard: list[str] = []
    room.check_room(on_gpus, heard.append)
    assert "".join(heard).startswith(said) and bool(heard) == bool(said)


def test_what_is_too_little_is_refused(on_gpus: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "smallest_gpu", lambda: 24 * GIB)
    with pytest.raises(
        ConfigError, match=r"30\.0 GiB on one GPU for weights and optimiser alone.*have 24\.0 GiB; .*plan"
    ):
        room.check_room(on_gpus, print)


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


def test_a_model_that_cannot_be_planned_stops_no_run(on_gpus: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(_: RunConfig) -> Plan:
        raise ConfigError("unknown")

    monkeypatch.setattr(plan, "make_plan", refuses)
    monkeypatch.setattr(room, "smallest_gpu", lambda: 24 * GIB)
    heard: list[str] = []
    room.check_room(on_gpus, heard.append)
    assert heard == ["memory was not checked: unknown"]
