"""Batches of a split by position: what batch b of epoch e holds depends on (seed, e, b), not on what ran."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from copy import copy

import torch
from torch import Tensor

from cnnlab.data.ahead import Copier, ahead
from cnnlab.data.served import served
from cnnlab.errors import DataError
from cnnlab.machine.copies import pinned
from cnnlab.protocols import VIEW, Batch, Split, to_device
from cnnlab.schema import DataPath, Loading

Transform = Callable[[Batch, int], Batch]
"""`(batch on the device, epoch) -> batch`: augmentation and normalization."""


class Loader:
    """Serves one rank's part of a split's batches, on the device.

    The global batch b of an epoch is `order[b * batch_size : (b + 1) * batch_size]`, where the order is a
    permutation drawn from (seed, epoch), or ascending without shuffling. Rank r gets `[r::world]` of it, so
    each sample is served exactly once an epoch, whatever the ranks. There is no state: a resumed run asks for
    `batches(epoch, start)`.

    Where `transform` mixes a sample with the one before it (`neighbours`), rank r gets the r-th of `world` consecutive
    parts instead, and the transform sees the samples before that part, too: so partners come from the global batch,
    and a rank prepares one sample more than its own, not twice as many.

    `path` says how: `resident` splits are gathered where the batch is wanted (on a GPU, those that take at most
    `loading.memory_share` of its free memory are copied there). `mapped` ones are gathered by a thread of the
    CPU, and `stream`ed ones decoded by processes, `loading.ahead` batches ahead; on a GPU they are copied by a
    stream of their own. On the CPU, files that fit in its memory are gathered when they are due: the system keeps
    them there, and a thread would only take time from the network.

    Args:
        split: what to serve.
        batch_size: samples a global batch, over all ranks.
        seed: of the order.
        shuffle: a new order each epoch; for training only.
        drop_last: leaves out the uneven last batch.
        rank, world: this process and the number of processes.
        device: where batches go.
        transform: applied to each batch on the device.
        neighbours: samples before its own that the transform's result for a sample depends on.
        loading: the config's section; `None` takes its defaults.
        targets: those that the batches hold; `None` for all that there are.

    Raises:
        DataError: without a single batch to serve.
        UsageError: the split does not fit where it is told to be.
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
        neighbours: int = 0,
        loading: Loading | None = None,
        targets: Collection[str] | None = None,
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
        self.loading = loading or Loading()
        known = served(split)
        self.path = known.path(self.device, self.loading)
        self.split = known.placed(self.path, self.device, self.loading)
        self._ahead = self.split.waits(self.path, self.device)
        self._copier: Copier | None = None
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world = world
        self.transform = transform
        self.neighbours = neighbours
        self._kept: list[Batch] = []
        """The first batch, whole and untransformed, where somebody looked at it; shared with `alone`."""
        self._wanted = None if targets is None else {"image", "index", VIEW, *targets}

    @property
    def images(self) -> Loader:
        """The loader of the images themselves, for who looks at them, whatever the batches hold in their place."""
        return self

    @property
    def resident(self) -> bool:
        """Whether batches are gathered in the device's own memory."""
        return self.path is DataPath.resident

    def route(self) -> str:
        """How images reach the device, in one line."""
        about = self.split.about(self.path, self.device)
        how = f"{self.path.value} ({about})" if about else self.path.value
        count = self.loading.ahead
        return how + (f", {count} batch{'es' * (count > 1)} ahead" if self._ahead else "")

    def describe(self) -> str:
        """One line on what is served and how it reaches the device."""
        return f"{self.length:,} samples, {self.steps:,} batches of {self.batch_size}, {self.route()}"

    def order(self, epoch: int) -> Tensor:
        """(length,) int64 on the CPU: the order in which the epoch visits the split."""
        if not self.shuffle:
            return torch.arange(self.length)
        return self.split.order(self.seed, epoch)

    def batches(
        self, epoch: int, start: int = 0, stopping: Callable[[], object] | None = None
    ) -> Iterator[tuple[Batch, int]]:
        """This rank's part of each batch of the epoch from batch `start` on, and the size of the whole batch.

        A part is empty where the last batch has fewer samples than there are ranks.

        Args:
            stopping: whether the caller would rather end than wait for a batch that does not come.

        Raises:
            NotAwaited: it would.
        """
        kept = self._kept.pop() if self._kept and start == 0 and (epoch == 0 or not self.shuffle) else None
        first = None if kept is None else self._seen(kept)
        order = self.order(epoch)
        if self.resident and self.device.type == "cuda":
            # One copy an epoch, from pinned memory: from pageable memory a copy waits for the device.
            order = pinned(order).to(self.device, non_blocking=True)
        whole = list(order.split(self.batch_size))[start : self.steps]
        parts, before = zip(*(self._part(indices) for indices in whole)) if whole else ((), ())
        for batch, indices, foreign in zip(self._fetched(parts, stopping, first), whole, before):
            batch = batch if self.transform is None else self.transform(batch, epoch)
            own = {name: tensor[foreign:] for name, tensor in batch.items()} if foreign else batch
            yield own, len(indices)

    def first(self) -> tuple[Batch, int]:
        """The first batch of epoch 0, as `batches` has it, for who looks at it before training begins: it is fetched
        once and kept until `batches` serves it, and nothing is fetched ahead."""
        indices = self.order(0)[: self.batch_size]
        if not self._kept:
            self._kept.append(to_device(self._only_wanted(self.split.fetch(indices)), self.device))
        batch, foreign = self._seen(self._kept[0]), self._part(indices)[1]
        batch = batch if self.transform is None else self.transform(batch, 0)
        return {name: tensor[foreign:] for name, tensor in batch.items()}, len(indices)

    def _seen(self, whole: Batch) -> Batch:
        """A copy of what this rank fetches of a global batch."""
        positions, _ = self._part(torch.arange(len(whole["index"]), device=self.device))
        return {name: tensor.index_select(0, positions) for name, tensor in whole.items()}

    def alone(self) -> Loader:
        """The same batches, whole: for what must not depend on the number of processes."""
        other = copy(self)
        other.rank, other.world = 0, 1
        return other

    def _part(self, indices: Tensor) -> tuple[Tensor, int]:
        """This rank's part of a global batch, and how many of other ranks' samples come first in it."""
        if self.neighbours == 0 or self.world == 1:
            return indices[self.rank :: self.world], 0
        size, more = divmod(len(indices), self.world)
        first = self.rank * size + min(self.rank, more)
        last = first + size + (self.rank < more)
        if first == last:
            return indices[:0], 0
        positions = torch.arange(first - self.neighbours, last, device=indices.device) % len(indices)
        return indices[positions], self.neighbours

    def _fetched(
        self, parts: Sequence[Tensor], stopping: Callable[[], object] | None, first: Batch | None
    ) -> Iterator[Batch]:
        """The samples of each part, on the device; `first` are those of the first one, where they are there already."""
        there = iter(() if first is None else (first,))

        def start(part: Tensor) -> Callable[[], Batch]:
            batch = next(there, None)
            return self._begin(part) if batch is None else lambda: batch

        if not self._ahead:
            gathered = (batch if (batch := next(there, None)) is not None else self.split.fetch(part) for part in parts)
            return (to_device(self._only_wanted(batch), self.device) for batch in gathered)
        if self.device.type != "cuda":
            fetched = ahead(start, parts, self.loading.ahead, stopping)
            return (to_device(batch, self.device) for batch in fetched)
        if self._copier is None:  # one for all epochs: memory freed on a stream serves that stream
            self._copier = Copier(self.device)
        copier = self._copier

        def begin(part: Tensor) -> Callable[[], tuple[Batch, torch.cuda.Event]]:
            fetch = start(part)
            return lambda: copier.copy(fetch)

        return map(copier.receive, ahead(begin, parts, self.loading.ahead, stopping))

    def _begin(self, part: Tensor) -> Callable[[], Batch]:
        """Starts what needs no waiting, and returns the rest."""
        gather = self.split.begin(part, pin=self.device.type == "cuda")
        return lambda: self._only_wanted(gather())

    def _only_wanted(self, batch: Batch) -> Batch:
        """The batch without targets that nobody reads: neither copied to the device nor augmented."""
        return batch if self._wanted is None else {name: batch[name] for name in batch if name in self._wanted}

    def some(self, count: int) -> Batch:
        """`count` samples (or all of fewer) from all over the split, in its order, as batches have them."""
        return self.at(spread(self.length, count))

    def at(self, index: Tensor, epoch: int = 0) -> Batch:
        """The samples at `index` (n,) int64, as batches of the epoch have them."""
        batch = self.raw(index)
        return batch if self.transform is None else self.transform(batch, epoch)

    def raw(self, index: Tensor) -> Batch:
        """The same before `transform`: images as they are stored."""
        return to_device(self._only_wanted(self.split.fetch(index)), self.device)


def spread(length: int, count: int) -> Tensor:
    """`count` positions (or all of fewer) from all over `length`, ascending: int64."""
    return torch.linspace(0, length - 1, min(count, length)).round().long()
