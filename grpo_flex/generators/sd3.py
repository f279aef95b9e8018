"""Stable Diffusion 3 and 3.5, through diffusers' own classes.

Time scale: t = 1000·σ, in float32 and never rounded. Latents: the transformer makes patches itself; the trainer sees each latent pixel as
a token, N = (H/8)·(W/8) of C = latent_channels. Guidance is classifier-free, in both branches of rollout and update.
The adapter sits on attention (both, in SD3.5-medium's dual blocks) and feed-forward projections.

Schedule: the model's own (a constant shift of 3 for the released models, from 1000 training steps' smallest σ on).
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
class Sd3(Picture):
    """SD3 and SD3.5 text-to-image."""

    guidance: float = 7.0
    """Classifier-free guidance; 1 is none, which halves the cost."""
    negative: str = ""
    """The prompt of guidance's other branch."""
    max_sequence_length: int = 256
    """Tokens of the T5 prompt."""

    pipeline: ClassVar[str] = "StableDiffusion3Pipeline"
    example: ClassVar[str] = "stabilityai/stable-diffusion-3.5-medium"
    texts: ClassVar[tuple[str, ...]] = (
        "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3",
    )  # fmt: skip
    # T5 reads the whole prompt; the two CLIPs read its beginning (77 tokens) by design.
    tokenizer: ClassVar[str] = "tokenizer_3"

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if self.guidance < 1:
            yield "guidance", f"is {self.guidance}; it needs to be 1 (no guidance) or more"

    def load(self, device: str) -> Sd3Model:
        return Sd3Model(self, device)


class Sd3Model(PictureModel):
    """A loaded StableDiffusion3Pipeline."""

    adapter_targets: tuple[str, ...] = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    )  # fmt: skip

    def _latent_shape(self) -> tuple[int, int]:
        return 4 * self._grid[0] * self._grid[1], self.transformer.config.in_channels

    def _other_branch(self) -> tuple[str, ...]:
        return (self.config.negative,) if self.config.guidance > 1 else ()

    def _text(self, stock: Any, text: str) -> Conditioning:
        embeds, _, pooled, _ = stock.encode_prompt(
            [text], [text], [text], device=self.device, do_classifier_free_guidance=False,
            max_sequence_length=self.config.max_sequence_length,
        )  # fmt: skip
        return {"embeds": embeds, "pooled": pooled}

    def _predict(self, x: Tensor, sigma: float, given: Mapping[str, Tensor]) -> Tensor:
        v = self.transformer(
            hidden_states=self._picture(x).to(self.dtype),
            timestep=x.new_full((len(x),), 1000 * sigma),
            encoder_hidden_states=given["embeds"],
            pooled_projections=given["pooled"],
            return_dict=False,
        )[0]
        return v.flatten(2).transpose(1, 2)

    def _set(self, scheduler: Any, steps: int) -> None:
        if scheduler.config.use_dynamic_shifting:
            super()._set(scheduler, steps)
        else:
            scheduler.set_timesteps(steps)

    def _picture(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, C, H/8, W/8]."""
        return x.transpose(1, 2).unflatten(2, (2 * self._grid[0], 2 * self._grid[1]))

    def _latents(self, x: Tensor) -> Tensor:
        vae = self.pipeline.vae.config
        return self._picture(x) / vae.scaling_factor + vae.shift_factor
