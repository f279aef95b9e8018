"""Full fine-tuning: the right weights move, guards still have their base, resume is exact, what arrives is what was sent."""

from __future__ import annotations

import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from ray import cloudpickle

from grpo_flex.actors import LearnerActor, RolloutActor
from grpo_flex.broadcast import Circle
from grpo_flex.config import Adapter as LoraAdapter
from grpo_flex.config import ConfigError, Full, Placement, RunConfig
from grpo_flex.evaluate import read_weights
from grpo_flex.generators.sd3 import Sd3
from grpo_flex.generators.wan import Wan
from grpo_flex.learner import BoundPolicy, Learner
from grpo_flex.objectives.grpo import Grpo
from grpo_flex.objectives.nft import Nft
from grpo_flex.plan import make_plan
from grpo_flex.rollout import UNTRAINED, RolloutWorker
from grpo_flex.types import Adapter, Prompt, Role, RolloutGroup
from grpo_flex.weights import Parcel, Whole
from tests.configs import tiny_config
from tests.invariants.test_ranks import both, several, trained
from tests.tiny import tiny_wan
from tests.tiny_pictures import tiny_sd3

PROMPT = Prompt(id="p0", text="a red circle on a black background")
ADVANTAGES = np.array([1.0, -1.0, 0.5, -0.5])


@pytest.fixture
def full(config: RunConfig) -> RunConfig:
    return whole(config)


def whole(config: RunConfig, **changes: Any) -> RunConfig:
    changes = {"objective": Grpo(clip=0.2), **changes}
    return replace(config, adapter=Full(), optimizer=replace(config.optimizer, lr=1e-3, ema=0.9), **changes)


def after(config: RunConfig, steps: int, learner: Learner | None = None) -> Learner:
    learner, worker = learner or Learner(config), RolloutWorker(config)
    for _ in range(steps):
        group = worker.generate(learner.version, PROMPT, learner.adapter())
        learner.update([group], [ADVANTAGES], learner.version)
    return learner


def transformer(config: RunConfig) -> dict[str, torch.Tensor]:
    generator: Any = config.generator
    return FluxTransformer2DModel.from_pretrained(generator.model, subfolder="transformer").state_dict()


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_a_step_moves_all_weights_from_a_ratio_of_one_and_keeps_the_base(full: RunConfig) -> None:
    base, learner = transformer(full), Learner(full)
    group = RolloutWorker(full).generate(0, PROMPT, learner.adapter())
    metrics = learner.update([group], [ADVANTAGES], 0).metrics
    assert metrics["policy/first_log_ratio_abs"] == 0
    now = dict(learner.adapter().tensors)
    still = [name for name in base if torch.equal(base[name], now[name])]
    assert now.keys() == base.keys() and not still
    assert same(dict(learner.base_adapter().tensors), base)
    assert metrics["policy/base_distance"] > 0  # by the model itself, after the step
    policy = BoundPolicy(learner.model, group.conditioning, full.sampling.dynamics, learner.weights)
    plain = full.generator.load("cpu")
    x = torch.ones(2, *learner.model.latent_shape)
    with torch.no_grad():
        assert torch.equal(policy.reference_velocity(x, 0.5), plain.velocity(x, 0.5, group.conditioning))
        assert not torch.equal(policy.velocity(x, 0.5), policy.reference_velocity(x, 0.5))


def test_gradients_are_those_of_plain_backward(full: RunConfig) -> None:
    learner, plain = Learner(full), full.generator.load("cpu")
    plain.transformer.requires_grad_(True)
    (conditioning,) = plain.encode([PROMPT])
    x = torch.randn(2, *plain.latent_shape, generator=torch.Generator().manual_seed(0))
    for model in (plain, learner.model):
        for _ in range(2):  # the second pass adds up
            model.velocity(x, 0.7, conditioning).square().mean().backward()
    for p, master in zip(plain.transformer.parameters(), learner.parameters, strict=True):
        assert p.grad is not None and master.grad is not None and torch.equal(p.grad, master.grad)


