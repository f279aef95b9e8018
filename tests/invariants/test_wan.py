"""Wan's sampler, its two experts and their adapters agree with the stock pipeline (random tiny models, CPU, float32)."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# diffusers annotates pipelines by their tuple form.
from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline

from grpo_flex.config import ConfigError, RunConfig
from grpo_flex.evaluate import read_lora
from grpo_flex.generators.memory import Memory
from grpo_flex.generators.wan import EXPERTS, Wan
from grpo_flex.learner import BoundPolicy, Learner
from grpo_flex.objectives.nft import Nft
from grpo_flex.rollout import UNTRAINED, RolloutWorker, motion
from grpo_flex.types import Adapter, Prompt
from reward_server.families.flex import Flex
from tests.configs import judge_of
from tests.tiny import tiny_wan

PROMPT = Prompt(id="p0", text="a red circle on a black background")
BOUNDARY = 0.7
SIZE = {"height": 32, "width": 32}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, str]]:
    """Folders of a pipeline with one expert and of one with two."""
    root = tmp_path_factory.mktemp("wan")
    for experts, boundary in ((1, None), (2, BOUNDARY)):
        tiny_wan(boundary).save_pretrained(root / str(experts))
    yield {experts: str(root / str(experts)) for experts in (1, 2)}


def wan(folder: str, **changes: Any) -> Wan:
    given: dict[str, Any] = {"frames": 5, "guidance": 4.0, "max_sequence_length": 16, **SIZE, **changes}
    return Wan(model=folder, **given)


def configured(config: RunConfig, generator: Wan, **changes: Any) -> RunConfig:
    return replace(config, generator=generator, **changes)


class WanSchedule(FlowMatchEulerDiscreteScheduler):
    """Euler on the schedule of Wan's own UniPC: left alone, this scheduler would end its line at another last σ."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:  # pyright: ignore
        super().set_timesteps(sigmas=np.linspace(1, 1 / num_inference_steps, num_inference_steps), device=device)


def stock(folder: str, shift: float = 3.0) -> Any:
    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.scheduler = WanSchedule(shift=shift)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_stock(pipeline: Any, worker: RolloutWorker, seeds: list[int], steps: int, output: str, **guidance: Any) -> Any:
    packed = worker._noise(seeds)
    grid = worker.model._clip  # pyright: ignore
    latents = packed.transpose(1, 2).unflatten(2, grid)
    return pipeline(
        prompt=[PROMPT.text] * len(seeds), num_frames=5, num_inference_steps=steps, latents=latents,
        max_sequence_length=16, output_type=output, **SIZE, **guidance,
    ).frames  # fmt: skip


def test_the_schedule_is_that_of_wans_own_scheduler(folders: dict[int, str]) -> None:
    """But for its last thousandth: before the shift theirs goes to 0.001, ours to 0."""
    theirs = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    theirs.set_timesteps(20)
    ours = wan(folders[1], shift=3.0).load("cpu").sigmas(20)
    # Theirs is in float32 and begins at 1 − 10⁻⁶.
    for sigmas, way, tolerance in ((ours, 1.0, 1e-12), (theirs.sigmas.numpy(), 0.999, 2e-6)):
        u = 1 - way * np.arange(20) / 20
        np.testing.assert_allclose(np.array(sigmas), np.append(3 * u / (1 + 2 * u), 0), rtol=0, atol=tolerance)
    assert ours[-2] == pytest.approx(0.1364, abs=1e-4) and theirs.sigmas[-2] == pytest.approx(0.1387, abs=1e-4)


