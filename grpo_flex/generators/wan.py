"""Wan2.1 and Wan2.2 text-to-video through diffusers' own classes.

Time scale: the transformers take t = 1000·σ, in float32 and never rounded. Latents: a clip of F×H×W pixels is
[C, F', H', W'] with F' = (F−1)/4 + 1, H' = H/8, W' = W/8; the trainer sees N = F'·H'·W' tokens of C channels, and the
transformer makes patches of them itself. Guidance is classifier-free, v = v_∅ + g·(v_prompt − v_∅), the same in
rollout, update and reference. Wan2.2-A14B has two experts: ``transformer`` serves σ ≥ boundary, ``transformer_2`` the rest;
each has its adapter, which learns from the noise levels that its expert serves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from grpo_flex.dynamics import shifted_sigmas
from grpo_flex.generators.base import LORA_FILE, SECOND_LORA_FILE, write_denoiser, write_lora
from grpo_flex.generators.known import index_of
from grpo_flex.generators.picture import NEGATIVE, Picture, PictureModel

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from grpo_flex.generators.base import Conditioning

TIMESTEPS = 1000.0
"""t of pure noise."""
ROUNDING = 1e-6
"""A σ this close below the boundary is on it: 20 steps at shift 3 meet 0.875, but for the last bit."""
EXPERTS = {"transformer": LORA_FILE, "transformer_2": SECOND_LORA_FILE}
"""The component of each expert, and the file of its adapter."""


@dataclass(frozen=True, kw_only=True)
class Wan(Picture):
    """Wan text-to-video, with one transformer (2.1) or two (2.2)."""

    height: int = 240
    width: int = 416
    frames: int = 33
    """4k + 1: the autoencoder keeps the first frame by itself and folds four by four after it."""
    fps: int = 16
    """Frames per second at which people are shown the clips."""
    guidance: float = 5.0
    """Classifier-free guidance; 1 is none, which halves the cost of rollout and update."""
    guidance_2: float | None = None
    """The same for the low-noise expert of Wan2.2; None: as ``guidance``."""
    boundary: float | None = None
    """σ from which on the high-noise expert serves; None: the pipeline's own ``boundary_ratio``."""
    negative: str = ""
    """The text of guidance's other branch."""
    batched_guidance: bool = False
    """Both branches of guidance in one batch: faster where the device is not busy, with twice as much in flight."""
    shift: float = 3.0
    """Time shift of the σ schedule; larger clips want more."""
    vae_dtype: str = "float32"
    """Precision of the autoencoder, which in time always decodes in chunks, one latent frame after the other."""

    pipeline: ClassVar[str] = "WanPipeline"
    example: ClassVar[str] = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    denoisers: ClassVar[tuple[str, ...]] = tuple(EXPERTS)

    def problems(self) -> Iterator[tuple[str, str]]:
        wrong = list(super().problems())
        yield from wrong
        if self.frames < 1 or self.frames % 4 != 1:
            yield "frames", f"is {self.frames}; Wan needs 4k + 1, e.g. {max(1, round((self.frames - 1) / 4) * 4 + 1)}"
        if self.fps < 1:
            yield "fps", f"is {self.fps}; a clip is shown at 1 frame per second or more"
        if self.shift == 0:
            yield (
                "shift",
                "is 0; Wan's own schedule depends on the scheduler, so give a shift above 0 (1 leaves it linear)",
            )
        if self.boundary is not None and not 0 < self.boundary < 1:
            yield "boundary", f"is {self.boundary}; it is a noise level between 0 and 1, e.g. 0.875"
        if self.vae_dtype not in ("float32", "bfloat16"):
            yield "vae_dtype", f"is {self.vae_dtype!r}; it needs to be float32 or bfloat16"
        yield from self._guidance_problems()
        if "model" not in dict(wrong) and (said := index_of(self.model)):
            two = (said.get("transformer_2") or [None])[0] is not None
            yield from self.expert_problems(two, said.get("boundary_ratio"))

    def _guidance_problems(self) -> Iterator[tuple[str, str]]:
        for name in ("guidance", "guidance_2"):
            if (value := getattr(self, name)) is not None and value < 1:
                yield name, f"is {value}; it needs to be 1 (no guidance) or more"
        if self.guidance == 1 and self.guidance_2 is not None and self.guidance_2 > 1:
            yield "guidance_2", "is above 1 while guidance is 1; the stock pipeline guides both experts or none"

    def expert_problems(self, two: bool, stated: float | None) -> Iterator[tuple[str, str]]:
        """What does not fit a pipeline with ``two`` transformers or one, whose ``boundary_ratio`` is ``stated``."""
        if two and self.boundary is None and stated is None:
            yield (
                "boundary",
                "is none and the pipeline states no boundary_ratio, so nobody knows at which noise level its two "
                "transformers take turns; give one, e.g. 0.875",
            )
        if two:
            return
        if stated is not None:
            yield (
                "model",
                f"states boundary_ratio={stated} but holds no transformer_2, so nothing would serve the noise below it; "
                "save the pipeline with both experts",
            )
        for name in ("boundary", "guidance_2"):
            if getattr(self, name) is not None:
                yield name, f"is {getattr(self, name)}, but the pipeline has one transformer; leave it at none"

    def load(self, device: str) -> WanModel:
        return WanModel(self, device)


