"""A plan against the tiny pipeline itself: exact where it says so, and memory against what the CPU's allocator hands out."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plan_memory import peak_of, planned_peak, update_peak, with_objective
from grpo_flex import plan_changes
from grpo_flex.__main__ import main
from grpo_flex.config import ConfigError, Full, RunConfig
from grpo_flex.generators.blank import blank_pipeline, describe, stand_in, without_weights
from grpo_flex.generators.flux import Flux, FluxKontext
from grpo_flex.generators.flux2 import Flux2Dev, Flux2DevEdit, Flux2Klein, Flux2KleinEdit
from grpo_flex.generators.known import KNOWN
from grpo_flex.generators.memory import Memory
from grpo_flex.generators.qwen_image import QwenImage
from grpo_flex.generators.sd3 import Sd3
from grpo_flex.generators.wan import Wan
from grpo_flex.generators.z_image import ZImage
from grpo_flex.learner import Learner
from grpo_flex.objectives.base import Objective
from grpo_flex.objectives.grpo import Grpo
from grpo_flex.objectives.guard import Guard
from grpo_flex.objectives.nft import Nft
from grpo_flex.overrides import override
from grpo_flex.plan import GIB, Plan, Process, make_plan
from grpo_flex.plan_changes import first_change
from grpo_flex.plan_report import report
from grpo_flex.rollout import HELDOUT_BATCH
from grpo_flex.tracing import LiveBytes, cost, saved_bytes
from tests import tiny_pictures as pictures
from tests.configs import tiny_config
from tests.tiny import tiny_wan

SHAPES = "experiments/shapes_image_oracle.py"


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> RunConfig:
    """The testbed's tiny FLUX: large enough that its activations are more than the allocator's rounding."""
    generator = Flux(model="testbed/tiny_flux", height=64, width=64, max_sequence_length=16)
    return tiny_config(tiny_folder, generator=generator)


@pytest.fixture(scope="module")
def tiny_plan(tiny: RunConfig) -> Plan:
    return make_plan(tiny)


def forward(learner: Learner, siblings: int) -> Callable[[], Any]:
    model: Any = learner.model
    told = stand_in(model)
    x = torch.zeros(siblings, *model.latent_shape, device=model.device)
    return lambda: model.velocity(x, 0.9, told)


def blank(config: RunConfig) -> Learner:
    with without_weights():
        return Learner(config, "meta")


def test_parameters_and_adapter_are_exact(tiny: RunConfig, tiny_plan: Plan) -> None:
    learner = Learner(tiny)
    pipeline: Any = learner.model.pipeline  # pyright: ignore[reportAttributeAccessIssue]
    for name, part in (("transformer", pipeline.transformer), ("vae", pipeline.vae)):
        assert tiny_plan.parameters[name] == sum(p.numel() for n, p in part.named_parameters() if "lora_" not in n)
    assert tiny_plan.adapter == sum(p.numel() for p in learner.parameters)
    assert tiny_plan.judge_calls == tiny.prompts.per_step * 6  # 4 siblings: 6 pairs


@pytest.mark.parametrize("targets", [(), ("attn.to_q",)])
def test_what_autograd_keeps_is_foretold(tiny: RunConfig, targets: tuple[str, ...]) -> None:
    """Not one byte apart, but for the random state that a GPU's attention kernel keeps: 16 bytes and padding a block."""
    tiny = replace(tiny, adapter=replace(tiny.adapter, targets=targets))
    real, meta = Learner(tiny), blank(tiny)
    kept, foretold = (saved_bytes(forward(r, 4), r.model.transformer.parameters()) for r in (real, meta))
    assert kept > 1e6
    assert foretold == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize(
    ("recipe", "objective"),
    [
        ("shapes_image_flow_grpo", Guard()),
        ("shapes_image_flow_grpo", Nft()),
        ("shapes_video_oracle", Grpo(kl_beta=0.01)),
    ],
    ids=["flux-guard", "flux-nft", "wan-grpo-kl"],
)
def test_peak_of_an_update_matches_the_allocators(recipe: str, objective: Objective) -> None:
    """A real group, and all that the learner does with it."""
    config = with_objective(recipe, objective)
    assert planned_peak(config) == pytest.approx(update_peak(config), rel=0.1)