@pytest.mark.parametrize(
    ("experts", "given", "guidance"),
    [
        (1, {"guidance": 4.0}, {"guidance_scale": 4.0}),
        (1, {"guidance": 1.0, "shift": 5.0}, {"guidance_scale": 1.0}),
        (2, {"guidance": 4.0, "guidance_2": 3.0}, {"guidance_scale": 4.0, "guidance_scale_2": 3.0}),
        (2, {"guidance": 4.0, "batched_guidance": True, "negative": "blue"}, {"guidance_scale": 4.0, "negative_prompt": "blue"}),
    ],
    ids=["guided", "plain", "experts", "batched"],
)  # fmt: skip
def test_sampler_without_noise_equals_the_diffusers_pipeline(
    config: RunConfig, folders: dict[int, str], experts: int, given: dict[str, Any], guidance: dict[str, Any]
) -> None:
    generator = wan(folders[experts], **given)
    worker, seeds = RolloutWorker(configured(config, generator)), [11, 12]
    if "negative_prompt" in guidance:
        guidance = guidance | {"negative_prompt": ["blue"] * 2}
    sigmas = worker.model.sigmas(6)
    assert experts == 1 or sigmas[1] > BOUNDARY > sigmas[-2]  # both experts take steps
    with torch.no_grad():
        ours = worker.model.decode(worker.sample_ode(worker.model.encode([PROMPT])[0], seeds, 6))
    theirs = run_stock(stock(folders[experts], generator.shift), worker, seeds, 6, "np", **guidance)
    assert ours[0].shape == (5, 32, 32, 3)
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(a.astype(int) - (b * 255).round().astype(int)).max() <= 1  # one grey level of rounding
    assert np.ptp(ours[0]) > 20  # there is something to see


def test_heldout_clips_of_another_size_are_those_of_a_generator_of_that_size(
    config: RunConfig, folders: dict[int, str]
) -> None:
    large = {"width": 64, "shift": 5.0}
    evaluation = replace(config.evaluation, scorer=None, **large)
    judge = replace(judge_of(config), family=Flex(medium="video"))
    changed = configured(config, wan(folders[2]), evaluation=evaluation, judge=judge)
    changed.validate()
    worker = RolloutWorker(changed)
    (ours,) = worker.evaluate([PROMPT], UNTRAINED)
    expected = RolloutWorker(
        configured(config, wan(folders[2], **large), evaluation=replace(config.evaluation, scorer=None))
    )
    assert ours.media.shape == (5, 32, 64, 3)
    assert np.array_equal(ours.media, expected.evaluate([PROMPT], UNTRAINED)[0].media)
    assert worker.generate(0, PROMPT, UNTRAINED).media_G[0].shape == (5, 32, 32, 3)
    with pytest.raises(ConfigError, match=r"evaluation\.width is 65; Wan packs"):
        replace(changed, evaluation=replace(evaluation, width=65)).validate()


def test_slices_and_recomputed_activations_change_no_number(config: RunConfig, folders: dict[int, str]) -> None:
    x = torch.randn(2, 32, 4, generator=torch.Generator().manual_seed(0))
    decoded, gradients = [], []
    for frugal in (False, True):
        memory = Memory(vae_slicing=frugal, vae_tiling=frugal, checkpoint_every=int(frugal), offload=frugal)
        learner = Learner(configured(config, wan(folders[1], memory=memory)))
        vae = learner.model.pipeline.vae
        assert (vae.use_slicing, vae.use_tiling) == (frugal, frugal)
        decoded.append(np.stack(learner.model.decode(x)))
        conditioning = learner.model.encode([PROMPT])[0]
        learner.model.velocity(x, 0.5, conditioning).square().mean().backward()
        gradients.append([p.grad.clone() for p in learner.parameters if p.grad is not None])
    assert np.abs(decoded[0].astype(int) - decoded[1]).max() <= 1
    assert any(g.any() for g in gradients[0])
    for kept, again in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, again)


