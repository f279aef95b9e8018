"""What a generator trades for memory, or for speed: the same fields for every model."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

VERSIONS = 64
"""Of a compiled block, for shapes, with and without gradients and the adapter. A run with all of it was seen to need 10."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Where weights and activations lie. None of it is on by default; each one changes cost, not the mathematics."""

    checkpoint_every: int = 0
    """Of the transformer's blocks, every n-th keeps no activations in the update and computes them again in the
    backward pass: 1 is all of them (least memory, one more forward pass), 0 none."""
    compile: bool = False
    """torch.compile of the repeated block, at its first call in each process."""
    attention: str = "native"
    """Diffusers' name of the attention back-end. "native" is PyTorch's SDPA with the kernel of its own choice, on Hopper and
    newer perhaps cuDNN's, else mostly flash attention. Others: "_native_cudnn", "_native_flash", "flash", "sage", …"""
    vae_slicing: bool = False
    """Decode the pictures of a batch one by one."""
    vae_tiling: bool = False
    """Decode large pictures in overlapping tiles, blended where they meet; almost the same picture."""
    base_bits: int = 0
    """8 or 4: the frozen transformer is quantised by bitsandbytes (QLoRA; CUDA only). 0: it stays as ``dtype`` says."""
    offload: bool = False
    """Text encoders and VAE lie in the CPU's memory while they have nothing to do."""
    encodings: str = ""
    """A folder that keeps the prompts' encodings. All prompts are then encoded once, before the run, and the text
    encoders leave memory. Empty: nothing is kept and the encoders stay."""

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.checkpoint_every < 0:
            yield "checkpoint_every", f"is {self.checkpoint_every}; 0 is none of the blocks, 1 all, n every n-th"
        if not self.attention:
            yield "attention", 'is empty; name a back-end of diffusers, such as "native"'
        if self.base_bits not in (0, 4, 8):
            yield "base_bits", f"is {self.base_bits}; it needs to be 8 or 4, or 0 for no quantisation"
        if self.encodings and Path(self.encodings).exists() and not Path(self.encodings).is_dir():
            yield "encodings", f"is {self.encodings!r}, which is a file; give a folder, or the name of one to be made"

    def check_installed(self) -> None:
        """Refuse a quantisation whose package is not here. Not one of the ``problems``: a plan needs no package.

        Raises:
            ValueError: with what to install.
        """
        if self.base_bits and importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(
                f"generator.memory.base_bits is {self.base_bits}, which needs bitsandbytes and it is not installed: "
                "pip install bitsandbytes (CUDA only), or set 0"
            )

    def quantization(self, dtype: torch.dtype) -> Any:
        """What ``from_pretrained`` needs to quantise the transformer; None where it is not asked for.

        Raises:
            ValueError: the package for it is not installed.
        """
        if not self.base_bits:
            return None
        self.check_installed()
        from diffusers import PipelineQuantizationConfig

        settings: dict[str, Any] = {f"load_in_{self.base_bits}bit": True}
        if self.base_bits == 4:
            settings |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        return PipelineQuantizationConfig(
            quant_backend=f"bitsandbytes_{self.base_bits}bit",
            quant_kwargs=settings,
            components_to_quantize=["transformer", "transformer_2"],
        )

    def check_attention(self) -> None:
        """Refuse, before weights are loaded, a back-end that this diffusers does not know.

        Raises:
            ValueError: with the names that it knows.
        """
        from diffusers.models.attention_dispatch import AttentionBackendName

        known = sorted(backend.value for backend in AttentionBackendName)
        if self.attention not in known:
            raise ValueError(f"generator.memory.attention is {self.attention!r}; known here: {', '.join(known)}")

    def apply(self, transformer: Any) -> None:
        """Set up a transformer. An adapter may be attached afterwards: compilation waits for the first call.

        Raises:
            ValueError: an attention back-end that this machine or this model cannot use.
        """
        if self.checkpoint_every:
            transformer.enable_gradient_checkpointing(_every(self.checkpoint_every, repeated_blocks(transformer)))
        if self.attention != "native":
            _set_attention(transformer, self.attention)
        if self.compile:
            _compile(repeated_blocks(transformer))

    def apply_to_vae(self, vae: Any) -> None:
        if self.vae_slicing:
            vae.enable_slicing()
        if self.vae_tiling:
            vae.enable_tiling()


def grow_segments() -> None:
    """Let CUDA's allocator grow its segments, before torch's first call of CUDA; what the environment says goes first.

    Sampling, decoding, held-out samples and updates ask for pieces of other sizes each; of segments of fixed sizes, what one
    of them leaves is of no use to the next.
    """
    if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:  # torch reads either
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def repeated_blocks(transformer: Any) -> list[torch.nn.Module]:
    """The transformer's blocks in the order of the forward pass: most of its weights and activations."""
    names = transformer._no_split_modules  # SD3 has no _repeated_blocks; where both are there, they are the same
    return [module for module in transformer.modules() if type(module).__name__ in names]


def _compile(blocks: list[torch.nn.Module]) -> None:
    """Compile each block, and let Dynamo keep a version of it for every kind of pass.

    By default it keeps 8 of a class. Rollout, reference, update and held-out samples are a version each, and again for
    another micro-batch; what came after the eighth would run uncompiled, by other kernels than those that it is compared with.
    """
    from torch._dynamo import config

    # Of this thread. On a GPU autograd's own recomputes activations, with torch's default limit and the versions that
    # forward passes have made here; a limit of the block, whatever the thread, came with torch 2.13.
    config.recompile_limit = max(config.recompile_limit, VERSIONS)
    for block in blocks:
        block.compile()


def _every(n: int, blocks: list[torch.nn.Module]) -> Callable[..., Any]:
    """How diffusers calls a block while it has gradients: the first of each n is recomputed, the others are kept."""
    from torch.utils.checkpoint import checkpoint

    chosen = {id(block) for block in blocks[::n]}

    def call(block: Any, *args: Any) -> Any:
        return checkpoint(block.__call__, *args, use_reentrant=False) if id(block) in chosen else block(*args)

    return call


def _set_attention(transformer: Any, name: str) -> None:
    processors = [getattr(module, "processor", None) for module in transformer.modules()]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise ValueError(
            f"generator.memory.attention is {name!r}, but {type(transformer).__name__} always uses PyTorch's SDPA; set native"
        )
    try:
        transformer.set_attention_backend(name)
    except (ValueError, RuntimeError, ImportError) as error:
        raise ValueError(f"generator.memory.attention is {name!r}, which cannot be used here: {error}") from error