TINY_CLIPS = Wan(model="testbed/tiny_wan", height=48, width=48, frames=17, max_sequence_length=20)


@pytest.mark.parametrize(("size", "clips"), [(64, False), (128, False), (48, True)])
def test_peaks_of_sampling_and_decoding_match_the_allocators(tiny: RunConfig, size: int, clips: bool) -> None:
    """A real group: sampling to a few bytes. Decoding never above the plan, whose share for workspaces is not far too much."""
    of = replace(tiny, generator=TINY_CLIPS) if clips else tiny
    config = override(of, [f"generator.height={size}", f"generator.width={size}"])
    learner, moments = Learner(config), make_plan(config).processes[0].moments
    model: Any = learner.model
    sample = forward(learner, config.sampling.group_size)
    x = torch.zeros(config.sampling.group_size, *model.latent_shape)
    with torch.no_grad():
        sampling, decoding = peak_of(sample), peak_of(lambda: model.decode(x))
    assert moments["sampling"]["activations"] == pytest.approx(sampling, rel=1e-3)
    told = moments["decoding"]["activations"] + moments["decoding"]["workspaces (assumed)"]
    assert decoding <= told < 1.25 * decoding


def test_flops_are_those_that_pytorch_counts(tiny: RunConfig) -> None:
    """Forward and back, on real tensors by FlopCounterMode. Its CPU attention has no formula, so that is done as matrix products."""
    counted = FlopCounterMode(display=False)
    with counted, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        forward(Learner(tiny), 4)().sum().backward()
    call = forward(blank(tiny), 4)
    fused, products = cost(lambda: call().sum().backward()).flops, counted.get_total_flops()
    assert 0 < fused - products < 0.05 * products  # the fused kernel computes the scores again on the way back


def test_flops_of_sampling_are_those_that_pytorch_counts(tiny: RunConfig, tiny_plan: Plan) -> None:
    """The plan's own figures against FlopCounterMode around one denoising step and the decoding of a whole group."""
    model: Any = Learner(tiny).model
    told, x = stand_in(model), torch.zeros(tiny.sampling.group_size, *model.latent_shape)
    steps = []
    for call in (lambda: model.velocity(x, 1.0, told), lambda: model.decode(x)):
        counted = FlopCounterMode(display=False)
        with counted, torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            call()
        steps.append(counted.get_total_flops())
    assert tiny_plan.forward_flops == steps[0]
    assert tiny_plan.rollout_flops == tiny.prompts.per_step * (tiny.sampling.steps * steps[0] + steps[1])
    groups = HELDOUT_BATCH // tiny.sampling.group_size
    assert tiny_plan.longest_call == groups * (tiny.sampling.eval_steps * steps[0] + steps[1])


def test_recomputing_takes_memory_and_costs_flops(tiny: RunConfig, tiny_plan: Plan) -> None:
    generator: Any = tiny.generator
    saving = replace(tiny, generator=replace(generator, memory=replace(generator.memory, checkpoint_every=1)))
    plans = [tiny_plan, make_plan(saving)]
    kept, recomputed = (next(p for p in made.processes if p.name == "learner").parts["activations"] for made in plans)
    assert recomputed < 0.6 * kept
    assert plans[1].update_flops > 1.2 * plans[0].update_flops
    assert plans[1].rollout_flops == plans[0].rollout_flops


