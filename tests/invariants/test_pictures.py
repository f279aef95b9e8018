"""Picture generators: encoding, sampling at a = 0 and decoding equal the stock pipeline's, with the adapter too; ratio 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from grpo_flex.config import Adapter
from grpo_flex.dynamics import FlowSde, step
from grpo_flex.generators.flux import Flux, FluxKontext
from grpo_flex.generators.flux2 import Flux2Dev, Flux2DevEdit, Flux2Klein, Flux2KleinEdit
from grpo_flex.generators.qwen_image import QwenImage
from grpo_flex.generators.sd3 import Sd3
from grpo_flex.generators.z_image import ZImage
from grpo_flex.rollout import _together
from grpo_flex.types import Prompt
from grpo_flex.weights import attach_adapter, read_adapter
from tests import tiny_pictures as tiny
from tests.tiny import tiny_flux

SIZE, STEPS = 64, 3
TEXT = "a red circle on a black background"


@dataclass(frozen=True, kw_only=True)
class Case:
    make: Callable[[], Any]
    generator: Callable[..., Any]
    settings: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    """What the stock pipeline is called with besides prompt, size, steps and latents."""
    latents: str = "packed"
    """The form in which the stock pipeline takes latents: packed [B, N, C], or a "grid" [B, C, h, w]."""
    shift: float = 0.0


CASES = {
    "flux-dev": Case(make=tiny.tiny_flux_dev, generator=Flux, call={"guidance_scale": 3.5}),
    "flux-schnell": Case(make=tiny_flux, generator=Flux, call={"guidance_scale": 0.0}),
    "flux-shift-3": Case(make=tiny_flux, generator=Flux, shift=3.0),
    "kontext": Case(make=tiny.tiny_kontext, generator=FluxKontext, call={"guidance_scale": 2.5, "max_area": SIZE**2, "_auto_resize": False}),
    "klein": Case(make=tiny.tiny_klein, generator=Flux2Klein, call={"guidance_scale": 4.0}, latents="grid"),
    "klein-distilled": Case(make=lambda: tiny.tiny_klein(distilled=True), generator=Flux2Klein, latents="grid"),
    "klein-edit": Case(make=tiny.tiny_klein, generator=Flux2KleinEdit, call={"guidance_scale": 4.0}, latents="grid"),
    "flux2-dev": Case(make=tiny.tiny_flux2_dev, generator=Flux2Dev, settings={"max_sequence_length": 64}, call={"guidance_scale": 4.0}, latents="grid"),
    "flux2-dev-edit": Case(make=tiny.tiny_flux2_dev, generator=Flux2DevEdit, settings={"max_sequence_length": 64}, call={"guidance_scale": 4.0}, latents="grid"),
    "sd3": Case(make=tiny.tiny_sd3, generator=Sd3, settings={"negative": "blue"}, call={"guidance_scale": 7.0, "negative_prompt": "blue"}, latents="grid"),
    "qwen-image": Case(make=tiny.tiny_qwen_image, generator=QwenImage, settings={"max_sequence_length": 64}, call={"true_cfg_scale": 4.0, "negative_prompt": " "}),
    "z-image": Case(make=tiny.tiny_z_image, generator=ZImage, settings={"guidance": 5.0}, call={"guidance_scale": 5.0}, latents="grid"),
    "z-image-turbo": Case(make=tiny.tiny_z_image, generator=ZImage, call={"guidance_scale": 0.0}, latents="grid"),
}  # fmt: skip


@dataclass
class Pair:
    case: Case
    stock: Any
    model: Any
    prompt: Prompt

    def expected(self, noise: torch.Tensor) -> np.ndarray:
        """The stock pipeline's pictures from the same noise, as [B, H, W, 3] numbers of 0 to 255."""
        if self.case.latents == "grid":
            h, w = self.model._grid
            side = 1 if noise.shape[1] == h * w else 2
            noise = noise.transpose(1, 2).unflatten(2, (side * h, side * w))
        source = {"image": Image.open(self.prompt.reference["source"])} if self.prompt.reference else {}
        call: dict[str, Any] = {"max_sequence_length": self.model.config.max_sequence_length} | source | self.case.call
        return 255 * self.stock(
            prompt=TEXT, height=SIZE, width=self.model.config.width, num_inference_steps=STEPS, latents=noise,
            num_images_per_prompt=len(noise), output_type="np", **call,
        ).images  # fmt: skip

    def sampled(self, noise: torch.Tensor) -> np.ndarray:
        """The trainer's, by its own step function at a = 0."""
        conditioning, x = self.model.encode([self.prompt])[0], noise
        with torch.no_grad():
            for sigma, sigma_next in pairwise(self.model.sigmas(STEPS)):
                v = self.model.velocity(x, sigma, conditioning)
                x = step(FlowSde(a=0), x, v, sigma, sigma_next).next_sample
        return np.concatenate(self.model.decode(x)).astype(float)


