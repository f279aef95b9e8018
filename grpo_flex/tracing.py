"""What a computation costs, measured while it runs: bytes alive at the same time, bytes kept for the backward pass, FLOPs.

Everything works on meta tensors, which have no memory of their own, as on real ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one call."""

    flops: int
    """Of matrix products, convolutions and attention; a multiplication and an addition count as two."""
    peak: int
    """Largest number of bytes that its own tensors held at one time."""
    kept: int
    """Bytes of its own that are still held when it returns."""


def cost(call: Callable[[], Any], live: LiveBytes | None = None) -> Cost:
    """Run ``call`` and say what it cost. Tensors that ``live`` has seen before are not its own."""
    live = live or LiveBytes()
    before, flops = live.now, live.flops
    live.peak = before
    with fused_attention(), live:
        result = call()
        kept = live.now
        del result
    return Cost(flops=live.flops - flops, peak=live.peak - before, kept=kept - before)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operators make, from their birth to their death, and operators' FLOPs.

    A context manager that may be entered several times, also inside itself; it goes on counting deaths outside. FLOPs are by PyTorch's own
    formulas, but not by its FlopCounterMode, which keeps tensors alive for its count by module.
    """

    def __init__(self, existing: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._known = {t.untyped_storage()._cdata for t in existing}
        self._entered = 0

    def __enter__(self) -> Self:
        """Only the outermost entry counts: a mode that is entered twice would see, and count, every operator twice."""
        self._entered += 1
        return super().__enter__() if self._entered == 1 else self

    def __exit__(self, *raised: Any) -> None:
        self._entered -= 1
        if not self._entered:
            super().__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def saved_bytes(call: Callable[[], Any], existing: Iterable[torch.Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward pass of ``call``, each storage once, without the ``existing`` ones."""
    known = {t.untyped_storage()._cdata for t in existing}
    kept: dict[int, torch.Tensor] = {}  # the tensors too, lest a storage's number is used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with fused_attention(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    total = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in known)
    del result
    return total


@contextmanager
def fused_attention() -> Iterator[None]:
    """On meta tensors, attention as a GPU's fused kernels take it.

    PyTorch chooses the kernel by device, and for meta tensors the one that writes the whole matrix of scores.
    """
    functional: Any = torch.nn.functional
    stock = functional.scaled_dot_product_attention

    def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, *rest: Any, **options: Any) -> Any:
        if query.device.type != "meta" or options.get("enable_gqa"):
            return stock(query, key, value, attn_mask, *rest, **options)
        if attn_mask is None:
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
        bias = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True)[0]

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = stock
