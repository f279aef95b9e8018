"""FLUX.1 (dev, schnell and anything of their class) through diffusers' own classes.

Time scale: the transformer takes t = σ in [0, 1] (the pipeline's timestep / 1000). Latents are packed 2×2, so a
picture of H×W pixels has N = (H/16)·(W/16) tokens of C = 4·latent_channels. Guidance is embedded (dev), never
classifier-free; the same value goes into rollout, update and reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_flex.dynamics import shifted_sigmas
from grpo_flex.generators.base import folder_problems

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from grpo_flex.generators.base import Conditioning


@dataclass(frozen=True, kw_only=True)
class Flux:
    """FLUX.1 text-to-image."""

    model: str
    """A folder with a saved FluxPipeline, or a Hugging Face Hub id."""
    height: int = 512
    width: int = 512
    guidance: float = 3.5
    """Embedded guidance; ignored by models without the embedding (schnell)."""
    shift: float = 3.0
    """Time shift of the σ schedule."""
    max_sequence_length: int = 512
    """Tokens of the T5 prompt."""
    dtype: str = "float32"
    """Precision of the frozen base weights: float32 or bfloat16."""

    def problems(self) -> Iterator[tuple[str, str]]:
        for name in ("height", "width"):
            if getattr(self, name) < 16 or getattr(self, name) % 16:
                yield (
                    name,
                    f"is {getattr(self, name)}; FLUX packs 2×2 blocks of 8-pixel latents, so it needs a multiple of 16",
                )
        if self.shift <= 0:
            yield "shift", f"is {self.shift}; it needs to be above 0 (1 leaves the schedule linear)"
        if self.dtype not in ("float32", "bfloat16"):
            yield "dtype", f"is {self.dtype!r}; it needs to be float32 or bfloat16"
        yield from folder_problems(self.model, "FluxPipeline", "black-forest-labs/FLUX.1-dev")

    def load(self, device: str) -> FluxModel:
        return FluxModel(self, device)


class FluxModel:
    """A loaded FluxPipeline, taken apart into what the trainer needs."""

    # Attention and feed-forward projections of both block kinds, and the output layer (also a "proj_out"); norms and
    # embedders stay frozen.
    adapter_targets: tuple[str, ...] = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out",
    )  # fmt: skip

    def __init__(self, config: Flux, device: str) -> None:
        import torch

        self.config, self.device = config, device
        self.pipeline = _load_pipeline(config, getattr(torch, config.dtype)).to(device)
        for part in (
            self.pipeline.transformer,
            self.pipeline.vae,
            self.pipeline.text_encoder,
            self.pipeline.text_encoder_2,
        ):
            part.requires_grad_(False).eval()
        self.transformer: Any = self.pipeline.transformer
        scale = self.pipeline.vae_scale_factor * 2
        if config.height % scale or config.width % scale:
            raise ValueError(
                f"generator.height × width is {config.height}×{config.width}; {config.model} needs multiples of {scale}"
            )
        self._grid = (config.height // scale, config.width // scale)
        self.latent_shape: tuple[int, int] = (self._grid[0] * self._grid[1], self.transformer.config.in_channels)
        self._img_ids = self.pipeline._prepare_latent_image_ids(1, *self._grid, torch.device(device), torch.float32)

    def encode(self, texts: Sequence[str]) -> list[Conditioning]:
        import torch

        with torch.no_grad():
            embeds, pooled, _ = self.pipeline.encode_prompt(
                list(texts), list(texts), device=self.device, max_sequence_length=self.config.max_sequence_length
            )
        return [{"embeds": embeds[i : i + 1], "pooled": pooled[i : i + 1]} for i in range(len(texts))]

    def sigmas(self, steps: int) -> tuple[float, ...]:
        return shifted_sigmas(steps, self.config.shift)

    def velocity(self, x: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        import torch

        batch, dtype = x.shape[0], self.transformer.dtype
        embeds = conditioning["embeds"].to(self.device, dtype)
        guidance = x.new_full((batch,), self.config.guidance) if self.transformer.config.guidance_embeds else None
        return self.transformer(
            hidden_states=x.to(dtype),
            timestep=x.new_full((batch,), sigma).to(dtype),
            guidance=guidance,
            pooled_projections=conditioning["pooled"].to(self.device, dtype).expand(batch, -1),
            encoder_hidden_states=embeds.expand(batch, -1, -1),
            # RoPE positions of text are all zero, but their number is the padded length.
            txt_ids=torch.zeros(embeds.shape[1], 3, device=self.device),
            img_ids=self._img_ids,
            return_dict=False,
        )[0].float()

    def decode(self, x: Tensor) -> list[np.ndarray]:
        import torch

        vae, config = self.pipeline.vae, self.config
        with torch.no_grad():
            latents = self.pipeline._unpack_latents(x, config.height, config.width, self.pipeline.vae_scale_factor)
            latents = latents / vae.config.scaling_factor + vae.config.shift_factor
            pixels = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        pictures = self.pipeline.image_processor.postprocess(pixels, output_type="np")
        return [(picture[None] * 255).round().astype("uint8") for picture in pictures]

    def save_adapter(self, folder: Path, tensors: Mapping[str, Tensor], rank: int, alpha: float) -> Path:
        metadata = {"r": rank, "lora_alpha": alpha, "target_modules": sorted({_module(key) for key in tensors})}
        self.pipeline.save_lora_weights(
            folder, transformer_lora_layers=dict(tensors), transformer_lora_adapter_metadata=metadata
        )
        return Path(folder) / "pytorch_lora_weights.safetensors"


def _module(key: str) -> str:
    return key.split(".lora_")[0]


def _load_pipeline(config: Flux, dtype: Any) -> Any:
    from diffusers import FluxPipeline

    try:
        return FluxPipeline.from_pretrained(config.model, dtype=dtype)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"generator.model {config.model!r} cannot be loaded as a FluxPipeline: {error}\n"
            "Give a folder written by FluxPipeline.save_pretrained, or a Hub id that this machine can reach "
            "(accept the model's licence on the Hub and set HF_TOKEN first, or download it elsewhere and pass its path)."
        ) from error