OBJECTIVES = {"kl": Grpo(clip=0.2, kl_beta=0.1, kl_target=1e-4), "nft": Nft(old_rate=0.5)}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=[*OBJECTIVES])
def test_a_resume_is_exact(config: RunConfig, objective: Any, tmp_path: Path) -> None:
    config = whole(config, objective=objective)
    torch.save(after(config, 2).state(), tmp_path / "state.pt")
    resumed = Learner(config)
    resumed.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    straight, resumed = after(config, 4).state(), after(config, 2, resumed).state()
    for part in ("adapter", "old", "average"):
        assert same(straight[part], resumed[part])
    lags = (objective is OBJECTIVES["nft"]) != same(straight["old"], straight["adapter"])
    assert lags and not same(straight["average"], straight["adapter"])


def test_what_a_worker_holds_is_what_was_published_bit_for_bit(full: RunConfig) -> None:
    generator: Any = replace(full.generator, dtype="bfloat16")  # pyright: ignore[reportArgumentType]
    full = replace(full, generator=generator)
    learner, actor = LearnerActor(full, "cpu"), RolloutActor(full, "cpu", "rollout-0")
    after(full, 1, learner.learner)
    _, adapter = learner.adapter("sampling")
    assert adapter is not None
    arrived = cloudpickle.loads(cloudpickle.dumps(adapter))
    worker = actor.worker
    worker.use(arrived)
    held = dict(worker.model.transformer.state_dict())
    assert same(held, dict(adapter.tensors)) and all(t.dtype == torch.bfloat16 for t in held.values())
    assert same(held, dict(learner.learner.model.transformer.state_dict()))  # what the learner itself computes with
    group = worker.generate(1, PROMPT, arrived)
    metrics = learner.learner.update([group], [ADVANTAGES], 1).metrics
    assert metrics["policy/first_log_ratio_abs"] == 0
    assert all(p.dtype == torch.float32 for p in learner.learner.parameters)
    broken = replace(arrived, role="evaluation", tensors={k: t[:-1] for k, t in adapter.tensors.items()})
    with pytest.raises(ValueError, match=r"do not fit the model.*generator\.model"):
        worker.use(broken)


def test_what_is_broadcast_is_what_was_published_bit_for_bit(full: RunConfig) -> None:
    generator: Any = replace(full.generator, dtype="bfloat16")  # pyright: ignore[reportArgumentType]
    full = replace(full, generator=generator, objective=Nft(old_rate=0.5))
    learner, actor = LearnerActor(full, "cpu"), RolloutActor(full, "cpu", "rollout-0")
    for step in range(2):
        group = RolloutWorker(full).generate(step, PROMPT, learner.learner.adapter())
        learner.learner.update([group], [ADVANTAGES], step)
    circle = Circle(address=f"127.0.0.1:{learner.member.listen()}", name="a", size=2, timeout_s=60.0)
    before: dict[str, torch.Tensor] = {}
    roles: tuple[Role, ...] = ("sampling", "evaluation", "base")
    for role in roles:
        with ThreadPoolExecutor(1) as pool:
            received = pool.submit(actor.receive, circle, 1, 2, role)
            assert learner.send(circle, role) == received.result() == ""
        _, adapter = learner.adapter(role)
        assert adapter is not None
        held = {name: t.clone() for name, t in actor.worker.model.transformer.state_dict().items()}
        assert same(held, dict(adapter.tensors)) and not same(held, before or {})
        actor.worker.use(replace(adapter, tensors={}))  # nothing has to go along
        before = held
    alone = replace(circle, name="b", timeout_s=0.5)
    assert "rank 1 of 2 did not come" in learner.send(alone, "sampling")
    assert "rank 0 of 2 did not come" in actor.receive(replace(alone, name="c"), 1, 2, "base")
    with pytest.raises(
        ValueError, match=r"rollout-0 was called without the base weights of version 2, but it holds \(-1, ''\)"
    ):
        actor.evaluate([PROMPT], Adapter(version=2, tensors={}, role="base"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": LoraAdapter()}, r"placement\.broadcast is true with a LoRA adapter.*adapter=Full\(\)"),
        (
            {"placement": Placement(broadcast=True, colocated=True)},
            r"placement\.broadcast is true with placement\.coloc",
        ),
        ({"lookahead": 2}, r"placement\.broadcast is true with sampling\.lookahead=2.*lookahead=0"),
    ],
)
def test_what_cannot_be_broadcast_is_refused(full: RunConfig, changes: dict[str, Any], message: str) -> None:
    full = replace(full, placement=replace(full.placement, broadcast=True))
    full.validate()
    sampling = replace(full.sampling, lookahead=changes.pop("lookahead", 0))
    with pytest.raises(ConfigError, match=message):
        replace(full, sampling=sampling, **changes).validate()