class WanModel(PictureModel):
    """A loaded WanPipeline."""

    # Projections of self-attention, cross-attention and feed-forward; norms, embedders and the output layer stay frozen.
    adapter_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

    def __init__(self, config: Wan, device: str) -> None:
        super().__init__(config, device)
        self._experts = [e for name in EXPERTS if (e := getattr(self.pipeline, name)) is not None]
        self._boundary = self.pipeline.config.boundary_ratio if config.boundary is None else config.boundary
        if len(self._experts) > 1:
            self.transformer = _as_one(self._experts)

    def _load(self) -> Any:
        pipeline = super()._load()
        complaints = self.config.expert_problems(pipeline.transformer_2 is not None, pipeline.config.boundary_ratio)
        for name, text in complaints:
            raise ValueError(f"generator.{name} {text}")
        if (self.config.frames - 1) % pipeline.vae_scale_factor_temporal:
            raise ValueError(
                f"generator.frames is {self.config.frames}; {self.config.model} needs {pipeline.vae_scale_factor_temporal}k + 1"
            )
        pipeline.vae_scale_factor = pipeline.vae_scale_factor_spatial  # as the pipelines of pictures call it
        return pipeline

    def _dtypes(self) -> Any:
        import torch

        return {"default": self.dtype, "vae": getattr(torch, self.config.vae_dtype)}

    def _latent_shape(self) -> tuple[int, int]:
        folded = (self.config.frames - 1) // self.pipeline.vae_scale_factor_temporal + 1
        self._clip = (folded, 2 * self._grid[0], 2 * self._grid[1])
        return folded * 4 * self._grid[0] * self._grid[1], self.pipeline.transformer.config.in_channels

    def _other_branch(self) -> tuple[str, ...]:
        return (self.config.negative,) if self.config.guidance > 1 else ()

    def _text(self, stock: Any, text: str) -> Conditioning:
        """UMT5's states, zero where the text is padded."""
        embeds, _ = stock.encode_prompt(
            [text], do_classifier_free_guidance=False, max_sequence_length=self.config.max_sequence_length, device=self.device
        )  # fmt: skip
        return {"embeds": embeds}

    def sigmas(self, steps: int) -> tuple[float, ...]:
        return shifted_sigmas(steps, self.config.shift)

    def expert(self, sigma: float) -> tuple[nn.Module, float]:
        """The transformer that serves σ, and its guidance."""
        config = self.config
        if len(self._experts) == 1 or sigma >= self._boundary - ROUNDING:
            return self._experts[0], config.guidance
        return self._experts[1], config.guidance if config.guidance_2 is None else config.guidance_2

    def velocity(self, x: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        expert, guidance = self.expert(sigma)
        names = ("embeds", NEGATIVE + "embeds") if guidance > 1 else ("embeds",)
        texts = [self._here(conditioning[name], len(x)) for name in names]
        time = x.new_full((len(x),), TIMESTEPS * sigma)  # float32: bfloat16 would round it by up to 2
        prompted, *unprompted = (v.float() for v in self._branches(expert, self._unpacked(x), time, texts))
        v = unprompted[0] + guidance * (prompted - unprompted[0]) if unprompted else prompted
        return v.flatten(2).transpose(1, 2)

    def _branches(self, expert: nn.Module, clips: Tensor, time: Tensor, texts: list[Tensor]) -> Sequence[Tensor]:
        """v [B, C, F', H', W'] for each of the texts [B, tokens, width]: in one batch, or one after the other."""
        import torch

        clips = clips.to(self.dtype)
        if not self.config.batched_guidance:
            return [_call(expert, clips, time, text) for text in texts]
        n = len(texts)
        return _call(expert, clips.repeat(n, 1, 1, 1, 1), time.repeat(n), torch.cat(texts)).chunk(n)

    def _unpacked(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, C, F', H', W']."""
        return x.transpose(1, 2).unflatten(2, self._clip)

    def decode(self, x: Tensor) -> list[np.ndarray]:
        import torch

        vae = self.pipeline.vae
        with torch.no_grad(), self.awake(vae):
            pixels = vae.decode(self._latents(x).to(vae.dtype), return_dict=False)[0]
        clips = self.pipeline.video_processor.postprocess_video(pixels.float(), output_type="np")
        return [(clip * 255).round().astype("uint8") for clip in clips]

    def _latents(self, x: Tensor) -> Tensor:
        import torch

        said = self.pipeline.vae.config
        mean, std = (torch.tensor(given, device=x.device) for given in (said.latents_mean, said.latents_std))
        return self._unpacked(x * std + mean)

    def save_adapter(self, folder: Path, tensors: Mapping[str, Tensor], rank: int, alpha: float) -> Path:
        """The file of each expert (``EXPERTS``).

        The second is loaded with ``load_lora_weights(folder, weight_name=…, load_into_transformer_2=True)``.
        """
        if len(self._experts) == 1:
            return super().save_adapter(folder, tensors, rank, alpha)
        for expert, file in EXPERTS.items():
            write_lora(self.pipeline, folder, _of(expert, tensors), rank, alpha, file)
        return Path(folder) / LORA_FILE

    def save_weights(self, folder: Path, tensors: Mapping[str, Tensor]) -> Path:
        """A folder for each expert, named as the pipeline names it."""
        if len(self._experts) == 1:
            return super().save_weights(folder, tensors)
        for name in EXPERTS:
            write_denoiser(getattr(self.pipeline, name), folder / name, _of(name, tensors))
        return folder / "transformer"


def _of(expert: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one expert, by their names in it."""
    return {k.removeprefix(f"{expert}."): v for k, v in tensors.items() if k.startswith(f"{expert}.")}


def _call(expert: nn.Module, clips: Tensor, time: Tensor, text: Tensor) -> Tensor:
    return expert(hidden_states=clips, timestep=time, encoder_hidden_states=text, return_dict=False)[0]


def _as_one(experts: Sequence[nn.Module]) -> Any:
    """One module with both experts, which takes an adapter as each of them would."""
    from diffusers.loaders.peft import PeftAdapterMixin
    from torch import nn

    class Experts(PeftAdapterMixin, nn.ModuleDict):
        pass

    return Experts(dict(zip(EXPERTS, experts, strict=True)))