def test_micro_batches_take_memory_and_no_flops(tiny: RunConfig, tiny_plan: Plan) -> None:
    """Two of four siblings at once: half of their activations, and the work of the whole group."""
    halves = make_plan(override(tiny, ["sampling.micro_batch=2"]))
    for made, whole in zip(halves.processes, tiny_plan.processes, strict=True):
        for moment in (m for m in made.moments if m not in ("encoding", "held-out")):
            held, all_held = (p.moments[moment]["activations"] for p in (made, whole))
            assert 0.45 * all_held < held < 0.55 * all_held
    flops = [(p.forward_flops, p.rollout_flops, p.update_flops) for p in (halves, tiny_plan)]
    assert flops[0] == flops[1]
    few, many = halves.processes[0].moments, tiny_plan.processes[0].moments
    assert few["held-out"]["activations"] == few["decoding"]["activations"]
    assert many["held-out"]["activations"] > 3 * many["decoding"]["activations"]  # 16 samples at once, not 4


def test_live_bytes_counts_births_and_deaths() -> None:
    outside = torch.ones(100)
    with LiveBytes([outside]) as live:
        a = torch.ones(1000)
        b = a.view(10, 100) + 1
        outside.view(-1)
        del a
        a = b * 2
        assert live.now == 8000
    assert live.peak == 8000
    del a, b
    assert live.now == 0


def test_an_entry_inside_another_counts_nothing_twice() -> None:
    layer, x, live = torch.nn.Linear(8, 16), torch.ones(4, 8), LiveBytes()
    plain = cost(lambda: layer(x))
    with live:
        assert cost(lambda: layer(x), live) == plain
        seen = live.flops
        layer(x)
    assert plain.flops == 2 * 4 * 8 * 16 and live.flops == seen + plain.flops
    layer(x)
    assert live.flops == seen + plain.flops


# ---------------------------------------------------------------- public models


