"""What the trainer asks of a generator, and nothing more.

``Generator`` is the configuration (light, picklable, no torch); ``load`` makes the ``Model`` that holds weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    Conditioning = Mapping[str, Tensor]


class Generator(Protocol):
    """A frozen dataclass that knows where the weights are and how to load them."""

    def load(self, device: str) -> Model:
        """Load the weights, frozen and in eval mode.

        Raises:
            ValueError: no such model, the wrong class, a missing component, an impossible size.
        """
        ...


class Model(Protocol):
    """A loaded generator."""

    transformer: torch.nn.Module
    """The denoiser: what the LoRA adapter is added to."""
    adapter_targets: tuple[str, ...]
    """Module-name suffixes that LoRA adapts unless the experiment says otherwise."""
    latent_shape: tuple[int, int]
    """(N, C) of one sample."""
    device: str

    def encode(self, texts: Sequence[str]) -> list[Conditioning]:
        """One conditioning for each text, with batch dimension 1."""
        ...

    def sigmas(self, steps: int) -> tuple[float, ...]:
        """The schedule from 1 to 0, steps + 1 values."""
        ...

    def velocity(self, x: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        """v(x_σ, σ) for latents [B, N, C] that share one conditioning; float32 [B, N, C]."""
        ...

    def decode(self, x: Tensor) -> list[np.ndarray]:
        """Clean latents [B, N, C] to media, uint8 [F, H, W, 3] each; an image has F = 1."""
        ...

    def save_adapter(self, folder: Path, tensors: Mapping[str, Tensor], rank: int, alpha: float) -> Path:
        """Write a LoRA file that the stock pipeline's ``load_lora_weights`` reads, scaling included."""
        ...


def folder_problems(model: str, pipeline: str, hub_example: str) -> Iterator[tuple[str, str]]:
    """What can be told of ``generator.model`` without loading weights: is it there, and of the right class?

    A name like "owner/model" that is no folder here is taken for a Hub id and not looked at.
    """
    folder, index = Path(model), Path(model) / "model_index.json"
    looks_local = model.startswith((".", "/", "~")) or model.count("/") != 1 or folder.parent.is_dir()
    if not folder.is_dir():
        if looks_local:
            yield (
                "model",
                f"is {model!r}, which is no folder here; give the folder of a saved {pipeline}, or a Hub id such as {hub_example}",
            )
        return
    try:
        found = json.loads(index.read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        yield (
            "model",
            f"is {model!r}, which has no readable model_index.json; give a folder written by {pipeline}.save_pretrained",
        )
        return
    if found != pipeline:
        yield "model", f"is {model!r}, which holds a {found}; this generator needs a {pipeline}"