@pytest.fixture(scope="module", params=CASES.values(), ids=[*CASES])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    case: Case = request.param
    folder = tmp_path_factory.mktemp("picture")
    stock = case.make()
    stock.set_progress_bar_config(disable=True)
    stock.save_pretrained(folder)
    settings = {"max_sequence_length": 16, "shift": case.shift} | case.settings
    generator = case.generator(model=str(folder), height=SIZE, width=SIZE, **settings)
    assert not list(generator.problems())
    reference = {"source": _source(folder)} if generator.edits else {}
    prompt = Prompt(id="p0", text=TEXT, reference=reference)
    generator.check([prompt])
    return Pair(case, stock, generator.load("cpu"), prompt)


def _source(folder: Path, width: int = SIZE) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, width, 3), dtype=np.uint8)
    path = folder / f"source_{width}.png"
    Image.fromarray(pixels).save(path)
    return str(path)


def noise_of(pair: Pair, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, *pair.model.latent_shape, generator=torch.Generator().manual_seed(1))


def test_pictures_are_the_stock_pipelines(pair: Pair) -> None:
    noise = noise_of(pair)
    expected, ours = pair.expected(noise), pair.sampled(noise)
    assert np.abs(expected - expected[:1]).max() > 2  # the noise shows, so equality says something
    assert np.abs(expected - ours).max() <= 0.51  # ours are rounded


def test_so_are_those_of_another_size_than_the_models(pair: Pair, tmp_path: Path) -> None:
    config, width = pair.model.config, 2 * SIZE
    wider = pair.model.resized(replace(config, width=width))
    prompt = replace(pair.prompt, reference={"source": _source(tmp_path, width)}) if config.edits else pair.prompt
    area = {"max_area": SIZE * width} if "max_area" in pair.case.call else {}
    wide = replace(pair, model=wider, prompt=prompt, case=replace(pair.case, call={**pair.case.call, **area}))
    noise = noise_of(wide)
    expected, ours = wide.expected(noise), wide.sampled(noise)
    assert ours.shape == (2, SIZE, width, 3)
    assert np.abs(expected - ours).max() <= 0.51
    assert pair.model.resized(config) is pair.model and pair.model.config.width == SIZE
    with pytest.raises(ValueError, match="needs multiples of"):
        pair.model.resized(replace(config, width=SIZE + 1))


def test_the_limit_is_counted_in_the_tokens_that_the_model_sees(pair: Pair) -> None:
    config = pair.model.config
    count = config.tokens(pair.model._tokenizers, TEXT)
    if "mask" in (encoded := pair.model.encode([pair.prompt])[0]):  # encodings without padding show it
        assert encoded["embeds"].shape[1] == count
    replace(config, max_sequence_length=count).check([pair.prompt])
    with pytest.raises(ValueError, match=f"prompt 'p0' has {count} tokens"):
        replace(config, max_sequence_length=count - 1).check([pair.prompt])


def test_a_batch_of_prompts_is_each_by_itself(pair: Pair) -> None:
    prompts = [pair.prompt, Prompt(id="p1", text="blue", reference=pair.prompt.reference)]
    conditionings, x = pair.model.encode(prompts), noise_of(pair)
    with torch.no_grad():
        both = pair.model.velocity(x, 0.6, _together(conditionings))
        each = [pair.model.velocity(x[i : i + 1], 0.6, conditionings[i]) for i in range(2)]
    torch.testing.assert_close(both, torch.cat(each), rtol=1e-4, atol=1e-5)
    assert (both[0] - pair.model.velocity(x[:1], 0.6, conditionings[1])).abs().max() > 1e-4


def test_the_exported_adapter_gives_the_trainers_pictures(pair: Pair, tmp_path: Path) -> None:
    noise = noise_of(pair)
    before = pair.sampled(noise)
    parameters = attach_adapter(pair.model, Adapter(rank=2, alpha=8), seed=0)
    x, conditioning = noise, pair.model.encode([pair.prompt])[0]
    with torch.no_grad():
        for p in parameters:
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
        # Same weights, same batch: what the rollout computed is what the update computes, bit for bit.
        first = pair.model.velocity(x, 0.8, conditioning)
    again = pair.model.velocity(x, 0.8, conditioning)
    assert torch.equal(first, again.detach()) and again.dtype == torch.float32
    tensors = read_adapter(pair.model.transformer, 0).tensors
    pair.model.save_adapter(tmp_path, tensors, rank=2, alpha=8.0)
    pair.stock.load_lora_weights(tmp_path)
    after = pair.sampled(noise)
    assert np.abs(after - before).max() > 2
    assert np.abs(pair.expected(noise) - after).max() <= 0.51
