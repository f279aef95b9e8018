"""What the trainer asks of a generator, and nothing more.

``Generator`` is the configuration (light, picklable, no torch); ``load`` makes the ``Model`` that holds weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from grpo_flex.generators.known import index_of

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from grpo_flex.generators.memory import Memory
    from grpo_flex.types import Prompt

    Conditioning = Mapping[str, Tensor]

LORA_FILE = "pytorch_lora_weights.safetensors"
SECOND_LORA_FILE = "pytorch_lora_weights_2.safetensors"
"""Of a model with two experts: the second one's. Diffusers reads one expert from one file."""


class Generator(Protocol):
    """A frozen dataclass that knows where the weights are and how to load them."""

    @property
    def memory(self) -> Memory:
        """What is traded for memory, or for speed."""
        ...

    def load(self, device: str) -> Model:
        """Load the weights, frozen and in eval mode.

        Raises:
            ValueError: no such model, the wrong class, a missing component, an impossible size.
        """
        ...

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse what the model could not take whole, without loading weights: tokenizers say how long a prompt is.

        Raises:
            ValueError: a prompt over the token limit, or without the source picture that an editor needs.
        """
        ...


class Model(Protocol):
    """A loaded generator."""

    transformer: torch.nn.Module
    """The denoiser, or all of them as one module: what the LoRA adapter is added to, by the methods of diffusers'
    ``PeftAdapterMixin``, which its own transformers have."""
    adapter_targets: tuple[str, ...]
    """Module-name suffixes that LoRA adapts unless the experiment says otherwise."""
    latent_shape: tuple[int, int]
    """(N, C) of one sample."""
    device: str

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        """Check prompts as ``Generator.check`` does, and encode ahead what is kept on disk (``Memory.encodings``)."""
        ...

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditioning]:
        """One conditioning for each prompt, with batch dimension 1, on the CPU.

        Where prompts of different lengths are not padded to one, a mask belongs to it: batches are padded with zeros.
        """
        ...

    def sigmas(self, steps: int) -> tuple[float, ...]:
        """The schedule from 1 to 0, steps + 1 values."""
        ...

    def velocity(self, x: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        """v(x_σ, σ) for latents [B, N, C] that share one conditioning; float32 [B, N, C]."""
        ...

    def resized(self, generator: Any) -> Model:
        """The same weights for samples of another size: what ``generator`` differs in is height, width or shift.

        Raises:
            ValueError: an impossible size.
        """
        ...

    def decode(self, x: Tensor) -> list[np.ndarray]:
        """Clean latents [B, N, C] to media, uint8 [F, H, W, 3] each; an image has F = 1."""
        ...

    def save_adapter(self, folder: Path, tensors: Mapping[str, Tensor], rank: int, alpha: float) -> Path:
        """Write a LoRA file that the stock pipeline's ``load_lora_weights`` reads, scaling included."""
        ...

    def save_weights(self, folder: Path, tensors: Mapping[str, Tensor]) -> Path:
        """Write all of the transformer's parameters as a folder "transformer", which diffusers loads.

        A pipeline takes it as ``from_pretrained(…, transformer=FluxTransformer2DModel.from_pretrained(folder))``.
        """
        ...


def folder_problems(
    model: str, pipeline: str, hub_example: str, parts: Sequence[str] = ()
) -> Iterator[tuple[str, str]]:
    """What can be told of ``generator.model`` without loading weights: is it there, of the right class, and whole?

    ``parts`` are the components that it has to have. A name like "owner/model" that is no folder here is taken for a Hub
    id; the Hub is not asked, but what this machine knows of the model is (``known.py``).
    """
    folder = Path(model)
    looks_local = model.startswith((".", "/", "~")) or model.count("/") != 1 or folder.parent.is_dir()
    if looks_local and not folder.is_dir():
        yield (
            "model",
            f"is {model!r}, which is no folder here; give the folder of a saved {pipeline}, or a Hub id such as {hub_example}",
        )
        return
    said = index_of(model) or {}
    found = said.get("_class_name")
    if found is None and folder.is_dir():
        yield (
            "model",
            f"is {model!r}, which has no readable model_index.json; give a folder written by {pipeline}.save_pretrained",
        )
    elif found not in (None, pipeline):
        yield (
            "model",
            f"is {model!r}, which holds a {found}; this generator needs a {pipeline}: give one, such as {hub_example}, or name "
            f"the generator that is made for a {found} in the experiment",
        )
    elif folder.is_dir():
        for part in parts:
            if (said.get(part) or [None])[0] is None or not any((folder / part).glob("*")):
                yield "model", f"is {model!r}, which has no {part}; give a folder with the whole {pipeline}"


