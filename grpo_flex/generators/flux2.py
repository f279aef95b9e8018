"""FLUX.2, klein and dev, text-to-image and editing, through diffusers' own classes.

Time scale: t = σ. Latents: 2×2 blocks of the VAE's latents become channels, standardised by the running statistics of
its batch norm, so N = (H/16)·(W/16) tokens of C = 4·latent_channels; positions are (time, row, column, text index), time
0 for the sample and 10 for a source picture, whose tokens follow the sample's. The text is three inner layers of Qwen3
(klein) or Mistral 3 (dev, after a system message of its own) side by side. Guidance: klein's base models are guided
classifier-free, against the empty prompt and in both branches of rollout and update; the distilled ones (the pipeline says
so) never; dev's is embedded. The adapter sits on all projections of both block kinds.

Schedule: the model's own shift depends on size *and* number of steps; the default is the constant 3 (see ``flux``).
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
class Flux2Klein(Picture):
    """FLUX.2-klein text-to-image."""

    guidance: float = 4.0
    """Classifier-free guidance; 1 is none, which halves the cost. Ignored by distilled models."""
    shift: float = 3.0
    """Time shift of the σ schedule; 0: the model's own schedule."""

    pipeline: ClassVar[str] = "Flux2KleinPipeline"
    example: ClassVar[str] = "black-forest-labs/FLUX.2-klein-base-9B"

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if self.guidance < 1:
            yield "guidance", f"is {self.guidance}; it needs to be 1 (no guidance) or more"

    def tokens(self, stock: Any, text: str) -> int:
        chat: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        spelled = stock.tokenizer.apply_chat_template([{"role": "user", "content": text}], **chat)
        return len(stock.tokenizer(spelled).input_ids)

    def load(self, device: str) -> Flux2KleinModel:
        return Flux2KleinModel(self, device)


@dataclass(frozen=True, kw_only=True)
class Flux2KleinEdit(Flux2Klein):
    """The same model as an editor of the picture that a prompt's ``reference["source"]`` names.

    The source is brought to height×width: scaled to cover it, cut in the middle.
    """

    edits: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class Flux2Dev(Picture):
    """FLUX.2-dev text-to-image. The limit of tokens includes those of the system message."""

    guidance: float = 4.0
    """Embedded guidance."""
    shift: float = 3.0
    """Time shift of the σ schedule; 0: the model's own schedule."""

    pipeline: ClassVar[str] = "Flux2Pipeline"
    example: ClassVar[str] = "black-forest-labs/FLUX.2-dev"
    templates: ClassVar[bool] = True

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if self.guidance < 0:
            yield "guidance", f"is {self.guidance}; embedded guidance is 0 or more"

    def tokens(self, stock: Any, text: str) -> int:
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        chat = format_input([text], system_message=stock.system_message)
        options: dict[str, Any] = {"add_generation_prompt": False, "tokenize": True, "return_dict": True}
        return len(stock.tokenizer.apply_chat_template(chat, **options)["input_ids"][0])

    def load(self, device: str) -> Flux2DevModel:
        return Flux2DevModel(self, device)


@dataclass(frozen=True, kw_only=True)
class Flux2DevEdit(Flux2Dev):
    """The same model as an editor, as ``Flux2KleinEdit``."""

    edits: ClassVar[bool] = True


class Flux2KleinModel(PictureModel):
    """A loaded Flux2KleinPipeline."""

    def __init__(self, config: Flux2Klein | Flux2Dev, device: str) -> None:
        super().__init__(config, device)
        blocks = len(self.transformer.single_transformer_blocks)
        self.adapter_targets = (
            "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
            "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
            "ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out",
            "attn.to_qkv_mlp_proj",
            # Spelt out, because in the double blocks "attn.to_out" is a list of layers.
            *(f"single_transformer_blocks.{i}.attn.to_out" for i in range(blocks)),
        )  # fmt: skip

    def _fit(self) -> None:
        import torch

        super()._fit()
        blank = torch.zeros(1, 1, *self._grid)
        self._ids = self.pipeline._prepare_latent_ids(blank)
        if self.config.edits:
            self._ids = torch.cat([self._ids, self.pipeline._prepare_image_ids([blank])], dim=1)
        self._ids = self._ids.to(self.device)

    def _other_branch(self) -> tuple[str, ...]:
        return ("",) if self.config.guidance > 1 and not self.pipeline.config.is_distilled else ()

    def _text(self, stock: Any, text: str) -> Conditioning:
        length = self.config.max_sequence_length
        return {"embeds": stock.encode_prompt([text], device=self.device, max_sequence_length=length)[0]}

    def _predict(self, x: Tensor, sigma: float, given: Mapping[str, Tensor]) -> Tensor:
        import torch

        tokens = torch.cat([x.to(self.dtype), given["source"]], dim=1) if "source" in given else x.to(self.dtype)
        return self.transformer(
            hidden_states=tokens,
            timestep=x.new_full((len(x),), sigma).to(self.dtype),
            guidance=self._embedded(x),
            encoder_hidden_states=given["embeds"],
            txt_ids=self.pipeline._prepare_text_ids(given["embeds"][:1]).to(self.device),
            img_ids=self._ids,
            return_dict=False,
        )[0][:, : x.shape[1]]

    def _embedded(self, x: Tensor) -> Tensor | None:
        """Guidance that the transformer is told, [B]."""
        return None

    def _mu(self, scheduler: Mapping[str, Any], steps: int) -> float:
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        return compute_empirical_mu(self._grid[0] * self._grid[1], steps)

    def _tokens(self, latents: Tensor) -> Tensor:
        return self.pipeline._pack_latents(latents)

    def _latents(self, x: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean, std = vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        blocks = (x * std.to(x) + mean.to(x)).transpose(1, 2).unflatten(2, self._grid)
        return self.pipeline._unpatchify_latents(blocks)


class Flux2DevModel(Flux2KleinModel):
    """A loaded Flux2Pipeline."""

    def _other_branch(self) -> tuple[str, ...]:
        return ()

    def _embedded(self, x: Tensor) -> Tensor:
        return x.new_full((len(x),), self.config.guidance)
