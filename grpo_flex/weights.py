"""The LoRA adapter: attach it, read it, write it, bit for bit; and averages of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from grpo_flex import config as cfg
from grpo_flex.prompts import seed_for
from grpo_flex.types import Adapter

if TYPE_CHECKING:
    from torch import Tensor, nn

    from grpo_flex.generators.base import Model


def attach_adapter(model: Model, config: cfg.Adapter, seed: int) -> list[nn.Parameter]:
    """Add a fresh LoRA adapter to the transformer and return its parameters (float32, trainable).

    Fresh means B = 0: the adapted model equals the base. Dropout is 0, or the ratio would not be 1.

    Raises:
        ValueError: no module of the transformer matches the targets.
    """
    import torch
    from peft import LoraConfig

    torch.manual_seed(seed_for(seed, "adapter"))
    targets = list(config.targets or model.adapter_targets)
    if not any(name.endswith(target) for name, _ in model.transformer.named_modules() for target in targets):
        raise ValueError(
            f"adapter.targets {targets} match no module of {type(model.transformer).__name__}; give suffixes such as 'attn.to_q'"
        )
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType] - peft only divides by it
        target_modules=targets,
        lora_dropout=0.0,
    )
    model.transformer.add_adapter(lora)  # pyright: ignore[reportCallIssue]
    parameters = [p for p in model.transformer.parameters() if p.requires_grad]
    for p in parameters:
        p.data = p.data.float()
    return parameters


def read_adapter(transformer: nn.Module, version: int) -> Adapter:
    """A copy of the adapter's tensors, on the CPU."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(transformer)
    return Adapter(version=version, tensors={k: v.detach().to("cpu", copy=True) for k, v in state.items()})


def write_adapter(transformer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load published tensors into an attached adapter.

    Raises:
        ValueError: tensors that belong to another adapter (names or shapes differ).
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    expected = get_peft_model_state_dict(transformer)
    wrong = sorted(expected.keys() ^ tensors.keys()) or [k for k in expected if expected[k].shape != tensors[k].shape]
    if wrong:
        raise ValueError(
            f"these adapter weights do not fit the model: {len(wrong)} tensors differ, first {wrong[0]}; check adapter.rank and adapter.targets"
        )
    set_peft_model_state_dict(transformer, dict(tensors))


# ---------------------------------------------------------------- averages


def copies(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Tensors of the parameters' values, where the parameters are."""
    return [p.detach().clone() for p in parameters]


def follow(average: Sequence[Tensor], parameters: Sequence[nn.Parameter], decay: float) -> None:
    """average ← decay·average + (1−decay)·parameters, in place; with decay 0 an exact copy."""
    for kept, p in zip(average, parameters, strict=True):
        if decay == 0:
            kept.copy_(p.detach())
        else:
            kept.mul_(decay).add_(p.detach(), alpha=1 - decay)


def warmed_up(decay: float, updates: int) -> float:
    """min(decay, (1+n)/(10+n)) after n updates: a young average forgets its beginning quickly."""
    return min(decay, (1 + updates) / (10 + updates))


@contextmanager
def lent(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """The parameters hold ``values`` while the block lasts. Storage changes hands; nothing is copied.

    Graphs that were recorded before remember the parameters, not their storage, so ``backward`` belongs outside.
    """
    kept = [p.data for p in parameters]
    try:
        for p, value in zip(parameters, values, strict=True):
            p.data = value
        yield
    finally:
        for p, own in zip(parameters, kept, strict=True):
            p.data = own
