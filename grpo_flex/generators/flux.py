"""FLUX.1: dev, schnell and anything of their class, and the editor Kontext, through diffusers' own classes.

Time scale: the transformer takes t = σ in [0, 1] (the pipeline's timestep / 1000). Latents are packed 2×2, so a
picture of H×W pixels has N = (H/16)·(W/16) tokens of C = 4·latent_channels; a source picture adds as many tokens after
them, with first position 1 instead of 0. Guidance is embedded (dev, Kontext), never classifier-free; the same value
goes into rollout, update and reference. The adapter sits on attention and feed-forward projections and the output layer.

Schedule: dev's own shift is exp(μ) with μ growing linearly from 0.5 at 256 tokens to 1.15 at 4096; schnell's is 1. The
default here is the constant 3 of Flow-GRPO and Pref-GRPO, close to dev's own at 1024×1024 (3.16), so that a recipe's
noise levels, and with them its clip range, stay as they are when the size changes. ``shift=0`` takes the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from grpo_flex.generators.picture import Picture, PictureModel

if TYPE_CHECKING:
    from torch import Tensor

    from grpo_flex.generators.base import Conditioning


@dataclass(frozen=True, kw_only=True)
class Flux(Picture):
    """FLUX.1 text-to-image."""

    guidance: float = 3.5
    """Embedded guidance; ignored by models without the embedding (schnell)."""
    shift: float = 3.0
    """Time shift of the σ schedule; 0: the model's own schedule."""

    pipeline: ClassVar[str] = "FluxPipeline"
    example: ClassVar[str] = "black-forest-labs/FLUX.1-dev"
    texts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    # T5 reads the whole prompt; CLIP, which gives one vector, reads its beginning (77 tokens) by design.
    tokenizer: ClassVar[str] = "tokenizer_2"

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if self.guidance < 0:
            yield "guidance", f"is {self.guidance}; embedded guidance is 0 or more (dev was distilled around 3.5)"

    def load(self, device: str) -> FluxModel:
        return FluxModel(self, device)


@dataclass(frozen=True, kw_only=True)
class FluxKontext(Flux):
    """FLUX.1-Kontext: edits the picture that a prompt's ``reference["source"]`` names.

    The source is brought to height×width (scaled to cover it, cut in the middle). Kontext was trained at about one megapixel.
    """

    guidance: float = 2.5

    pipeline: ClassVar[str] = "FluxKontextPipeline"
    example: ClassVar[str] = "black-forest-labs/FLUX.1-Kontext-dev"
    edits: ClassVar[bool] = True


class FluxModel(PictureModel):
    """A loaded FluxPipeline or FluxKontextPipeline."""

    # Both block kinds have a "proj_out", and the transformer too; norms and embedders stay frozen.
    adapter_targets: tuple[str, ...] = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out",
    )  # fmt: skip

    def _fit(self) -> None:
        import torch

        super()._fit()
        self._ids = self.pipeline._prepare_latent_image_ids(1, *self._grid, torch.device(self.device), torch.float32)
        if self.config.edits:
            self._ids = torch.cat([self._ids, self._ids + torch.tensor([1.0, 0.0, 0.0], device=self.device)])

    def _text(self, stock: Any, text: str) -> Conditioning:
        length = self.config.max_sequence_length
        embeds, pooled, _ = stock.encode_prompt([text], [text], device=self.device, max_sequence_length=length)
        return {"embeds": embeds, "pooled": pooled}

    def _predict(self, x: Tensor, sigma: float, given: Mapping[str, Tensor]) -> Tensor:
        import torch

        embedded = self.transformer.config.guidance_embeds
        tokens = torch.cat([x.to(self.dtype), given["source"]], dim=1) if "source" in given else x.to(self.dtype)
        return self.transformer(
            hidden_states=tokens,
            timestep=x.new_full((len(x),), sigma).to(self.dtype),
            guidance=x.new_full((len(x),), self.config.guidance) if embedded else None,
            pooled_projections=given["pooled"],
            encoder_hidden_states=given["embeds"],
            # RoPE positions of text are all zero, but their number is the padded length.
            txt_ids=torch.zeros(given["embeds"].shape[1], 3, device=self.device),
            img_ids=self._ids,
            return_dict=False,
        )[0][:, : x.shape[1]]

    def _tokens(self, latents: Tensor) -> Tensor:
        return self.pipeline._pack_latents(latents, *latents.shape)

    def _latents(self, x: Tensor) -> Tensor:
        config, vae = self.config, self.pipeline.vae.config
        latents = self.pipeline._unpack_latents(x, config.height, config.width, self.pipeline.vae_scale_factor)
        return latents / vae.scaling_factor + vae.shift_factor