def test_a_parcel_travels_beside_the_pickle_and_keeps_what_is_shared() -> None:
    shared = torch.randn(300, 100).bfloat16()
    sent = {"a": {"x": shared, "empty": torch.zeros(0, 3)}, "b": [shared, 3], "c": torch.tensor(2.5)}
    buffers: list[pickle.PickleBuffer] = []
    pickled = cloudpickle.dumps(Parcel(sent), protocol=5, buffer_callback=buffers.append)
    assert len(pickled) < 3000 and sum(b.raw().nbytes for b in buffers) == shared.nbytes + 4
    got = pickle.loads(pickled, buffers=buffers)
    assert type(got) is dict and torch.equal(got["a"]["x"], shared) and got["a"]["x"].dtype == torch.bfloat16
    assert got["b"][0] is got["a"]["x"] and got["c"].shape == () and got["a"]["empty"].shape == (0, 3)


def test_the_exported_folder_gives_the_same_pictures(full: RunConfig, tmp_path: Path) -> None:
    learner = after(full, 2)
    files = LearnerActor(full, "cpu")
    files.__dict__["learner"] = learner
    for name, content in files.adapter_files().items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    generator: Any = full.generator
    stock: Any = FluxPipeline.from_pretrained(
        generator.model, transformer=FluxTransformer2DModel.from_pretrained(tmp_path / "transformer")
    )
    assert same(read_weights(tmp_path), dict(learner.evaluation_adapter().tensors))
    stock.save_pretrained(tmp_path / "pipeline")
    other = RolloutWorker(replace(full, generator=replace(generator, model=str(tmp_path / "pipeline"))))
    ours = RolloutWorker(full)
    (before,) = ours.evaluate([PROMPT], UNTRAINED)
    (one,), (two,) = ours.evaluate([PROMPT], learner.evaluation_adapter()), other.evaluate([PROMPT], UNTRAINED)
    assert np.array_equal(one.media, two.media) and not np.array_equal(one.media, before.media)


def test_buffers_beside_saved_weights_are_no_weights(tmp_path: Path) -> None:
    """SD3 saves its positions."""
    tiny_sd3().save_pretrained(tmp_path / "sd3")
    model = Sd3(model=str(tmp_path / "sd3"), height=64, width=64, dtype="float32").load("cpu")
    weights = Full().attach(model, 0)
    assert isinstance(weights, Whole)
    published = weights.held()
    model.save_weights(tmp_path / "run", published)
    saved = read_weights(tmp_path / "run")
    assert saved.keys() > published.keys()
    with torch.no_grad():
        for p in model.transformer.parameters():
            p.zero_()
    weights.write(saved)
    assert same(weights.held(), {name: saved[name] for name in published})
    with pytest.raises(ValueError, match="do not fit the model"):
        weights.write({name: t for name, t in saved.items() if name != next(iter(published))})


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any, dict[str, Any]]]:
    """Of FLUX and of Wan, a part of which stays float32: how to configure it, what two learners with a half of the
    weights each have come to, and what one has."""
    folder = tmp_path_factory.mktemp("halves")
    tiny_wan().save_pretrained(folder / "wan")
    clips = Wan(
        model=str(folder / "wan"), dtype="bfloat16", height=32, width=32, frames=5, max_sequence_length=16, guidance=1.0
    )

    def flux(**placement: Any) -> RunConfig:
        made = several(whole(tiny_config(folder)), 0.01, **placement)
        return replace(made, sampling=replace(made.sampling, steps=3))

    made = {"flux": flux, "wan": lambda **placement: replace(flux(**placement), generator=clips)}
    pairs = both([make(learners=2, shard_base=True) for make in made.values()], folder)
    return {
        name: (make, pair, trained(make(learners=1))) for (name, make), pair in zip(made.items(), pairs, strict=True)
    }


