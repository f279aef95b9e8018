"""Weights from one process to many at once, tensor by tensor, by torch.distributed. Knows nothing of Ray.

Sender and receivers form a group of their own, apart from that of the learners (``ranks.py``): when one of its members
dies it is given up, and the next one is made of those that are left. Gloo on CPUs, NCCL on GPUs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Store, TCPStore

    Described = dict[str, list[Any]]
    """Name -> [shape, dtype], in the order in which tensors are sent."""


class Broken(Exception):
    """A member did not come, died or fell silent. What a receiver has by then may be a mixture."""


@dataclass(frozen=True, kw_only=True)
class Circle:
    """Who takes part: rank 0 sends, ranks 1 to size − 1 receive."""

    address: str
    """"host:port" where rank 0 is met (``Member.listen``)."""
    name: str
    """One that nobody was ever met by at this address, unless the very same processes are to meet again."""
    size: int
    timeout_s: float
    """How long each waits for the others to come, and then for any one tensor."""


class Member:
    """One process's place in a circle, which lasts from one exchange to the next and is given up when one fails."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._own: TCPStore | None = None
        self._circle: Circle | None = None
        self._names: list[str] = []
        self._group: Any = None

    def listen(self) -> int:
        """The port at which this process is met as rank 0; the same one each time."""
        from torch.distributed import TCPStore

        if self._own is None:
            self._own = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        return self._own.port

    def send(self, circle: Circle, weights: Mapping[str, Tensor], values: Iterable[tuple[str, Tensor]]) -> None:
        """Send ``values`` as rank 0; they are looked at one by one, when all others have come.

        Args:
            weights: tensors of the names, shapes and dtypes of ``values``, in their order.

        Raises:
            Broken: somebody is lost.
            ValueError: a receiver has other weights; it is raised on all members.
        """
        with self._meeting(circle, 0, weights):
            for _, value in values:
                self._pass_on(value.detach().to(self._device).contiguous())

    def receive(self, circle: Circle, rank: int, weights: Mapping[str, Tensor]) -> None:
        """Overwrite ``weights``, in place, with what rank 0 sends; raises as ``send`` does."""
        with self._meeting(circle, rank, weights):
            for target in (weights[name].detach() for name in self._names):
                buffer = target.contiguous()
                self._pass_on(buffer)
                if not target.is_contiguous():
                    target.copy_(buffer)

    def _pass_on(self, tensor: Tensor) -> None:
        import torch

        if tensor.numel():  # as plain bytes: neither backend then has a say in the dtype
            self._group.broadcast(tensor.reshape(-1).view(torch.uint8), 0).wait()

    @contextmanager
    def _meeting(self, circle: Circle, rank: int, weights: Mapping[str, Tensor]) -> Iterator[None]:
        try:
            if circle != self._circle:
                self._leave()
                store = self._store(circle, rank)
                self._names = _agree(store, circle, rank, _described(weights))
                self._group = _group(store, circle, rank, self._device)
                self._circle = circle
            yield
        except BaseException as error:
            self._leave()
            if isinstance(error, RuntimeError):
                raise Broken(f"a member was lost: {str(error).strip().splitlines()[0]}") from None
            raise

    def _store(self, circle: Circle, rank: int) -> Store:
        from torch.distributed import PrefixStore, TCPStore

        host, _, port = circle.address.rpartition(":")
        limit = timedelta(seconds=circle.timeout_s)
        store = self._own if rank == 0 else TCPStore(host, int(port), timeout=limit, wait_for_workers=False)
        assert store is not None, "rank 0 has to listen first"
        store.set_timeout(limit)
        return PrefixStore(circle.name, store)

    def _leave(self) -> None:
        if self._group is not None:
            self._group.abort()
        self._circle, self._group = None, None  # which closes the connections, so that others do not wait in vain


def _described(weights: Mapping[str, Tensor]) -> Described:
    return {name: [list(t.shape), str(t.dtype)] for name, t in weights.items()}


def _agree(store: Store, circle: Circle, rank: int, own: Described) -> list[str]:
    """The names in the order in which rank 0 sends them; returns when all have come and have the same weights."""
    if rank == 0:
        store.set("sent", json.dumps(own))
    sent: Described = json.loads(_said(store, "sent", 0, circle))
    wrong = sorted(sent.keys() ^ own.keys()) or [name for name in sent if sent[name] != own[name]]
    first = wrong and f"{wrong[0]} (sent: {sent.get(wrong[0])}, there: {own.get(wrong[0])})"
    store.set(f"rank {rank}", f"{len(wrong)} tensors differ, first {first}" if wrong else "")
    for other in range(1, circle.size):
        if complaint := _said(store, f"rank {other}", other, circle):
            raise ValueError(
                f"the weights that are broadcast do not fit receiver {other} of {circle.size - 1}: {complaint}; check that "
                "generator.model is the same on every node"
            )
    return list(sent)


def _said(store: Store, key: str, by: int, circle: Circle) -> str:
    try:
        return store.get(key).decode()
    except RuntimeError as error:
        raise Broken(f"rank {by} of {circle.size} did not come within {circle.timeout_s:g} s") from error


def _group(store: Store, circle: Circle, rank: int, device: str) -> Any:
    """A process group beside the default one, of which there may be none."""
    import torch.distributed as dist

    limit = timedelta(seconds=circle.timeout_s)
    if not device.startswith("cuda"):
        return dist.ProcessGroupGloo(store, rank, circle.size, limit)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit
    with _blocking():
        return dist.ProcessGroupNCCL(store, rank, circle.size, options)


@contextmanager
def _blocking() -> Iterator[None]:
    """NCCL's groups that are made meanwhile raise in ``wait`` when time is up; others end the process."""
    name = "TORCH_NCCL_BLOCKING_WAIT"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before
