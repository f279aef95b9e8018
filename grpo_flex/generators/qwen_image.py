"""Qwen-Image, through diffusers' own classes.

Time scale: t = σ. Latents are packed 2×2, N = (H/16)·(W/16) tokens of C = 4·16, standardised by the constants in the
VAE's configuration. Guidance is classifier-free and rescaled, token by token, to the length of the prompted branch; both
branches are computed in rollout and update. Prompts differ in length and bring a mask. The adapter sits on attention and
feed-forward projections of both streams.

Schedule: the model's own, whose shift grows with the picture and whose last σ above 0 is stretched to a fixed one.
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
class QwenImage(Picture):
    """Qwen-Image text-to-image."""

    guidance: float = 4.0
    """Classifier-free guidance; 1 is none, which halves the cost."""
    negative: str = " "
    """The prompt of guidance's other branch."""

    pipeline: ClassVar[str] = "QwenImagePipeline"
    example: ClassVar[str] = "Qwen/Qwen-Image"
    templates: ClassVar[bool] = True
    longest: ClassVar[int] = 1024

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if self.guidance < 1:
            yield "guidance", f"is {self.guidance}; it needs to be 1 (no guidance) or more"

    def tokens(self, stock: Any, text: str) -> int:
        spelled = stock.prompt_template_encode.format(text)
        return len(stock.tokenizer(spelled).input_ids) - stock.prompt_template_encode_start_idx

    def load(self, device: str) -> QwenImageModel:
        return QwenImageModel(self, device)


class QwenImageModel(PictureModel):
    """A loaded QwenImagePipeline."""

    adapter_targets: tuple[str, ...] = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2",
    )  # fmt: skip

    def _other_branch(self) -> tuple[str, ...]:
        return (self.config.negative,) if self.config.guidance > 1 else ()

    def _text(self, stock: Any, text: str) -> Conditioning:
        length = self.config.max_sequence_length
        embeds, _ = stock.encode_prompt([text], device=self.device, max_sequence_length=length)
        return {"embeds": embeds, "mask": embeds.new_ones(embeds.shape[:2]).bool()}

    def _predict(self, x: Tensor, sigma: float, given: Mapping[str, Tensor]) -> Tensor:
        # Without padding there is no mask, so that the fast attention kernels can be used.
        mask = None if bool(given["mask"].all()) else given["mask"].to(self.device)
        return self.transformer(
            hidden_states=x.to(self.dtype),
            timestep=x.new_full((len(x),), sigma).to(self.dtype),
            encoder_hidden_states=given["embeds"],
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, *self._grid)]] * len(x),
            return_dict=False,
        )[0]

    def _guide(self, v: Tensor, other: Tensor) -> Tensor:
        guided = super()._guide(v, other)
        return guided * (v.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def _latents(self, x: Tensor) -> Tensor:
        config, vae = self.config, self.pipeline.vae.config
        latents = self.pipeline._unpack_latents(x, config.height, config.width, self.pipeline.vae_scale_factor)
        mean, std = (x.new_tensor(numbers).view(1, -1, 1, 1, 1) for numbers in (vae.latents_mean, vae.latents_std))
        return latents * std + mean