def test_a_clip_that_is_larger_than_a_tile_is_decoded_in_tiles(
    config: RunConfig, folders: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles begin above 256 pixels; with smaller ones a small clip shows that they come out in their places."""
    x = torch.randn(1, 32, 4, generator=torch.Generator().manual_seed(0))
    learner = Learner(configured(config, wan(folders[1], memory=Memory(vae_tiling=True))))
    vae, tiled = learner.model.pipeline.vae, []
    decode = vae.tiled_decode
    monkeypatch.setattr(vae, "tiled_decode", lambda *words, **named: tiled.append(1) or decode(*words, **named))
    whole = learner.model.decode(x)[0].astype(int)
    assert not tiled
    vae.enable_tiling(24, 24, 16, 16)
    joined = learner.model.decode(x)[0].astype(int)
    assert tiled and joined.shape == whole.shape
    apart = np.abs(joined - whole).mean()
    assert apart < 0.9 * np.abs(joined[..., ::-1, :] - whole).mean()  # nearer than its mirror image, for random weights


def nudged(learner: Learner, scale: float = 0.3) -> Adapter:
    """An adapter that does something: a fresh one has B = 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in learner.parameters:
            p.add_(scale * torch.randn(p.shape, generator=generator))
    state = learner.state()
    learner.load_state({key: state[key] for key in ("version", "adapter", "optimizer")})
    return learner.adapter()


@pytest.mark.parametrize("batched", [False, True])
def test_ratio_is_exactly_one_before_the_first_update(
    config: RunConfig, folders: dict[int, str], batched: bool
) -> None:
    sampling = replace(config.sampling, steps=5)
    config = configured(config, wan(folders[2], batched_guidance=batched), sampling=sampling)
    learner = Learner(config)
    group = RolloutWorker(config).generate(0, PROMPT, nudged(learner))
    policy = BoundPolicy(learner.model, group.conditioning, config.sampling.dynamics)
    served = {id(learner.model.expert(group.trajectories.sigmas[k])[0]) for k in group.trajectories.steps_K}
    assert len(served) == 2
    for k in range(len(group.trajectories.steps_K)):
        assert torch.equal(policy.rescore(group.trajectories, k).logprob, group.trajectories.logprobs_GK[:, k])
    numbers = learner.update([group], [np.array([1.0, -1.0, 1.0, -1.0])], 0).metrics
    assert numbers["policy/first_log_ratio_abs"] == 0.0


def test_only_the_expert_that_serves_a_noise_level_learns_from_it(config: RunConfig, folders: dict[int, str]) -> None:
    learner = Learner(configured(config, wan(folders[2])))
    conditioning = learner.model.encode([PROMPT])[0]
    x = torch.randn(2, *learner.model.latent_shape, generator=torch.Generator().manual_seed(0))
    names = [n for n, p in learner.model.transformer.named_parameters() if p.requires_grad]
    # A step that lies on the boundary but for the last bit still belongs to the expert above it.
    for sigma, serving in ((0.9, "transformer."), (BOUNDARY - 1e-9, "transformer."), (0.3, "transformer_2.")):
        for p in learner.parameters:
            p.grad = None
        learner.model.velocity(x, sigma, conditioning).square().mean().backward()
        touched = {n.split("blocks.")[0] for n, p in zip(names, learner.parameters, strict=True) if p.grad is not None}
        assert touched == {serving}


def test_the_reference_is_the_base_of_both_experts(config: RunConfig, folders: dict[int, str]) -> None:
    base = wan(folders[2]).load("cpu")
    learner = Learner(configured(config, wan(folders[2])))
    nudged(learner)
    conditioning = base.encode([PROMPT])[0]
    policy = BoundPolicy(learner.model, conditioning, config.sampling.dynamics)
    x = torch.randn(2, *base.latent_shape, generator=torch.Generator().manual_seed(0))
    for sigma in (0.9, 0.3):
        with torch.no_grad():
            assert torch.equal(policy.reference_velocity(x, sigma), base.velocity(x, sigma, conditioning))
            assert not torch.equal(policy.velocity(x, sigma), base.velocity(x, sigma, conditioning))


@pytest.mark.parametrize("experts", [1, 2])
def test_the_saved_adapter_gives_the_trainers_clips_in_a_stock_pipeline(
    config: RunConfig, folders: dict[int, str], tmp_path: Path, experts: int
) -> None:
    config = configured(config, wan(folders[experts]))
    learner = Learner(config)
    adapter = nudged(learner)
    path = learner.save_adapter(tmp_path)
    worker, seeds = RolloutWorker(config), [3]
    conditioning = worker.model.encode([PROMPT])[0]
    with torch.no_grad():
        base = worker.sample_ode(conditioning, seeds, 5)
        worker.use(adapter)
        ours = worker.sample_ode(conditioning, seeds, 5)
    pipeline = stock(folders[experts])
    for name, file in list(EXPERTS.items())[:experts]:
        pipeline.load_lora_weights(
            tmp_path, weight_name=file, adapter_name=name, load_into_transformer_2=name == "transformer_2"
        )
    theirs = run_stock(pipeline, worker, seeds, 5, "latent", guidance_scale=4.0)
    torch.testing.assert_close(ours, theirs.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)
    assert (ours - base).abs().max() > 1e-2
    # `evaluate` reads the same files back.
    tensors, shape = read_lora(path)
    assert tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(tensors[k], adapter.tensors[k]) for k in tensors)
    again = RolloutWorker(replace(config, adapter=shape))
    again.use(Adapter(version=1, tensors=tensors))
    with torch.no_grad():
        assert torch.equal(again.sample_ode(conditioning, seeds, 5), ours)