def test_two_learners_with_a_half_of_the_weights_each_equal_one(halves: dict[str, Any]) -> None:
    config, (first, second), one = halves["flux"]
    assert first["stored"] + second["stored"] == one["stored"] and first["stored"] < 0.6 * one["stored"]
    # Rank 0 alone has the whole.
    assert not second["state"]["adapter"] and not any(second["state"]["optimizer"]["state"].values())
    for part in ("adapter", "average"):
        for name, tensor in one["state"][part].items():
            torch.testing.assert_close(first["state"][part][name], tensor, rtol=1e-3, atol=2e-5)
    for step in (0, 1):
        assert first["metrics"][step] == second["metrics"][step]
        assert first["metrics"][step] == pytest.approx(one["metrics"][step], rel=2e-2, abs=1e-6)
    assert first["metrics"][0]["policy/grad_norm"] == pytest.approx(one["metrics"][0]["policy/grad_norm"], rel=1e-5)
    # The whole state fits one learner, which goes on from it.
    alone = Learner(config(learners=1))
    alone.load_state(first["state"])
    assert same(alone.state()["adapter"], first["state"]["adapter"])
    moments = alone.optimizer.state_dict()["state"]
    assert all(
        torch.equal(moments[i]["exp_avg"], of["exp_avg"]) for i, of in first["state"]["optimizer"]["state"].items()
    )


def test_two_learners_share_a_model_that_keeps_weights_in_float32(halves: dict[str, Any]) -> None:
    config, (first, second), one = halves["wan"]
    kept = {p.dtype for p in config().generator.load("cpu").transformer.parameters()}
    assert kept == {torch.float32, torch.bfloat16}
    assert first["stored"] + second["stored"] == one["stored"] and first["stored"] < 0.6 * one["stored"]
    assert first["metrics"] == second["metrics"]
    assert first["metrics"][0]["policy/grad_norm"] == pytest.approx(one["metrics"][0]["policy/grad_norm"], rel=1e-3)
    # Gradients are rounded to bfloat16, with two learners once more.
    for i, alone in one["state"]["optimizer"]["state"].items():
        difference = first["state"]["optimizer"]["state"][i]["exp_avg"] - alone["exp_avg"]
        assert difference.norm() < 0.02 * alone["exp_avg"].norm()


def test_moments_are_whole_one_at_a_time(full: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights that are split: all moments together are twice the model, in float32, and a GPU has no room for that."""
    learner = after(full, 1)
    expected, made, alive = learner.state(), list[weakref.ref[torch.Tensor]](), list[int]()

    def whole(i: int, value: torch.Tensor) -> torch.Tensor:
        alive.append(sum(ref() is not None for ref in made))
        together = value.clone()
        made.append(weakref.ref(together))
        return together

    monkeypatch.setattr(learner.weights, "split", True)
    monkeypatch.setattr(learner.weights, "whole", whole)
    moments = learner.state()["optimizer"]["state"]
    assert len(made) == 2 * len(learner.parameters) and not any(alive)
    for i, of in expected["optimizer"]["state"].items():
        assert same(moments[i], of)


def test_the_plan_counts_masters_moments_and_copies(full: RunConfig) -> None:
    plan = make_plan(full)
    worker, learner = plan.processes
    weights = 4 * plan.adapter
    trained = learner.parts["float32 weights, gradient, averages, AdamW"]
    assert plan.adapter == plan.parameters["transformer"] and learner.parts["weights: transformer"] >= weights
    assert trained == pytest.approx(4 * weights, rel=0.02) and "adapter" not in worker.parts
    # Published; state with its average; copies of base and average on the CPU.
    assert plan.published == pytest.approx((1 + 4 + 2) * weights, rel=0.01)
    on_device = make_plan(replace(full, adapter=Full(copies="device", state_each_step=False)))
    assert on_device.processes[1].parts["float32 weights, gradient, averages, AdamW"] == pytest.approx(
        6 * weights, rel=0.02
    )
    assert on_device.published == weights


def test_who_needs_the_base_is_told(full: RunConfig) -> None:
    bare = replace(full, adapter=Full(keep_base=False), objective=Grpo(kl_beta=0.1))
    with pytest.raises(
        ConfigError, match=r"adapter\.keep_base is false, but objective .*(.|\n)*evaluation\.versus_base"
    ):
        bare.validate()
    metrics = Learner(replace(bare, objective=Grpo())).update(_groups(full), [ADVANTAGES], 0).metrics
    assert "policy/base_distance" not in metrics


def _groups(config: RunConfig) -> list[RolloutGroup]:
    worker = RolloutWorker(config)
    return [worker.generate(0, PROMPT, replace(UNTRAINED, version=0, role="sampling", tensors=_held(worker)))]


def _held(worker: RolloutWorker) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in worker.model.transformer.state_dict().items()}
