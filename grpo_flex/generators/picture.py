"""What the picture generators share; each one's own file says what it does differently.

The text encoders are loaded apart from the transformer, at the first prompt that has to be encoded: a learner never
holds them. The VAE is used to decode, and to encode the source pictures of an editor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from grpo_flex.dynamics import shifted_sigmas
from grpo_flex.generators.base import (
    check_weights,
    folder_problems,
    load_pipeline,
    load_tokenizer,
    write_denoiser,
    write_lora,
)
from grpo_flex.generators.encodings import Encodings, fingerprint
from grpo_flex.generators.memory import Memory
from grpo_flex.sources import fitted_source, read_source

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from grpo_flex.generators.base import Conditioning
    from grpo_flex.types import Prompt

NEGATIVE = "negative_"
"""Begins the names of what belongs to the other branch of classifier-free guidance."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Fields of every picture generator."""

    model: str
    """A folder with a saved pipeline of the right class, or a Hugging Face Hub id."""
    height: int = 512
    width: int = 512
    shift: float = 0.0
    """Time shift of the σ schedule; 0: the model's own schedule, which for some models grows with the picture."""
    max_sequence_length: int = 512
    """Tokens of a prompt. A longer one is refused: the model would not see its end."""
    dtype: str = "float32"
    """Precision of the frozen base weights: float32 or bfloat16. The adapter, the latents and their arithmetic are float32."""
    memory: Memory = field(default_factory=Memory)

    pipeline: ClassVar[str]
    """Name of the diffusers class."""
    example: ClassVar[str]
    """A Hub id, for messages."""
    denoisers: ClassVar[tuple[str, ...]] = ("transformer",)
    """The components that predict the velocity; all but the first may be missing in a model."""
    texts: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    """The components that only prompts need."""
    tokenizer: ClassVar[str] = "tokenizer"
    """Of the encoder that reads the whole prompt."""
    templates: ClassVar[bool] = False
    """Whether the stock pipeline itself says what stands around a prompt."""
    longest: ClassVar[int] = 512
    """The most tokens that the stock pipeline takes."""
    edits: ClassVar[bool] = False
    """Whether each prompt brings a source picture: the path in its ``reference["source"]``."""

    def problems(self) -> Iterator[tuple[str, str]]:
        multiple = _multiple(self.model)
        for name in ("height", "width"):
            if getattr(self, name) < multiple or getattr(self, name) % multiple:
                yield (
                    name,
                    f"is {getattr(self, name)}; {type(self).__name__} packs 2×2 blocks of {multiple // 2}-pixel latents, so it needs a multiple of {multiple}",
                )
        if self.shift < 0:
            yield "shift", f"is {self.shift}; it needs to be above 0 (1 leaves it linear), or 0 for the model's own"
        if not 1 <= self.max_sequence_length <= self.longest:
            yield (
                "max_sequence_length",
                f"is {self.max_sequence_length}; {self.pipeline} takes 1 to {self.longest} tokens",
            )
        if self.dtype not in ("float32", "bfloat16"):
            yield "dtype", f"is {self.dtype!r}; it needs to be float32 or bfloat16"
        yield from folder_problems(self.model, self.pipeline, self.example, ("transformer", "vae", *self.texts))

    def tokenizers(self) -> Any:
        """The pipeline with nothing but the tokenizer that reads the whole prompt.

        Of a folder's pipeline that tokenizer alone: importing diffusers takes seconds, and every run begins with this.
        """
        if Path(self.model).is_dir() and not self.templates:
            return SimpleNamespace(**{self.tokenizer: load_tokenizer(self.pipeline, self.model, self.tokenizer)})
        parts = (*self.denoisers, "vae", *self.texts)
        without: dict[str, Any] = {part: None for part in parts if part != self.tokenizer}
        return load_pipeline(self.pipeline, self.model, **without)

    def check(self, prompts: Sequence[Prompt], stock: Any = None) -> None:
        """``stock``: what ``tokenizers`` gives, where it is there already."""
        check_weights(self.model, (*self.denoisers, "vae", *(name for name in self.texts if "encoder" in name)))
        for prompt in prompts if self.edits else ():
            read_source(prompt)
        stock = stock or self.tokenizers()
        for prompt in prompts:
            count = self.tokens(stock, prompt.text)
            if count > self.max_sequence_length:
                raise ValueError(
                    f"prompt {prompt.id!r} has {count} tokens, more than generator.max_sequence_length={self.max_sequence_length}: "
                    f"the model would not see its end; shorten it{self._or_raise_the_limit()}"
                )

    def _or_raise_the_limit(self) -> str:
        return f", or raise the limit (to {self.longest} at most)" if self.max_sequence_length < self.longest else ""

    def tokens(self, stock: Any, text: str) -> int:
        """Tokens of one prompt, special ones included, as the ``stock`` pipeline's tokenizer counts them."""
        return len(getattr(stock, self.tokenizer)(text).input_ids)


