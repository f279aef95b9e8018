"""Several learner processes as one, by torch.distributed. Knows nothing of Ray.

Every rank holds the whole adapter and computes some of the groups; gradients are summed over ranks before each
optimiser step, which all of them then take alike. Gloo on CPUs, NCCL on GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

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

    def clip(self, parameters: Sequence[nn.Parameter], most: float, split: bool) -> float:
        """Scale all gradients down to a norm of ``most`` over all parameters; returns the norm that they had.

        Args:
            split: each rank has its own part of every parameter.
        """
        from torch.nn.utils import clip_grads_with_norm_, get_total_norm

        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if split:
            norm = norm.new_tensor(sum(self.gather(float(norm) ** 2)) ** 0.5)
        clip_grads_with_norm_(parameters, most, norm)
        return float(norm)

    def shard(self, transformer: nn.Module, whole: Sequence[nn.Parameter]) -> None:
        """Leave each rank a part of the transformer's weights (FSDP2); a block is put together while it computes.

        Forward and backward passes are collective from then on: every rank has to do as many as the others. Gradients
        of sharded weights are means over ranks, taken in float32.

        Of a model with several experts each is put together by itself, so all ranks have to call the same one.

        Args:
            whole: parameters that every rank keeps whole, the adapter's.
        """
        import torch
        from torch import nn
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(self.device.partition(":")[0], (self.size,))
        experts = list(transformer.children()) if isinstance(transformer, nn.ModuleDict) else [transformer]
        lists = [child for expert in experts for child in expert.children() if isinstance(child, nn.ModuleList)]
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        done: set[nn.Module] = set()
        for outer in [*(block for blocks in lists for block in blocks), *experts]:
            for module in _groups(outer, done):
                # Nothing stays together after a pass, not even the root: other weights may be lent before the next one.
                fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=set(whole))
                done.add(module)


def _groups(module: nn.Module, done: Set[nn.Module], outer: bool = True) -> Iterator[nn.Module]:
    """The module, after those inside it whose trained weights need a group of their own.

    FSDP2 takes trained weights of one dtype in a group, while models in bfloat16 keep some norms and tables in float32.

    Args:
        done: modules that are grouped already; those that are yielded are added before the next one is asked for.
    """
    from torch import nn

    inside, container = _trained_dtypes(module, done), isinstance(module, nn.ModuleList)  # has no forward pass to hook
    if len(inside) > 1 or container:
        for child in module.children():
            if not _trained_dtypes(child, done) <= _own_dtypes(module):
                yield from _groups(child, done, outer=False)
    if outer or (not container and _trained_dtypes(module, done)):
        yield module


def _trained_dtypes(module: nn.Module, done: Set[nn.Module]) -> set[torch.dtype]:
    inside = (_trained_dtypes(child, done) for child in module.children())
    return set() if module in done else _own_dtypes(module).union(*inside)


def _own_dtypes(module: nn.Module) -> set[torch.dtype]:
    return {p.dtype for p in module.parameters(recurse=False) if p.requires_grad}


# ---------------------------------------------------------------- parts of a tensor


def own(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, in the same memory; of any other tensor, all of it."""
    from torch.distributed.tensor import DTensor

    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def whole(part: Tensor, like: Tensor) -> Tensor:
    """Put together, on every rank, what is divided among them as ``like`` is."""
    from torch.distributed.tensor import DTensor

    if not isinstance(like, DTensor):
        return part
    divided = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return divided.full_tensor()


def part(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that all ranks have, divided as ``like`` is; nothing is sent."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None).to_local()
