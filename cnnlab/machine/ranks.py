"""One job on several processes, as `torchrun` starts them: who am I, and sums over all of us.

Gradients are summed here, once an update and weighted by sample counts, rather than by
`DistributedDataParallel`: so accumulation, closures (L-BFGS) and uneven batches need no special case, and the
loss curve is that of one process at the same global batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from cnnlab.errors import DataError
from cnnlab.machine.surroundings import left_over, torchrun
from cnnlab.torch_private import foreach_copy_

_log = logging.getLogger(__name__)

Value = TypeVar("Value")

_BUCKET = 1 << 24  # elements that one collective moves: 64 MiB in float32


@dataclass(frozen=True)
class Ranks:
    """This process's place among `world`.

    Every method but `is_main` is a collective: all ranks call it, in the same order. Alone, each is free.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    control: Any = None
    """A group on the CPU, for flags and objects that the host must read."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Adds up each tensor over all ranks, in place."""
        if self.world > 1:
            from torch import distributed

            _in_buckets(tensors, distributed.all_reduce)

    def share_(self, tensors: Sequence[Tensor]) -> None:
        """Gives every rank the tensors of rank 0, in place."""
        if self.world > 1:
            from torch import distributed

            _in_buckets(tensors, lambda flat: distributed.broadcast(flat, src=0))

    def stack(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, one shape on each: (world, ...)."""
        if self.world == 1:
            return tensor[None]
        from torch import distributed

        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        distributed.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    def any(self, flag: int) -> int:
        """The largest flag of all ranks: what one of them saw, all of them act upon at the same step."""
        return self.vote(flag)()

    def vote(self, flag: int) -> Callable[[], int]:
        """Starts `any`; what is returned waits for its result. Asked for a step later, it has arrived."""
        if self.world == 1:
            return lambda: flag
        from torch import distributed

        shared = torch.tensor([flag])
        work = distributed.all_reduce(shared, distributed.ReduceOp.MAX, self.control, async_op=True)

        def result() -> int:
            work.wait()
            return int(shared.item())

        return result

    def share(self, value: Value) -> Value:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        from torch import distributed

        box = [value]
        distributed.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def collect(self, value: Value) -> list[Value]:
        """The values of all ranks, in their order, on every rank."""
        if self.world == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.world
        distributed.all_gather_object(values, value, group=self.control)
        return values

    def in_turn(self, action: Callable[[], Value]) -> Value:
        """`action()` of each rank: rank 0 first, then the first process of every other machine, then the rest.

        What an earlier one leaves on disk the later ones find. Where one fails, all do, and nobody waits for it.

        Raises:
            DataError: another rank's failure, in its words.
        """
        turn = 0 if self.is_main else 1 if self.local_rank == 0 else 2
        found: list[Value] = []
        for now in range(3 if self.world > 1 else 1):
            error: Exception | None = None
            if now == turn:
                try:
                    found.append(action())
                except Exception as caught:
                    error = caught
            failures = self.collect(None if error is None else f"{error}" or type(error).__name__)
            if error is not None:
                raise error
            for rank, failure in enumerate(failures):
                if failure is not None:
                    raise DataError(f"process {rank}: {failure}")
        return found[0]

    def wait(self) -> None:
        """Returns when all ranks have called it."""
        self.any(0)


def _in_buckets(tensors: Sequence[Tensor], collective: Callable[[Tensor], Any]) -> None:
    """Runs `collective` on flat copies of many tensors of one type at a time, and copies the results back."""
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_type.setdefault(tensor.dtype, []).append(tensor.detach())
    for group in by_type.values():
        for bucket in _buckets(group):
            flat = torch.cat([t.flatten() for t in bucket])
            collective(flat)
            parts = flat.split([t.numel() for t in bucket])
            foreach_copy_(bucket, [part.view(t.shape) for part, t in zip(parts, bucket, strict=True)])


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    filled = 0
    for tensor in tensors:
        if bucket and filled + tensor.numel() > _BUCKET:
            yield bucket
            bucket, filled = [], 0
        bucket.append(tensor)
        filled += tensor.numel()
    if bucket:
        yield bucket


def join() -> Ranks:
    """Joins the process group that `torchrun` announces; alone without one."""
    place = torchrun()
    if place.world == 1:
        if warning := left_over():
            _log.warning("%s", warning)
        return Ranks()
    from torch import distributed

    rank, local, world = place.rank, place.local_rank, place.world
    if not distributed.is_initialized():
        cuda = torch.cuda.is_available()
        if local < torch.cuda.device_count():
            torch.cuda.set_device(local)
        # Both kinds of tensors: a machine with GPUs also runs `trainer.device=cpu`.
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    # A day: the others wait here while rank 0 decodes a large data set. One that dies closes its connections.
    control = distributed.new_group(backend="gloo", timeout=timedelta(days=1))
    return Ranks(rank, world, local, control)


def leave() -> None:
    """Leaves the process group, if there is one."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
