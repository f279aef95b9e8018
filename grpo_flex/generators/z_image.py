"""Z-Image and Z-Image-Turbo, through diffusers' own classes.

Time scale: the transformer's time runs the other way, t = 1 − σ, and it predicts x0 − ε = −v. Latents: it makes
patches itself; the trainer sees each latent pixel as a token, N = (H/8)·(W/8) of C = latent_channels. Guidance is
classifier-free in the form v + g·(v − v_∅), so that 0 is none (Turbo); both branches in rollout and update. Prompts differ in
length and bring a mask. The adapter sits on attention and feed-forward projections of all blocks.

Schedule: the model's own.
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
class ZImage(Picture):
    """Z-Image text-to-image."""

    guidance: float = 0.0
    """Classifier-free guidance; 0 is none, as for Turbo."""
    negative: str = ""
    """The prompt of guidance's other branch."""

    pipeline: ClassVar[str] = "ZImagePipeline"
    example: ClassVar[str] = "Tongyi-MAI/Z-Image-Turbo"

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if self.guidance < 0:
            yield "guidance", f"is {self.guidance}; it needs to be 0 (no guidance) or more"

    def tokens(self, stock: Any, text: str) -> int:
        chat: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
        spelled = stock.tokenizer.apply_chat_template([{"role": "user", "content": text}], **chat)
        return len(stock.tokenizer(spelled).input_ids)

    def load(self, device: str) -> ZImageModel:
        return ZImageModel(self, device)


class ZImageModel(PictureModel):
    """A loaded ZImagePipeline."""

    adapter_targets: tuple[str, ...] = (
        "attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0",
        "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
    )  # fmt: skip

    def _latent_shape(self) -> tuple[int, int]:
        return 4 * self._grid[0] * self._grid[1], self.transformer.config.in_channels

    def _other_branch(self) -> tuple[str, ...]:
        return (self.config.negative,) if self.config.guidance > 0 else ()

    def _text(self, stock: Any, text: str) -> Conditioning:
        # A list of one's own: the pipeline writes into the one it is given.
        made, _ = stock.encode_prompt(
            [text], device=self.device, do_classifier_free_guidance=False,
            max_sequence_length=self.config.max_sequence_length,
        )  # fmt: skip
        return {"embeds": made[0][None], "mask": made[0].new_ones(1, len(made[0])).bool()}

    def _predict(self, x: Tensor, sigma: float, given: Mapping[str, Tensor]) -> Tensor:
        import torch

        # Padding is at the end. The mask stays on the CPU: to choose rows by one on the device waits for the device, and
        # meta tensors, of which plans are made, cannot do it at all.
        lengths = given["mask"].sum(1).tolist()
        embeds = [row[:length] for row, length in zip(given["embeds"], lengths, strict=True)]
        pictures = list(self._picture(x).to(self.dtype).unsqueeze(2))  # [C, 1, H/8, W/8] each: a clip of one frame
        v = self.transformer(pictures, x.new_full((len(x),), 1 - sigma), embeds, return_dict=False)[0]
        return -torch.stack(list(v)).flatten(2).transpose(1, 2)

    def _guide(self, v: Tensor, other: Tensor) -> Tensor:
        return v + self.config.guidance * (v - other)

    def _picture(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, C, H/8, W/8]."""
        return x.transpose(1, 2).unflatten(2, (2 * self._grid[0], 2 * self._grid[1]))

    def _latents(self, x: Tensor) -> Tensor:
        vae = self.pipeline.vae.config
        return self._picture(x) / vae.scaling_factor + vae.shift_factor