def check_weights(model: str, parts: Sequence[str]) -> None:
    """Refuse a folder that lacks some of its weights' files or whose files are cut off, as a broken download leaves it.

    Of the files only the headers are read.

    Args:
        model: a Hub id, or a folder that ``folder_problems`` has nothing against.
        parts: components with weights; those that the folder does not have are passed over.

    Raises:
        ValueError: naming the component.
    """
    for part in (part for part in parts if (Path(model) / part).is_dir()):
        if not _has_weights(Path(model) / part):
            raise ValueError(
                f"generator.model is {model!r}, whose {part} has no weights, or not all that its index names: complete the "
                f"download, e.g. hf download OWNER/NAME --local-dir {model}"
            )
        for file in sorted((Path(model) / part).glob("*.safetensors")):
            for complaint in _damage(file):
                raise ValueError(
                    f"generator.model is {model!r}, whose {part}/{file.name} is damaged or was cut off ({complaint}): delete "
                    f"the file and download it again, e.g. hf download OWNER/NAME --local-dir {model}"
                )


def _has_weights(folder: Path) -> bool:
    """Whether there is a file with all weights, or every file that an index names."""
    there = {file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin")}
    try:
        indexed = [json.loads(file.read_text())["weight_map"].values() for file in folder.glob("*.index.json")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return any(there.issuperset(files) for files in indexed) or any("-of-" not in name for name in there)


def _damage(file: Path) -> Iterator[str]:
    """What the header of a safetensors file, which tells every tensor's place in it, has against the rest."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        yield str(error)


def load_pipeline(pipeline: str, model: str, **options: Any) -> Any:
    """``from_pretrained`` of one of diffusers' pipelines; a component that is given as None is not loaded.

    Raises:
        ValueError: with the way out: another folder, another name, a licence to accept, a download made elsewhere.
    """
    import diffusers
    from huggingface_hub.errors import HTTPError  # its client's own, which passes where nothing answers

    diffusers.utils.logging.disable_progress_bar()  # a person sees what the run says of itself
    try:
        return getattr(diffusers, pipeline).from_pretrained(model, **options)
    except (*_UNLOADABLE, HTTPError) as error:
        raise _refusal(error, pipeline, model) from error


def load_tokenizer(pipeline: str, folder: str, name: str) -> Any:
    """The tokenizer of that name of a pipeline that was saved in a folder, without importing diffusers or torch.

    Raises:
        ValueError: as ``load_pipeline``.
    """
    import transformers

    try:
        _, found = json.loads((Path(folder) / "model_index.json").read_text())[name]
        return getattr(transformers, found).from_pretrained(folder, subfolder=name)
    except (*_UNLOADABLE, KeyError) as error:
        raise _refusal(error, pipeline, folder) from error


_UNLOADABLE = (OSError, ValueError, AttributeError, TypeError, RuntimeError, ImportError)


def _refusal(error: Exception, pipeline: str, model: str) -> ValueError:
    return ValueError(
        f"generator.model {model!r} cannot be loaded as a {pipeline}: {error}\n{_way_out(error, pipeline, model)}"
    )


def _way_out(error: BaseException | None, pipeline: str, model: str) -> str:
    causes: set[str] = set()
    while error is not None:
        causes |= {cls.__name__ for cls in type(error).__mro__}
        error = error.__cause__ or error.__context__
    if "GatedRepoError" in causes:
        return f"Accept its licence at https://huggingface.co/{model}, then set HF_TOKEN to a token of that account."
    if "RepositoryNotFoundError" in causes:
        return "The Hub knows no such model, or it is private: check the name, and set HF_TOKEN if it is yours."
    if causes & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "TransportError"}:
        return "The Hub cannot be reached from here: download the model where it can be, and give the folder's path."
    if "ImportError" in causes:  # FLUX.2-dev's PixtralProcessor wants torchvision
        return "Install the library that it names, built for the torch that is installed."
    return (
        f"Give a folder written by {pipeline}.save_pretrained, or a Hub id that this machine can reach "
        "(accept the model's licence on the Hub and set HF_TOKEN first, or download it elsewhere and pass its path)."
    )


def write_lora(
    pipeline: Any, folder: Path, tensors: Mapping[str, Tensor], rank: int, alpha: float, file: str = LORA_FILE
) -> Path:
    """A LoRA file for the pipeline's transformer, as its own ``load_lora_weights`` reads it, with rank and alpha."""
    metadata = {"r": rank, "lora_alpha": alpha, "target_modules": sorted({key.split(".lora_")[0] for key in tensors})}
    pipeline.save_lora_weights(
        folder, transformer_lora_layers=dict(tensors), transformer_lora_adapter_metadata=metadata, weight_name=file
    )
    return Path(folder) / file


def write_denoiser(denoiser: Any, folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    """A folder of one denoiser with these parameters, as its class's ``from_pretrained`` reads it."""
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    denoiser.save_config(folder)
    buffers = {name: t for name, t in denoiser.state_dict().items() if name not in tensors}
    pattern = "diffusion_pytorch_model{suffix}.safetensors"
    save_torch_state_dict({**tensors, **buffers}, folder, filename_pattern=pattern, max_shard_size="10GB")
    return folder
