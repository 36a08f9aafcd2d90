"""Batches of a split by position: what batch b of epoch e holds depends on (seed, e, b), not on what ran."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from cnnlab import rng
from cnnlab.data.splits import TensorSplit
from cnnlab.errors import DataError
from cnnlab.protocols import Batch, Split, to_device

Transform = Callable[[Batch, int], Batch]
"""`(batch on the device, epoch) -> batch`: augmentation and normalization."""

_RESIDENT_SHARE = 0.25
"""Part of the free device memory that a split may take; the rest is for weights and activations."""


class Loader:
    """Serves one rank's part of a split's batches, on the device.

    The global batch b of an epoch is `order[b * batch_size : (b + 1) * batch_size]`, where the order is a
    permutation drawn from (seed, epoch), or ascending without shuffling. Rank r gets `[r::world]` of it, so
    each sample is served exactly once an epoch, whatever the ranks. There is no state: a resumed run asks for
    `batches(epoch, start)`.

    On CUDA the split moves to the device when it takes at most a quarter of the free memory, and a batch is
    then a gather there. Otherwise a thread gathers the next batch into pinned memory while the device
    computes.

    Args:
        split: what to serve.
        batch_size: samples a global batch, over all ranks.
        seed: of the order.
        shuffle: a new order each epoch; for training only.
        drop_last: leaves out the uneven last batch.
        rank, world: this process and the number of processes.
        device: where batches go.
        transform: applied to each batch on the device.

    Raises:
        DataError: without a single batch to serve.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        transform: Transform | None = None,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world:
            raise ValueError(f"expected batch_size >= 1 and 0 <= rank < world, received {batch_size}, {rank}, {world}")
        self.length = len(split)
        self.steps = self.length // batch_size if drop_last else -(-self.length // batch_size)
        if self.steps == 0:
            raise DataError(
                f"expected at least one batch, received {self.length} samples for a batch of {batch_size}; "
                f"type trainer.drop_last=false or a smaller trainer.batch_size"
            )
        self.device = torch.device(device)
        self.resident = self.device.type == "cuda" and _fits(split, self.device)
        self.split = split.to(self.device) if self.resident and isinstance(split, TensorSplit) else split
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world = world
        self.transform = transform

    def describe(self) -> str:
        """One line on where the images are and how they reach the device."""
        if self.resident:
            how = f"resident on {self.device}"
        elif self.device.type == "cuda":
            how = f"gathered by the CPU, one batch ahead of {self.device}"
        else:
            how = "gathered by the CPU"
        size = f" ({self.split.nbytes / 2**20:,.1f} MiB)" if isinstance(self.split, TensorSplit) else ""
        return f"{self.length:,} samples{size}, {self.steps:,} batches of {self.batch_size}, {how}"

    def order(self, epoch: int) -> Tensor:
        """(length,) int64 on the CPU: the order in which the epoch visits the split."""
        return rng.permutation(self.seed, epoch, self.length) if self.shuffle else torch.arange(self.length)

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Batch, int]]:
        """This rank's part of each batch of the epoch from batch `start` on, and the size of the whole batch.

        A part is empty where the last batch has fewer samples than there are ranks.
        """
        order = self.order(epoch)
        if self.resident:
            # One copy an epoch: copying each batch's indices from pageable memory would wait for the device.
            order = order.to(self.device)
        whole = list(order.split(self.batch_size))[start : self.steps]
        parts = [indices[self.rank :: self.world] for indices in whole]
        for batch, indices in zip(self._fetched(parts), whole):
            yield batch if self.transform is None else self.transform(batch, epoch), len(indices)

    def _fetched(self, parts: Sequence[Tensor]) -> Iterator[Batch]:
        """The samples of each part, on the device."""
        copied = self.device.type == "cuda" and not self.resident
        batches = one_ahead(self._pinned, parts) if copied else map(self.split.fetch, parts)
        return (to_device(batch, self.device) for batch in batches)

    def _pinned(self, part: Tensor) -> Batch:
        return {name: tensor.pin_memory() for name, tensor in self.split.fetch(part).items()}


def one_ahead(fetch: Callable[[Tensor], Batch], parts: Sequence[Tensor]) -> Iterator[Batch]:
    """`fetch(part)` of each part in order; a thread fetches the next one while the caller has the last."""
    with ThreadPoolExecutor(1, thread_name_prefix="cnnlab-fetch") as thread:
        ahead = None
        for part in parts:
            ready, ahead = ahead, thread.submit(fetch, part)
            if ready is not None:
                yield ready.result()
        if ahead is not None:
            yield ahead.result()


def _fits(split: Split, device: torch.device) -> bool:
    free, _ = torch.cuda.mem_get_info(device)
    return isinstance(split, TensorSplit) and split.nbytes <= _RESIDENT_SHARE * free
