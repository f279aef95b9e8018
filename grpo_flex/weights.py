"""What is trained of a model: a LoRA adapter or all weights. Read, written and lent bit for bit; and averages of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from grpo_flex import config as cfg
from grpo_flex.prompts import seed_for
from grpo_flex.ranks import Ranks, own, part, whole
from grpo_flex.types import Adapter

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from grpo_flex.generators.base import Model


class Weights(Protocol):
    """What is trained of one loaded model. A rollout worker uses ``write`` alone."""

    kept: list[Tensor]
    """Copies that ``base`` needs."""

    @property
    def split(self) -> bool:
        """Whether each rank has only its part of every parameter; ``read`` and ``save`` are then collective."""
        ...

    @property
    def has_base(self) -> bool:
        """Whether ``base`` and ``read_base`` are possible."""
        ...

    def train(self, ranks: Ranks, shard: bool) -> list[nn.Parameter]:
        """Make ready for training.

        Returns:
            What the optimiser steps, float32. Gradients add up in their ``grad``, which has to be there.
        """
        ...

    def sync(self) -> None:
        """The model takes over what the optimiser did to the parameters."""
        ...

    def copies(self, needed: bool) -> list[Tensor]:
        """The parameters' values to keep apart; the parameters themselves where that is not ``needed``."""
        ...

    def lent(self, values: Sequence[Tensor]) -> AbstractContextManager[None]:
        """The model computes with these values of the parameters while the block lasts."""
        ...

    def base(self) -> AbstractContextManager[None]:
        """The model computes as before all training while the block lasts."""
        ...

    def read(self, values: Sequence[Tensor], exact: bool = False) -> dict[str, Tensor]:
        """Values by name, whole and on the CPU: in the precision in which the model computes, or ``exact``."""
        ...

    def read_base(self) -> dict[str, Tensor]: ...

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what ``read`` gave.

        Raises:
            ValueError: tensors of something else (names or shapes differ).
        """
        ...

    def whole(self, i: int, value: Tensor) -> Tensor:
        """A tensor of the shape of parameter ``i`` (the optimiser's moments) as it would be without ``split``."""
        ...

    def part(self, i: int, value: Tensor) -> Tensor:
        """The inverse of ``whole``."""
        ...

    def save(self, folder: Path, tensors: Mapping[str, Tensor]) -> Path:
        """Write what ``read`` gave as diffusers reads it."""
        ...


class Lora:
    """A fresh LoRA adapter beside the frozen transformer (``attach_adapter``)."""

    split = False
    has_base = True

    def __init__(self, model: Model, config: cfg.Adapter, seed: int) -> None:
        self._model, self._config = model, config
        self.kept: list[Tensor] = []
        self._parameters = attach_adapter(model, config, seed)

    def train(self, ranks: Ranks, shard: bool) -> list[nn.Parameter]:
        if shard:
            ranks.shard(self._model.transformer, self._parameters)
        return self._parameters

    def sync(self) -> None:
        pass  # the model computes with the parameters themselves

    def copies(self, needed: bool) -> list[Tensor]:
        return copies(self._parameters) if needed else list[Any](self._parameters)

    def lent(self, values: Sequence[Tensor]) -> AbstractContextManager[None]:
        same = all(a is b for a, b in zip(values, self._parameters, strict=True))
        return nullcontext() if same else lent(self._parameters, values)

    def base(self) -> AbstractContextManager[None]:
        return without_adapter(self._model.transformer)

    def read(self, values: Sequence[Tensor], exact: bool = False) -> dict[str, Tensor]:
        with self.lent(values):
            return dict(read_adapter(self._model.transformer, 0).tensors)

    def read_base(self) -> dict[str, Tensor]:
        """Zeros, which leave the base model as it is."""
        return {name: t.new_zeros(t.shape) for name, t in self.read(self._parameters).items()}

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        write_adapter(self._model.transformer, tensors)

    def whole(self, i: int, value: Tensor) -> Tensor:
        return value

    def part(self, i: int, value: Tensor) -> Tensor:
        return value

    def save(self, folder: Path, tensors: Mapping[str, Tensor]) -> Path:
        return self._model.save_adapter(folder, tensors, self._config.rank, self._config.alpha)


class Whole:
    """All weights of the transformer.

    The model computes with weights in the generator's precision. What the optimiser steps are float32 masters beside
    them, and each gradient moves to its master as soon as it is there: sums over passes and groups are float32 too.

    Raises:
        ValueError: weights that are quantised.
    """

    split: bool = False

    def __init__(self, model: Model, config: cfg.Full) -> None:
        self._model, self._config = model, config
        self._masters: list[nn.Parameter] = []
        self.kept: list[Tensor] = []
        """The weights that training began with."""
        self._reads = True
        self._list()
        if frozen := [name for name, p in zip(self._names, self._working, strict=True) if not p.is_floating_point()]:
            raise ValueError(
                f"adapter is Full, but {len(frozen)} weights are quantised, first {frozen[0]}, and cannot be trained; set "
                "generator.memory.base_bits=0, or train a LoRA adapter"
            )

    @property
    def has_base(self) -> bool:
        return bool(self.kept)

    def _list(self) -> None:
        named = dict(self._model.transformer.named_parameters())
        self._names, self._working = list(named), list(named.values())
        self._buffers = {name for name, _ in self._model.transformer.named_buffers()}

    def train(self, ranks: Ranks, shard: bool) -> list[nn.Parameter]:
        import torch

        self._model.transformer.requires_grad_(True)
        if shard:
            ranks.shard(self._model.transformer, ())
            self._list()
        self.split, self._reads = shard, not shard or ranks.rank == 0
        self._masters = [torch.nn.Parameter(own(p).to(torch.float32, copy=True)) for p in self._working]
        for p, master in zip(self._working, self._masters, strict=True):
            # FSDP2 gives the mean over ranks.
            p.register_post_accumulate_grad_hook(partial(_move_gradient, master, ranks.size if shard else 1))
        if self._config.keep_base:
            self.kept = [self._copy(own(p)) for p in self._working]
        return self._masters

    def _copy(self, value: Tensor) -> Tensor:
        return value.detach().to("cpu" if self._config.copies == "cpu" else value.device, copy=True)

    def sync(self) -> None:
        self._hold(self._masters)

    def _hold(self, values: Sequence[Tensor]) -> None:
        """The model's weights become these values. ``data``: no graph that was recorded before takes offence."""
        for p, value in zip(self._working, values, strict=True):
            own(p).data.copy_(value.detach())

    def copies(self, needed: bool) -> list[Tensor]:
        return [self._copy(p) for p in self._masters] if needed else list[Any](self._masters)

    def lent(self, values: Sequence[Tensor]) -> AbstractContextManager[None]:
        same = all(a is b for a, b in zip(values, self._masters, strict=True))
        return nullcontext() if same else self._lent(values)

    @contextmanager
    def _lent(self, values: Sequence[Tensor]) -> Iterator[None]:
        import torch

        self._hold(values)
        try:
            yield
        finally:
            self._hold(self._masters)
            if self.split:
                # A backward pass that follows gathers on a stream of its own, which waits for passes and not for this.
                for device in {p.device for p in self._working if p.is_cuda}:
                    torch.cuda.current_stream(device).synchronize()

    def base(self) -> AbstractContextManager[None]:
        assert self.has_base, "adapter.keep_base is false, which a validated configuration has only where nobody asks"
        return self._lent(self.kept)

    def read(self, values: Sequence[Tensor], exact: bool = False) -> dict[str, Tensor]:
        """On rank 0 alone where parameters are split: the others take part and have nothing to keep."""
        return {name: t.to("cpu", copy=True) for name, t in self.each(values, exact) if self._reads}

    def each(self, values: Sequence[Tensor], exact: bool = False) -> Iterator[tuple[str, Tensor]]:
        """As ``read``, one after the other and not copied; where parameters are split all ranks have to go through all."""
        for name, p, value in zip(self._names, self._working, values, strict=True):
            there = p.device if self.split else value.device
            yield name, whole(value.detach().to(there, value.dtype if exact else p.dtype), p)

    def held(self) -> dict[str, Tensor]:
        """What the model computes with, by name and in the same memory."""
        return {name: p.detach() for name, p in zip(self._names, self._working, strict=True)}

    def read_base(self) -> dict[str, Tensor]:
        return self.read(self.kept)

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        import torch

        shapes = {name: p.shape for name, p in zip(self._names, self._working, strict=True)}
        # Saved weights have buffers beside them, which are computed from the configuration (SD3's positions).
        tensors = {name: t for name, t in tensors.items() if name not in self._buffers}
        wrong = sorted(shapes.keys() ^ tensors.keys()) or [k for k in shapes if shapes[k] != tensors[k].shape]
        if wrong:
            raise ValueError(
                f"these weights do not fit the model: {len(wrong)} tensors differ, first {wrong[0]}; check generator.model "
                "and whether adapter is Full there too"
            )
        with torch.no_grad():
            for i, target in enumerate(self._masters or self._working):
                target.copy_(self.part(i, tensors[self._names[i]]))
        if self._masters:
            self.sync()

    def whole(self, i: int, value: Tensor) -> Tensor:
        return whole(value, self._working[i])

    def part(self, i: int, value: Tensor) -> Tensor:
        return part(value, self._working[i])

    def save(self, folder: Path, tensors: Mapping[str, Tensor]) -> Path:
        return self._model.save_weights(folder, tensors)


def _move_gradient(master: nn.Parameter, times: int, p: nn.Parameter) -> None:
    assert p.grad is not None and master.grad is not None
    master.grad.add_(own(p.grad), alpha=times)
    p.grad = None


# ---------------------------------------------------------------- the adapter


def attach_adapter(model: Model, config: cfg.Adapter, seed: int) -> list[nn.Parameter]:
    """Add a fresh LoRA adapter to the transformer and return its parameters (float32, trainable).

    Fresh means B = 0: the adapted model equals the base. Dropout is 0, or the ratio would not be 1.

    Raises:
        ValueError: a transformer that takes no adapter, or no module of it matches the targets.
    """
    import torch
    from peft import LoraConfig

    if not hasattr(model.transformer, "add_adapter"):
        raise ValueError(
            f"{type(model.transformer).__name__} takes no LoRA adapter: derive it from diffusers.loaders.PeftAdapterMixin, as "
            "diffusers' own transformers are, or train all its weights, with adapter=Full()"
        )

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


@contextmanager
def without_adapter(transformer: Any) -> Iterator[None]:
    """The transformer is the frozen base while the block lasts."""
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()


# ---------------------------------------------------------------- averages


def copies(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Tensors of the parameters' values, where the parameters are."""
    return [p.detach().clone() for p in parameters]


def follow(average: Sequence[Tensor], parameters: Sequence[nn.Parameter], decay: float) -> None:
    """average ← decay·average + (1−decay)·parameters, in place; with decay 0 an exact copy."""
    for kept, p in zip(average, parameters, strict=True):
        if kept is p:
            assert decay == 0, "an average that is to lag behind needs a copy: the objective has to say needs_old"
        elif decay == 0:
            kept.copy_(p.detach())
        else:
            kept.mul_(decay).add_(p.detach().to(kept.device), alpha=1 - decay)


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


# ---------------------------------------------------------------- travel


class Parcel(dict[str, Any]):
    """A dictionary whose tensors, at any depth, travel as plain memory: Ray then copies them once into its object store,
    and whoever fetches them there reads them in place. Pickled as they are, they would be copied several times.

    It arrives as an ordinary dictionary. Tensors need to be on the CPU; those that are one object stay one.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        import torch
        from torch.utils._pytree import tree_map_only

        flat: dict[int, _Flat] = {}
        packed = tree_map_only(torch.Tensor, lambda t: flat.setdefault(id(t), _Flat(t)), dict(self))
        return dict, (packed,)


class _Flat:
    """A tensor as bytes, which pickle hands over without a copy."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()

    def __reduce__(self) -> tuple[Any, ...]:
        import torch

        plain = self.tensor.contiguous().reshape(-1).view(torch.uint8)
        return _unflattened, (plain.numpy(), self.tensor.dtype, tuple(self.tensor.shape))


def _unflattened(plain: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nobody writes to it
        return torch.from_numpy(plain).view(dtype).reshape(shape)
