"""One job on several processes, as `torchrun` starts them: who am I, and sums over all of us.

Gradients are summed here, once an update and weighted by sample counts, rather than by
`DistributedDataParallel`: so accumulation, closures (L-BFGS) and uneven batches need no special case, and the
loss curve is that of one process at the same global batch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_BUCKET = 1 << 24  # elements summed by one collective: 64 MiB in float32


@dataclass(frozen=True)
class Ranks:
    """This process's place among `world`; `control` is a CPU group for flags that the host must read."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    control: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Adds up each tensor over all ranks, in place, in flat buckets of one type."""
        if self.world == 1 or not tensors:
            return
        from torch import distributed

        by_type: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_type.setdefault(tensor.dtype, []).append(tensor)
        for group in by_type.values():
            for bucket in _buckets(group):
                flat = torch.cat([t.flatten() for t in bucket])
                distributed.all_reduce(flat)
                parts = flat.split([t.numel() for t in bucket])
                torch._foreach_copy_(bucket, [part.view(t.shape) for part, t in zip(parts, bucket, strict=True)])

    def any(self, flag: int) -> int:
        """The largest flag of all ranks: what one of them saw, all of them act upon at the same step."""
        if self.world == 1:
            return flag
        from torch import distributed

        shared = torch.tensor([flag])
        distributed.all_reduce(shared, op=distributed.ReduceOp.MAX, group=self.control)
        return int(shared.item())

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        from torch import distributed

        box = [value]
        distributed.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def wait(self) -> None:
        if self.world > 1:
            self.any(0)


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if filled and filled + tensor.numel() > _BUCKET:
            buckets.append([])
            filled = 0
        buckets[-1].append(tensor)
        filled += tensor.numel()
    return buckets


def join() -> Ranks:
    """Joins the process group that `torchrun` announces; alone without one."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks()
    from torch import distributed

    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if not distributed.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(local)
        distributed.init_process_group("nccl" if cuda else "gloo")
    control = distributed.new_group(backend="gloo")
    return Ranks(rank, world, local, control)


def leave() -> None:
    """Leaves the process group, if there is one."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