@pytest.mark.parametrize(
    ("file", "millions"),
    [("flux1_dev", 11_901.4), ("flux1_schnell", 11_891.2), ("wan21_t2v_1_3b", 1_419.0), ("wan21_t2v_14b", 14_288.5)],
)
def test_known_models_have_their_published_sizes(file: str, millions: float) -> None:
    import diffusers

    entry = json.loads((KNOWN / f"{file}.json").read_text())
    assert entry["source"]
    described = describe(entry["hub"])
    pipeline = blank_pipeline(
        getattr(diffusers, described.index["_class_name"]), described, torch.bfloat16, "meta", {"text_encoder_2": None}
    )
    assert sum(p.numel() for p in pipeline.transformer.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    assert pipeline.transformer.device.type == "meta"


TINY: dict[str, tuple[Callable[[], Any], Callable[..., Any]]] = {
    "flux": (pictures.tiny_flux_dev, Flux),
    "kontext": (pictures.tiny_kontext, FluxKontext),
    "flux2-dev": (pictures.tiny_flux2_dev, Flux2Dev),
    "flux2-dev-edit": (pictures.tiny_flux2_dev, Flux2DevEdit),
    "klein": (pictures.tiny_klein, Flux2Klein),
    "klein-edit": (pictures.tiny_klein, Flux2KleinEdit),
    "sd3": (pictures.tiny_sd3, Sd3),
    "qwen-image": (pictures.tiny_qwen_image, QwenImage),
    "z-image": (pictures.tiny_z_image, partial(ZImage, guidance=5.0)),
    "wan": (tiny_wan, partial(Wan, frames=5)),
    "wan-two-experts": (partial(tiny_wan, boundary=0.875), partial(Wan, frames=5)),
}


@pytest.mark.parametrize("kind", TINY)
def test_every_generator_can_be_planned(kind: str, tmp_path: Path, config: RunConfig) -> None:
    make, generator = TINY[kind]
    make().save_pretrained(tmp_path)
    made = make_plan(
        replace(config, generator=generator(model=str(tmp_path), height=32, width=32, max_sequence_length=16))
    )
    assert made.forward_flops > 0 and made.update_flops > 0 and made.adapter > 0
    for process in made.processes:
        assert all(parts["activations"] > 0 for name, parts in process.moments.items() if name != "encoding")


@dataclass(frozen=True, kw_only=True)
class Renamed(Flux):
    """Somebody's own: its conditioning has another name, of which a plan may be told or not."""

    told: bool

    def load(self, device: str) -> Any:
        model: Any = super().load(device)
        usual, zeros = model.velocity, stand_in(model)
        model.velocity = lambda x, sigma, c: usual(x, sigma, {name: c["own_" + name] for name in zeros})
        if self.told:
            model.stand_in = lambda: {"own_" + name: tensor for name, tensor in zeros.items()}
        return model


@dataclass(frozen=True, kw_only=True)
class Bare:
    """The protocol and no more."""

    memory: Memory = field(default_factory=Memory)

    def load(self, device: str) -> Any:
        raise AssertionError

    def check(self, prompts: Any) -> None: ...


def test_a_generator_of_ones_own_is_planned_or_told_what_it_takes(tiny: RunConfig, tiny_plan: Plan) -> None:
    known: Any = tiny.generator
    changes: dict[str, Any] = {"height": 64, "width": 64, "max_sequence_length": 16}
    made = make_plan(replace(tiny, generator=Renamed(model=known.model, told=True, **changes)))
    assert (made.forward_flops, made.update_flops) == (tiny_plan.forward_flops, tiny_plan.update_flops)
    for generator, said in ((Renamed(model=known.model, told=False, **changes), "own_"), (Bare(), "model")):
        with pytest.raises(ConfigError, match=rf"{type(generator).__name__} cannot be planned \(.*{said}.*stand_in"):
            make_plan(replace(tiny, generator=generator))


@pytest.mark.parametrize("kind", ["flux", "wan"])
def test_a_blank_pipeline_takes_no_more_memory_while_it_is_made(kind: str, tmp_path: Path) -> None:
    """On the device that it is made for, and not twice as much, as in float32. Wan keeps parts of its own in that."""
    stock = TINY[kind][0]()
    stock.save_pretrained(tmp_path)
    texts: dict[str, Any] = {name: None for name in stock.components if name.startswith("text_encoder")}
    with LiveBytes() as live:
        made = blank_pipeline(type(stock), describe(str(tmp_path)), torch.bfloat16, "cpu", texts)
    parts = (made.transformer, made.vae)
    tensors = [t for part in parts for t in (*part.parameters(), *part.buffers())]
    assert live.peak < 1.3 * sum(t.nbytes for t in tensors)
    wide = {n for n, t in made.transformer.named_parameters() if t.dtype == torch.float32}
    assert bool(wide) == (kind == "wan") and all("time_embedder" in n or "norm" in n or "table" in n for n in wide)
    assert torch.get_default_dtype() == torch.float32


def test_an_unknown_model_is_refused_with_the_way_out(config: RunConfig) -> None:
    generator: Any = config.generator
    with pytest.raises(
        ConfigError, match=r"'owner/thing', whose configuration is not on this machine; known.*FLUX.1-dev.*--model"
    ):
        make_plan(replace(config, generator=replace(generator, model="owner/thing")))


def test_loading_is_as_before_after_a_plan(config: RunConfig) -> None:
    from diffusers import DiffusionPipeline

    before = DiffusionPipeline.__dict__["from_pretrained"]
    with pytest.raises(ConfigError), without_weights():
        raise ConfigError("anything")
    assert DiffusionPipeline.__dict__["from_pretrained"] is before


# ---------------------------------------------------------------- cards


def process(name: str, count: int, gpus: float, gib: float) -> Process:
    return Process(
        name=name, count=count, gpus=gpus, moments={"": {"all": int(gib * GIB)}}, stays={"": int(gib * GIB / 2)}
    )


def planned(config: RunConfig, *processes: Process) -> Plan:
    return Plan(
        config=config, parameters={}, adapter=0, processes=processes, stored=0, forward_flops=0, rollout_flops=6 * 10**14,
        update_flops=3 * 10**14, judge_calls=100,
    )  # fmt: skip


def test_processes_share_cards_as_ray_packs_them(config: RunConfig) -> None:
    shared = planned(config, process("worker", 1, 0.5, 10), process("learner", 1, 0.5, 20))
    assert shared.fits(1, 30) and not shared.fits(1, 29)
    assert shared.lasting() == 15 * GIB
    apart = planned(config, process("worker", 7, 1, 10), process("learner", 1, 1, 20))
    assert apart.fits(8, 20) and not apart.fits(7, 80)


def test_a_learner_that_samples_too_holds_one_set_of_weights(config: RunConfig) -> None:
    place = replace(config.placement, colocated=True, rollout_workers=1, learner_gpus=1.0)
    (one,) = make_plan(replace(config, placement=place)).processes
    worker, learner = make_plan(config).processes
    assert one.gpus == 1 and max(worker.total, learner.total) <= one.total < worker.total + learner.total
    assert one.parts["adapter, gradient, averages, AdamW"] == learner.parts["adapter, gradient, averages, AdamW"]
    assert "adapter" not in one.parts


def test_times_follow_from_what_is_given(config: RunConfig) -> None:
    config = replace(config, placement=replace(config.placement, rollout_workers=2))
    made = planned(config, process("worker", 2, 1, 10), process("learner", 1, 1, 20))
    lines = "\n".join(report(made, 1, 80, tflops=100, judge_rate=10))
    assert "3.0 s, 2 at once" in lines and "3.0 s, 1 at once" in lines  # 600 TFLOP by two, 300 by one
    assert "10.0 s, while the rollout goes on" in lines
    assert "13.0 s, if a GPU sustains 100 TFLOP/s" in lines
    assert "placement asks for 3 GPUs and there are 1" in lines
    assert " s, " not in "\n".join(report(made, 3, 80, tflops=0, judge_rate=0))


@pytest.mark.parametrize(
    ("field", "limit", "kept"),
    [("update_timeout_s", 2.9, False), ("update_timeout_s", 3.1, True), ("rollout_timeout_s", 4.9, False), ("rollout_timeout_s", 5.1, True)],
)  # fmt: skip
def test_a_limit_that_healthy_processes_would_break_is_said(
    config: RunConfig, field: str, limit: float, kept: bool
) -> None:
    """An update takes 3 s here, and a worker's longest call 5."""
    config = replace(config, placement=replace(config.placement, **{field: limit}))
    made = replace(planned(config, process("learner", 1, 1, 20)), longest_call=5 * 10**14)
    lines = "\n".join(report(made, 0, 0, tflops=100, judge_rate=0))
    assert (f"placement.{field} is {limit:g}" in lines) is not kept and ("taken for hung" in lines) is not kept
    assert "taken for hung" not in "\n".join(report(made, 0, 0, tflops=0, judge_rate=0))


@pytest.mark.parametrize(
    ("changes", "shares"),
    [
        ({}, True),
        ({"learners": 2}, False),  # NCCL refuses two ranks on one GPU
        ({"colocated": True, "learners": 2}, False),
        ({"broadcast": True}, False),  # the learner and its workers are ranks of one group too
    ],
)
def test_sharing_a_gpu_is_advised_to_one_learner_beside_workers(
    config: RunConfig, changes: dict[str, Any], shares: bool
) -> None:
    config = replace(config, placement=replace(config.placement, **changes))
    made = planned(config, process("worker", 2, 1, 10), process("learner", 1, 1, 20))
    said = [line for line in report(made, 1, 80, tflops=0, judge_rate=0) if "there are 1; set placement." in line]
    assert ["learner_gpus below 1" in line for line in said] == [shares]


@pytest.mark.parametrize(
    ("gpu_memory", "changes"),
    [
        (35, ["generator.dtype=bfloat16"]),
        (25, ["generator.memory.checkpoint_every=1"]),
        (15, ["generator.dtype=bfloat16", "generator.memory.checkpoint_every=1"]),
        (2, None),
    ],
)
def test_the_first_change_that_makes_it_fit(
    config: RunConfig, gpu_memory: float, changes: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 GiB: a quarter less with bfloat16, half less with recomputation, nothing else helps."""

    def weighed(config: RunConfig) -> Plan:
        generator: Any = config.generator
        size = 40 * (0.75 if generator.dtype == "bfloat16" else 1) * (0.5 if generator.memory.checkpoint_every else 1)
        return planned(config, process("learner", 1, 1, size))

    monkeypatch.setattr(plan_changes, "make_plan", weighed)
    found = first_change(weighed(config), 1, gpu_memory)
    assert (found and found[0]) == changes


def test_a_smaller_micro_batch_is_the_first_thing_to_try(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """10 GiB and 5 for each sibling that is taken at once, of 4; half less with recomputation. The largest that fits is named."""

    def weighed(config: RunConfig) -> Plan:
        generator: Any = config.generator
        size = 10 + 5 * (config.sampling.micro_batch or config.sampling.group_size)
        return planned(config, process("learner", 1, 1, size * (0.5 if generator.memory.checkpoint_every else 1)))

    monkeypatch.setattr(plan_changes, "make_plan", weighed)
    for memory, changes in (
        (20, ["sampling.micro_batch=2"]),
        (15, ["sampling.micro_batch=1"]),
        (9, ["sampling.micro_batch=1", "generator.memory.checkpoint_every=1"]),
    ):
        found = first_change(weighed(config), 1, memory)
        assert found and found[0] == changes


def test_quantisation_is_the_last_thing_before_a_smaller_group(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base of 16 GiB in 16 bits, and 1 GiB that stays; bitsandbytes is not needed to say so. Full weights are trained as they are."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    config = replace(config, placement=replace(config.placement, learner_gpus=1.0, rollout_gpus=1.0))
    whole = replace(config, adapter=Full())

    def weighed(config: RunConfig) -> Plan:
        generator: Any = config.generator
        return planned(config, process("learner", 1, 1, 1 + (generator.memory.base_bits or 16)))

    monkeypatch.setattr(plan_changes, "make_plan", weighed)
    for memory, bits in ((10, 8), (6, 4)):
        found = first_change(weighed(config), 1, memory)
        assert found and found[0] == [f"generator.memory.base_bits={bits}"]
        found[1].config.validate()
    assert first_change(weighed(config), 1, 4) is None
    assert first_change(weighed(whole), 1, 10) is None
    shared = replace(
        config, placement=replace(config.placement, learners=2)
    )  # weights that are shared out are not quantised
    assert first_change(weighed(shared), 3, 10) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], "which experiment"),
        (["plan", SHAPES, "--gpus", "1", "--gpu-memory", "80"], "runs on CPUs and no GPU would hold anything"),
        (["plan", SHAPES, "--gpus", "1"], "--gpus and --gpu-memory belong together"),
        (["plan", SHAPES, "--tflops", "-1"], "--tflops is -1.0; it needs to be a number of 0 or more"),
        (["plan", SHAPES, "--gpu-memory", "nan"], "--gpu-memory is nan"),
        (["plan", SHAPES, "--model", "nowhere"], "generator.model is 'nowhere', which is no folder here"),
        (["train", SHAPES, "--dry-run", "--model", "nowhere"], "generator.model is 'nowhere'"),
    ],
)
def test_bad_input_of_the_command_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path.cwd()))
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_command_prints_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", SHAPES, "--model", "testbed/tiny_flux", "--tflops", "0.05"]) == 0
    said = capsys.readouterr().out
    for word in (
        "Parameters",
        "Memory of each learner",
        "16 siblings at once; fullest: updating",
        "TFLOP",
        "960 verdicts",
    ):
        assert word in said
    assert re.search(r"encoding +sampling +decoding +held-out\n", said) and said.count("together  ") == 3
