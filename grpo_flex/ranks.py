"""Several learner processes as one, by torch.distributed. Knows nothing of Ray.

Every rank holds the whole adapter and computes some of the groups; gradients are summed over ranks before each
optimiser step, which all of them then take alike. Gloo on CPUs, NCCL on GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's place among the learners. ``Ranks()`` is a learner by itself: nothing is sent."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    def join(self, address: str, timeout_s: float) -> None:
        """Meet the others at "host:port", where rank 0 listens; returns when all are there.

        Args:
            timeout_s: how long any later exchange may take before it raises.
        """
        import torch.distributed as dist

        dist.init_process_group(
            "nccl" if self.device.startswith("cuda") else "gloo",
            init_method=f"tcp://{address}",
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=timeout_s),
        )

    def gather(self, value: T) -> list[T]:
        """Everybody's value, in the order of the ranks, on every rank."""
        import torch.distributed as dist

        if self.size == 1:
            return [value]
        found: list[T | None] = [None] * self.size
        dist.all_gather_object(found, value)
        return found  # pyright: ignore[reportReturnType] - every place is filled

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Every gradient becomes its sum over ranks, with the same bits everywhere."""
        import torch
        import torch.distributed as dist

        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])  # one exchange instead of hundreds
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def shard(self, transformer: nn.Module, whole: Sequence[nn.Parameter]) -> None:
        """Leave each rank a part of the transformer's weights (FSDP2); a block is put together while it computes.

        Forward and backward passes are collective from then on: every rank has to do as many as the others.

        Args:
            whole: parameters that every rank keeps whole, the adapter's.
        """
        from torch import nn
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.partition(":")[0], (self.size,))
        lists = [child for child in transformer.children() if isinstance(child, nn.ModuleList)]
        for module in [*(block for blocks in lists for block in blocks), transformer]:
            fully_shard(module, mesh=mesh, ignored_params=set(whole))