class PictureModel:
    """A loaded pipeline, taken apart into what the trainer needs."""

    adapter_targets: tuple[str, ...]

    def __init__(self, config: Picture, device: str) -> None:
        import torch

        self.config: Any = config
        self.device, self.dtype = device, getattr(torch, config.dtype)
        if device.startswith("cuda") and self.dtype == torch.bfloat16:
            # The adapter's matrices are float32. TF32 has more mantissa than the bfloat16 before and after them, and runs on
            # tensor cores; exact float32 does not. A setting of the whole process, which holds one model.
            torch.set_float32_matmul_precision("high")
        self.pipeline = self._load()
        self.transformer: Any = self.pipeline.transformer
        self._fit()
        self._texts: Any = None
        settings = (config.pipeline, config.max_sequence_length, config.dtype)
        key = fingerprint(config.model, *settings) if config.memory.encodings else ""
        self._encodings = Encodings(config.memory.encodings, key, self._encode_text, self._rest)

    def _fit(self) -> None:
        """What depends on the size of the samples."""
        config, multiple = self.config, self.pipeline.vae_scale_factor * 2
        if config.height % multiple or config.width % multiple:
            raise ValueError(
                f"generator.height × width is {config.height}×{config.width}; {config.model} needs multiples of {multiple}"
            )
        self._grid = (config.height // multiple, config.width // multiple)
        self.latent_shape = self._latent_shape()

    def resized(self, generator: Picture) -> Self:
        if generator == self.config:
            return self
        other = copy(self)
        other.config = generator
        other._fit()
        return other

    def _load(self) -> Any:
        """Everything but the text encoders, frozen, each part where it belongs."""
        config = self.config
        config.memory.check_attention()
        without = dict.fromkeys(config.texts)
        quantised = {"quantization_config": q} if (q := config.memory.quantization(self.dtype)) else {}
        pipeline = load_pipeline(config.pipeline, config.model, dtype=self._dtypes(), **without, **quantised)
        for denoiser in filter(None, (getattr(pipeline, name) for name in config.denoisers)):
            denoiser.requires_grad_(False).eval()
            if not quantised:  # bitsandbytes has placed it already
                denoiser.to(self.device)
            config.memory.apply(denoiser)
        pipeline.vae.requires_grad_(False).eval()
        pipeline.vae.to("cpu" if config.memory.offload else self.device)
        config.memory.apply_to_vae(pipeline.vae)
        return pipeline

    def _dtypes(self) -> Any:
        """Precision of all components, or of each by name with a "default"."""
        return self.dtype

    def _latent_shape(self) -> tuple[int, int]:
        """(N, C); unless said otherwise, a token is a 2×2 block of latent pixels."""
        return self._grid[0] * self._grid[1], self.transformer.config.in_channels

    @contextmanager
    def awake(self, *parts: Any) -> Iterator[None]:
        """These parts are on the device while the block lasts; with ``memory.offload`` they sleep on the CPU after it."""
        for part in parts:
            part.to(self.device)
        try:
            yield
        finally:
            for part in parts if self.config.memory.offload else ():
                part.to("cpu")

    # ------------------------------------------------------------ prompts

    @cached_property
    def _tokenizers(self) -> Any:
        return self.config.tokenizers()

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        self.config.check(prompts, self._tokenizers)
        if self._encodings.folder is not None:
            self._encodings.fill([*(prompt.text for prompt in prompts), *self._other_branch()])

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditioning]:
        encoded = self._encodings([prompt.text for prompt in prompts])
        return [
            {**made, **self._other, **self._encode_source(prompt)}
            for made, prompt in zip(encoded, prompts, strict=True)
        ]

    @cached_property
    def _other(self) -> Conditioning:
        """Guidance's other branch. It travels with each prompt: encoded anew in the learner, it might differ by a bit."""
        return {NEGATIVE + name: t for made in self._encodings(self._other_branch()) for name, t in made.items()}

    def _other_branch(self) -> tuple[str, ...]:
        """The text of guidance's other branch; nothing where guidance is not classifier-free, or off."""
        return ()

    def _encode_text(self, text: str) -> Conditioning:
        import torch

        if self._texts is None:
            without: dict[str, Any] = dict.fromkeys((*self.config.denoisers, "vae"))
            self._texts = load_pipeline(self.config.pipeline, self.config.model, dtype=self.dtype, **without)
            for name in self.config.texts:
                if name.startswith("text_encoder"):
                    getattr(self._texts, name).eval()  # T5 has dropout
        self._texts.to(self.device)
        with torch.no_grad():
            return self._text(self._texts, text)

    def _text(self, stock: Any, text: str) -> Conditioning:
        """One text's encoding by the text side of the ``stock`` pipeline."""
        raise NotImplementedError

    def _rest(self) -> None:
        """The text encoders leave the device: for good where encodings are kept, until the next prompt with ``offload``."""
        import torch

        if self._texts is None or not (self._encodings.folder or self.config.memory.offload):
            return
        self._texts.to("cpu")
        if self._encodings.folder is not None:
            self._texts = None
        torch.cuda.empty_cache()

    def _encode_source(self, prompt: Prompt) -> Conditioning:
        """The source picture's latent tokens [1, N, C]; cut to the sample's own size, so that all have one shape."""
        import torch

        if not self.config.edits:
            return {}
        fitted = fitted_source(prompt, self.config.width, self.config.height)
        vae = self.pipeline.vae
        with torch.no_grad(), self.awake(vae):
            pixels = self.pipeline.image_processor.preprocess(fitted).to(self.device, vae.dtype)
            latents = self.pipeline._encode_vae_image(pixels, None)
        return {"source": self._tokens(latents).cpu()}

    def _tokens(self, latents: Tensor) -> Tensor:
        """Latents [1, C, H, W] of a source picture as tokens [1, N, C]."""
        raise NotImplementedError

    # ------------------------------------------------------------ sampling

    def sigmas(self, steps: int) -> tuple[float, ...]:
        if self.config.shift:
            return shifted_sigmas(steps, self.config.shift)
        scheduler = self.pipeline.scheduler
        self._set(scheduler, steps)
        return tuple(scheduler.sigmas.tolist())

    def _set(self, scheduler: Any, steps: int) -> None:
        """Set the scheduler as the stock pipeline sets it for a picture of this size."""
        import numpy as np

        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=self._mu(scheduler.config, steps))

    def _mu(self, scheduler: Mapping[str, Any], steps: int) -> float:
        """log of the shift, for schedulers that let it depend on the number of tokens."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        return calculate_shift(self._grid[0] * self._grid[1], *(scheduler[name] for name in names))

    def velocity(self, x: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        there = {name: self._here(tensor, len(x)) for name, tensor in conditioning.items()}
        other = {name.removeprefix(NEGATIVE): t for name, t in there.items() if name.startswith(NEGATIVE)}
        v = self._predict(x, sigma, there).float()
        return self._guide(v, self._predict(x, sigma, there | other).float()) if other else v

    def _here(self, tensor: Tensor, batch: int) -> Tensor:
        """One row for each sample; numbers on the device, masks where they are."""
        if tensor.is_floating_point():
            tensor = tensor.to(self.device, self.dtype)
        return tensor.expand(batch, *tensor.shape[1:])

    def _predict(self, x: Tensor, sigma: float, given: Mapping[str, Tensor]) -> Tensor:
        """v of one branch, [B, N, C]."""
        raise NotImplementedError

    def _guide(self, v: Tensor, other: Tensor) -> Tensor:
        """Classifier-free guidance (arXiv 2207.12598)."""
        return other + self.config.guidance * (v - other)

    def decode(self, x: Tensor) -> list[np.ndarray]:
        import torch

        vae = self.pipeline.vae
        with torch.no_grad(), self.awake(vae):
            pixels = vae.decode(self._latents(x).to(vae.dtype), return_dict=False)[0]
        pixels = pixels if pixels.ndim == 4 else pixels[:, :, 0]  # a video autoencoder's only frame
        pictures = self.pipeline.image_processor.postprocess(pixels.float(), output_type="np")
        return [(picture[None] * 255).round().astype("uint8") for picture in pictures]

    def _latents(self, x: Tensor) -> Tensor:
        """Tokens [B, N, C] as the latents that the VAE decodes."""
        raise NotImplementedError

    def save_adapter(self, folder: Path, tensors: Mapping[str, Tensor], rank: int, alpha: float) -> Path:
        return write_lora(self.pipeline, folder, tensors, rank, alpha)

    def save_weights(self, folder: Path, tensors: Mapping[str, Tensor]) -> Path:
        return write_denoiser(self.pipeline.transformer, folder / "transformer", tensors)


def _multiple(model: str) -> int:
    """What height and width have to be divisible by: twice the VAE's factor, if its configuration lies here.

    Otherwise 16, as for every model that was released; the loaded model is asked again.
    """
    try:
        vae = json.loads((Path(model) / "vae" / "config.json").read_text())
    except (OSError, ValueError):
        return 16
    if "scale_factor_spatial" in vae:
        return 2 * vae["scale_factor_spatial"]
    halvings = len(vae["temperal_downsample"]) if "temperal_downsample" in vae else len(vae["block_out_channels"]) - 1
    return 2 ** (halvings + 1)
