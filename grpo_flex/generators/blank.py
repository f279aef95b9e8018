"""Pipelines from their configuration alone: the right modules, without the weights.

On torch's meta device tensors have shapes and no memory, so a plan runs a generator's own code at full size on any
machine. On a real device the weights are random, which is enough to measure speed and memory.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_flex.config import ConfigError
from grpo_flex.generators.known import cached, public
from grpo_flex.generators.picture import NEGATIVE

if TYPE_CHECKING:
    from grpo_flex.generators.base import Conditioning


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a saved pipeline says of itself."""

    index: Mapping[str, Any]
    """model_index.json: the pipeline's class, the class of each component, and the pipeline's own settings."""
    parts: Mapping[str, Mapping[str, Any]]
    """The configuration of each component that has one."""


@contextmanager
def without_weights(device: str = "meta") -> Iterator[None]:
    """While the block lasts, diffusers makes pipelines from their configuration instead of loading them.

    Every generator loads through ``DiffusionPipeline.from_pretrained``; replacing that one method runs the generator's
    own code on the result, and no generator has to know of plans and benchmarks.
    """
    from diffusers import DiffusionPipeline

    loads = DiffusionPipeline.__dict__["from_pretrained"]

    def make(cls: Any, model: str, dtype: Any = None, torch_dtype: Any = None, **given: Any) -> Any:
        return blank_pipeline(cls, describe(model), torch_dtype if dtype is None else dtype, device, given)

    DiffusionPipeline.from_pretrained = classmethod(make)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        DiffusionPipeline.from_pretrained = loads


def describe(model: str) -> Description:
    """The description of a folder, of what the Hub's cache on this machine has, or of a known public model.

    Raises:
        ConfigError: neither; or a file of it cannot be read.
    """
    folder = Path(model) if Path(model).is_dir() else cached(model)
    if folder is not None:
        return _from_folder(folder)
    known = public()
    if model not in known:
        raise ConfigError(
            f"generator.model is {model!r}, whose configuration is not on this machine; known without it: "
            f"{', '.join(sorted(known))}. Fetch its small files, e.g. hf download {model} --include '*.json', or pass the "
            "folder of a saved pipeline with --model"
        )
    return Description(index=known[model]["index"], parts=known[model]["parts"])


def blank_pipeline(cls: Any, described: Description, dtype: Any, device: str, given: Mapping[str, Any]) -> Any:
    """A pipeline of class ``cls`` with fresh modules; tokenizers and processors are left out.

    Args:
        dtype: of all components, or by name with a "default".
        given: components to take instead (None: to leave out).

    Raises:
        ConfigError: the description is of another pipeline.
    """
    found = described.index.get("_class_name")
    if found != cls.__name__:
        raise ConfigError(f"generator.model holds a {found}; this generator needs a {cls.__name__}")
    made: dict[str, Any] = {}
    for name, said in described.index.items():
        if name.startswith("_") or name in given:
            continue
        if not isinstance(said, list):
            made[name] = said  # a setting of the pipeline itself
        elif name in described.parts:
            of_part = dtype.get(name, dtype.get("default")) if isinstance(dtype, Mapping) else dtype
            made[name] = _component(said[1], described.parts[name], of_part, device)
        else:
            made[name] = None
    accepted = inspect.signature(cls.__init__).parameters
    return cls(**{name: part for name, part in (made | dict(given)).items() if name in accepted})


def stand_in(model: Any) -> Conditioning:
    """Zeros in the shapes of a prompt's encoding at its full length: what cost depends on, without a text encoder.

    Args:
        model: any of this package's loaded generators; what one of them does not read does not matter to it. Another one
            has a method ``stand_in()`` of its own.
    """
    import torch

    if hasattr(model, "stand_in"):
        return model.stand_in()
    config, shape = model.config, model.pipeline.transformer.config
    width = next(shape[name] for name in ("joint_attention_dim", "text_dim", "cap_feat_dim") if name in shape)
    both = "text_encoder_3" in getattr(config, "texts", ())  # SD3 puts CLIP's 77 tokens before those of T5
    tokens = config.max_sequence_length + (77 if both else 0)
    made = {"embeds": torch.zeros(1, tokens, width, device=model.device)}
    if "pooled_projection_dim" in shape:
        made["pooled"] = torch.zeros(1, shape["pooled_projection_dim"], device=model.device)
    other = {NEGATIVE + name: tensor for name, tensor in made.items()} if model._other_branch() else {}
    source = (
        {"source": torch.zeros(1, *model.latent_shape, device=model.device)} if getattr(config, "edits", False) else {}
    )
    return {**made, **other, **source, "mask": torch.ones(1, tokens, dtype=torch.bool)}


def _component(name: str, config: Mapping[str, Any], dtype: Any, device: str) -> Any:
    import diffusers
    import transformers

    cls: Any = getattr(diffusers, name, None)
    if cls is not None:
        if not hasattr(cls, "parameters"):  # a scheduler: its noise levels are numbers, wherever the weights are
            return cls.from_config(dict(config))
        with _born(dtype, device):
            module = cls.from_config(dict(config))
        kept = cls._keep_in_fp32_modules or []
    else:
        cls = getattr(transformers, name)
        with _born(dtype, device):
            module = cls(cls.config_class(**config))
        kept = getattr(cls, "_keep_in_fp32_modules_strict", None) or []
    return _cast(module, dtype, tuple(kept)).eval()


@contextmanager
def _born(dtype: Any, device: str) -> Iterator[None]:
    """Tensors that are made meanwhile are of this precision (None: torch's default) and there: a large model made in
    float32 and then cast would need a GPU twice its size."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def _cast(module: Any, dtype: Any, kept: tuple[str, ...]) -> Any:
    """The module in ``dtype``, but for the parts that its class wants in float32 whatever the rest is."""
    import torch

    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if dtype is not None and tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if any(part in name.split(".") for part in kept) else dtype)
    return module


def _from_folder(folder: Path) -> Description:
    index = _read(folder / "model_index.json")
    parts = {}
    for name, said in index.items():
        files = [folder / name / file for file in ("config.json", "scheduler_config.json")]
        if isinstance(said, list) and said[0] is not None and (there := next((f for f in files if f.is_file()), None)):
            parts[name] = _read(there)
    missing = [
        name for name, said in index.items()
        if isinstance(said, list) and said[1] is not None and name.startswith(("transformer", "vae", "text_encoder"))
        and name not in parts
    ]  # fmt: skip
    if missing:
        raise ConfigError(f"generator.model '{folder}' has no {missing[0]}/config.json; give a complete saved pipeline")
    return Description(index=index, parts=parts)


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"generator.model: '{file}' cannot be read ({error}); give a complete saved pipeline"
        ) from error