def test_a_forward_process_objective_trains_both_experts(config: RunConfig, folders: dict[int, str]) -> None:
    config = configured(config, wan(folders[2]), objective=Nft(draws=4))
    learner = Learner(config)
    group = RolloutWorker(config).generate(0, PROMPT, learner.adapter())
    before = {k: v.clone() for k, v in learner.adapter().tensors.items()}
    learner.update([group], [np.array([1.0, -1.0, 1.0, -1.0])], 0)
    moved = {k.split(".")[0] for k, v in learner.adapter().tensors.items() if not torch.equal(v, before[k])}
    assert moved == set(EXPERTS)


def test_motion_is_reported_of_clips_and_of_nothing_else(config: RunConfig, folders: dict[int, str]) -> None:
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert motion(np.stack([black, white, white])) == {"motion": 0.5}
    assert motion(white[None]) == {}
    worker = RolloutWorker(configured(config, wan(folders[1])))
    (sample,) = worker.evaluate([PROMPT], Learner(worker.config).adapter())
    assert sample.scores["motion"] > 0 and "oracle" in sample.scores


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "field", "says"),
    [
        ({"frames": 8}, "frames", "4k + 1, e.g. 9"),
        ({"frames": 0}, "frames", "4k + 1, e.g. 1"),
        ({"height": 40}, "height", "multiple of 16"),
        ({"width": 0}, "width", "multiple of 16"),
        ({"boundary": 875.0}, "boundary", "between 0 and 1"),
        ({"boundary": 0.875}, "boundary", "one transformer"),
        ({"guidance_2": 3.0}, "guidance_2", "one transformer"),
        ({"guidance": 0.0}, "guidance", "no guidance"),
        ({"guidance": 1.0, "guidance_2": 3.0}, "guidance_2", "both experts or none"),
        ({"shift": 0.0}, "shift", "above 0"),
        ({"max_sequence_length": 999}, "max_sequence_length", "512"),
        ({"vae_dtype": "float16"}, "vae_dtype", "bfloat16"),
    ],
)
def test_what_cannot_run_is_a_complaint(folders: dict[int, str], changes: Any, field: str, says: str) -> None:
    assert any(name == field and says in text for name, text in wan(folders[1], **changes).problems())


def test_a_valid_configuration_has_no_complaint(folders: dict[int, str]) -> None:
    assert [list(wan(folders[experts]).problems()) for experts in (1, 2)] == [[], []]


def edited(folder: str, to: Path, **changes: Any) -> str:
    """A copy of a pipeline whose index says something else."""
    shutil.copytree(folder, to)
    index = to / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))
    return str(to)


@pytest.mark.parametrize(
    ("experts", "changes", "field", "says"),
    [
        (2, {"transformer_2": [None, None]}, "model", "no transformer_2"),
        (2, {"boundary_ratio": None}, "boundary", "states no boundary_ratio"),
        (1, {"_class_name": "FluxPipeline"}, "model", "FluxPipeline"),
    ],
)
def test_a_pipeline_that_lacks_a_part(
    folders: dict[int, str], tmp_path: Path, experts: int, changes: Any, field: str, says: str
) -> None:
    generator = wan(edited(folders[experts], tmp_path / "edited", **changes))
    assert says in dict(generator.problems())[field]
    if "_class_name" not in changes:
        with pytest.raises(ValueError, match=says) as refused:  # a Hub id is not looked into before it is loaded
            generator.load("cpu")
        assert str(refused.value).startswith(f"generator.{field} ")


def test_a_missing_boundary_can_be_given(folders: dict[int, str], tmp_path: Path) -> None:
    generator = wan(edited(folders[2], tmp_path / "edited", boundary_ratio=None), boundary=BOUNDARY)
    assert not list(generator.problems())
    model = generator.load("cpu")
    assert model.expert(0.8)[0] is not model.expert(0.6)[0]
