"""Memory options change cost, not numbers; what cannot be used is refused with the way out."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import checkpoint as recomputation

from grpo_flex.__main__ import main
from grpo_flex.config import Adapter, RunConfig
from grpo_flex.generators.base import load_pipeline
from grpo_flex.generators.flux import Flux, FluxKontext
from grpo_flex.generators.memory import Memory, repeated_blocks
from grpo_flex.generators.picture import PictureModel
from grpo_flex.generators.sd3 import Sd3
from grpo_flex.learner import BoundPolicy, Learner
from grpo_flex.rollout import RolloutWorker
from grpo_flex.types import Prompt
from grpo_flex.weights import attach_adapter
from tests.tiny import tiny_flux
from tests.tiny_pictures import tiny_sd3

PROMPT = Prompt(id="p0", text="a red circle on a black background")


@pytest.fixture
def flux(config: RunConfig) -> Flux:
    assert isinstance(config.generator, Flux)
    return config.generator


def loaded(flux: Flux, memory: Memory) -> tuple[Any, list[torch.nn.Parameter]]:
    model = replace(flux, memory=memory).load("cpu")
    parameters = attach_adapter(model, Adapter(rank=2, alpha=4), seed=0)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    return model, parameters


def velocity_and_gradient(flux: Flux, memory: Memory) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model, parameters = loaded(flux, memory)
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    v = model.velocity(x, 0.7, model.encode([PROMPT])[0])
    v.square().sum().backward()
    return v.detach(), [p.grad for p in parameters if p.grad is not None]


@pytest.mark.parametrize(("every", "recomputed"), [(1, 2), (2, 1)])
def test_recomputed_activations_give_the_same_gradient(
    flux: Flux, every: int, recomputed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = velocity_and_gradient(flux, Memory())
    checkpoint, calls = recomputation.checkpoint, []
    monkeypatch.setattr(recomputation, "checkpoint", lambda *a, **k: calls.append(a[0]) or checkpoint(*a, **k))
    v, gradient = velocity_and_gradient(flux, Memory(checkpoint_every=every))
    assert len(calls) == recomputed
    assert torch.equal(v, expected[0]) and all(map(torch.equal, gradient, expected[1]))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    """The modules that are compiled, without a compiler: the tracing is what may go wrong."""
    compiled: list[torch.nn.Module] = []
    compile_module = torch.nn.Module.compile

    def traced(self: torch.nn.Module, *args: Any, **options: Any) -> None:
        compiled.append(self)
        compile_module(self, *args, backend="eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    return compiled


def test_compiled_blocks_give_the_same_velocity_with_and_without_the_adapter(
    flux: Flux, compiled: list[torch.nn.Module]
) -> None:
    plain, fast = loaded(flux, Memory())[0], loaded(flux, Memory(compile=True))[0]
    assert compiled == repeated_blocks(fast.transformer)
    x, conditioning = torch.randn(2, *plain.latent_shape), plain.encode([PROMPT])[0]
    policies = [BoundPolicy(model, conditioning, None) for model in (plain, fast)]  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        ours, theirs = ([p.velocity(x, 0.7), p.reference_velocity(x, 0.7), p.velocity(x, 0.3)] for p in policies)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two)
    assert not torch.allclose(theirs[0], theirs[1])


@pytest.mark.usefixtures("compiled")
def test_a_compiled_block_has_a_version_for_each_of_many_shapes() -> None:
    """As many as a run of several micro-batches, sizes and kinds of pass may ask for, none of which may run uncompiled."""

    class Block(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # Dynamo leaves torch's own alone
            return super().forward(input).relu()

    class Blocks(torch.nn.Sequential):
        _no_split_modules = ("Block",)

    blocks = Blocks(Block(2, 2), Block(2, 2))
    strict = {"recompile_limit": 8, "fail_on_recompile_limit_hit": True, "automatic_dynamic_shapes": False}
    with torch._dynamo.config.patch(strict):
        Memory(compile=True).apply(blocks)
        for tokens in range(1, 13):
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    blocks(torch.zeros(tokens, 2))


def test_the_attention_back_end_can_be_chosen(flux: Flux, tmp_path: Path) -> None:
    model, _ = loaded(flux, Memory(attention="_native_math"))
    try:
        expected, _ = velocity_and_gradient(flux, Memory())
        x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(model.velocity(x, 0.7, model.encode([PROMPT])[0]).detach(), expected)
        with pytest.raises(ValueError, match=r"memory\.attention is 'nativ'; known here: .*native"):
            loaded(flux, Memory(attention="nativ"))
        with pytest.raises(ValueError, match="which cannot be used here"):
            loaded(flux, Memory(attention="sage"))
    finally:
        model.transformer.set_attention_backend("native")  # diffusers also keeps it for the whole process
    tiny_sd3().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="SD3Transformer2DModel always uses PyTorch's SDPA"):
        Sd3(model=str(tmp_path), memory=Memory(attention="_native_math")).load("cpu")


def test_slices_are_the_same_pictures(flux: Flux) -> None:
    plain, sliced = flux.load("cpu"), replace(flux, memory=Memory(vae_slicing=True, vae_tiling=True)).load("cpu")
    assert sliced.pipeline.vae.use_slicing and sliced.pipeline.vae.use_tiling
    x = torch.randn(3, *plain.latent_shape)
    for one, two in zip(plain.decode(x), sliced.decode(x), strict=True):
        assert np.abs(one.astype(int) - two).max() <= 1  # another batch, another order of summation


def test_bfloat16_weights_keep_adapter_optimiser_and_log_probs_in_float32(config: RunConfig) -> None:
    config = replace(config, generator=replace(config.generator, dtype="bfloat16"))  # pyright: ignore[reportArgumentType]
    learner, worker = Learner(config), RolloutWorker(config)
    base = [p for p in learner.model.transformer.parameters() if not p.requires_grad]
    assert {p.dtype for p in base} == {torch.bfloat16} and {p.dtype for p in learner.parameters} == {torch.float32}
    group = worker.generate(0, PROMPT, learner.adapter())
    kept = group.trajectories
    assert {kept.latents_GKNC.dtype, kept.next_latents_GKNC.dtype, kept.logprobs_GK.dtype} == {torch.float32}
    policy = BoundPolicy(learner.model, group.conditioning, config.sampling.dynamics)
    assert torch.equal(policy.rescore(kept, 1).logprob, kept.logprobs_GK[:, 1])
    learner.update([group], [np.array([1.0, -1.0, 1.0, -1.0])], 0)
    moments = [t for state in learner.optimizer.state.values() for t in state.values()]
    assert moments and {t.dtype for t in moments} == {torch.float32}


@pytest.mark.parametrize(
    ("device", "dtype", "precision"),
    [("cuda", "bfloat16", "high"), ("cuda", "float32", "highest"), ("cpu", "bfloat16", "highest")],
)
def test_an_adapter_beside_bfloat16_on_a_gpu_takes_tensor_cores(
    flux: Flux, device: str, dtype: str, precision: str
) -> None:
    class Unloaded(PictureModel):
        def _load(self) -> Any:
            return SimpleNamespace(transformer=None)

        def _fit(self) -> None:
            pass

    before = torch.get_float32_matmul_precision()
    try:
        Unloaded(replace(flux, dtype=dtype), device)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_parts_wake_for_their_work_and_sleep_after_it() -> None:
    part = SimpleNamespace(places=[])
    part.to = part.places.append
    for offload in (True, False):
        model: Any = SimpleNamespace(device="cuda", config=SimpleNamespace(memory=Memory(offload=offload)))
        with PictureModel.awake(model, part):
            assert part.places.pop() == "cuda"
        assert part.places == (["cpu"] if offload else [])
        part.places.clear()


def test_offloading_is_the_same_picture(flux: Flux) -> None:
    plain, sleepy = flux.load("cpu"), replace(flux, memory=Memory(offload=True)).load("cpu")
    x = torch.randn(1, *plain.latent_shape)
    for model in (plain, sleepy):
        assert np.array_equal(model.decode(x)[0], plain.decode(x)[0])
        assert torch.equal(model.encode([PROMPT])[0]["embeds"], plain.encode([PROMPT])[0]["embeds"])


# ---------------------------------------------------------------- refused


def complaints(part: Any) -> dict[str, str]:
    return dict(part.problems())


def test_what_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = complaints(Memory(checkpoint_every=-1, attention="", base_bits=3, encodings=str(tmp_path / "file")))
    assert said.keys() == {"checkpoint_every", "attention", "base_bits", "encodings"}


def test_bitsandbytes_is_asked_for_where_weights_are_loaded_and_not_in_a_configuration(
    flux: Flux, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    quantised = replace(flux, memory=Memory(base_bits=4))
    assert not complaints(quantised.memory)
    with pytest.raises(ValueError, match=r"generator\.memory\.base_bits is 4.*pip install bitsandbytes"):
        quantised.load("cpu")


def test_a_dry_run_warns_of_what_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else found(name, *a)
    )
    words = ["train", "experiments/shapes_image.py", "--dry-run"]
    assert main([*words, "generator.memory.base_bits=4", "placement.learner_gpus=1", "placement.rollout_gpus=1"]) == 0
    assert "warning: not on this machine: generator.memory.base_bits is 4" in capsys.readouterr().out
    assert main(words) == 0
    assert "warning" not in capsys.readouterr().out


def test_settings_of_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Memory, "check_installed", lambda _: None)
    assert Memory().quantization(torch.bfloat16) is None
    four = Memory(base_bits=4).quantization(torch.bfloat16)
    assert four.quant_kwargs["load_in_4bit"] and "transformer" in four.components_to_quantize


def test_a_model_with_a_part_missing_or_of_another_class(tmp_path: Path, flux: Flux) -> None:
    tiny_flux().save_pretrained(tmp_path)
    for file in (tmp_path / "vae").iterdir():
        file.unlink()
    assert "has no vae" in complaints(Flux(model=str(tmp_path)))["model"]
    assert "needs a FluxKontextPipeline" in complaints(FluxKontext(model=flux.model))["model"]


def test_a_size_that_packing_cannot_hold_is_refused_by_the_vaes_own_factor(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"block_out_channels": [8, 8, 8, 8, 8]}')
    said = complaints(Flux(model=str(tmp_path), height=48, width=64))
    assert "needs a multiple of 32" in said["height"] and "width" not in said
    assert "multiple of 16" in complaints(Flux(model="owner/name", height=40))["height"]


def test_a_prompt_over_the_limit_is_named_with_its_length(flux: Flux) -> None:
    short = replace(flux, max_sequence_length=6)
    short.check([Prompt(id="fits", text="a red circle on a white")])
    with pytest.raises(ValueError, match=r"prompt 'long' has 7 tokens, more than generator.max_sequence_length=6"):
        short.check([Prompt(id="fits", text="a red"), Prompt(id="long", text=PROMPT.text)])


def test_an_editor_needs_a_picture_it_can_read(flux: Flux, tmp_path: Path) -> None:
    editor = FluxKontext(model=flux.model)
    with pytest.raises(ValueError, match=r"prompt 'p0' has no reference\['source'\]"):
        editor.check([PROMPT])
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"prompt 'p1'.*no.png.*cannot be read"):
        editor.check([Prompt(id="p1", text="blue", reference={"source": str(tmp_path / "no.png")})])


@pytest.mark.parametrize(
    ("kind", "way_out"),
    [("GatedRepoError", "Accept its licence"), ("RepositoryNotFoundError", "knows no such model"), ("LocalEntryNotFoundError", "cannot be reached")],
)  # fmt: skip
def test_what_the_hub_says_is_told_apart(kind: str, way_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import FluxPipeline

    def refuse(*_: Any, **__: Any) -> None:
        try:
            raise type(kind, (Exception,), {})("from the Hub")
        except Exception as error:
            raise OSError("no model") from error

    monkeypatch.setattr(FluxPipeline, "from_pretrained", refuse)
    with pytest.raises(ValueError, match=way_out):
        load_pipeline("FluxPipeline", "owner/name")
