"""What a split knows of the way that its images take to the device. Memory, map and stream each know their own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cnnlab import rng
from cnnlab.protocols import Batch, Split
from cnnlab.schema import DataPath, Loading


class Served:
    """Base of the splits that the loader serves. What it does itself is right for one that only fetches, and no more.

    A subclass has `fetch`, `__len__`, `fingerprint` and `labels` (see `cnnlab.protocols.Split`).
    """

    fingerprint: str
    labels: Tensor | None
    streams: bool = False
    """Whether images are decoded each time that they are asked for."""

    @property
    def stored(self) -> tuple[int, int] | None:
        """(height, width) of the stored images where those are the whole photos, from which crops are taken (see
        `cnnlab.data.whole`)."""
        return None

    def __len__(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} implements __len__")

    def fetch(self, index: Tensor) -> Batch:
        raise NotImplementedError(f"{type(self).__name__} implements fetch")

    def begin(self, index: Tensor, pin: bool = False) -> Callable[[], Batch]:
        """`fetch` for another thread: starts what needs no waiting, and returns what waits for the rest.

        Args:
            pin: into memory from which a GPU copies without waiting, where the split can.
        """
        return lambda: self.fetch(index)

    def order(self, seed: int, epoch: int) -> Tensor:
        """(N,) int64: the shuffled order in which the epoch visits the split."""
        return rng.permutation(seed, epoch, len(self))

    def path(self, device: torch.device, loading: Loading) -> DataPath:
        """Where the split is served from. Raises `UsageError` where it cannot be served from where it is told to."""
        return DataPath.mapped

    def placed(self, path: DataPath, device: torch.device, loading: Loading) -> Served:
        """The split as `path` serves it to `device`."""
        return self

    def waits(self, path: DataPath, device: torch.device) -> bool:
        """Whether fetching takes long enough that another thread should do it, ahead of time."""
        return path is not DataPath.resident and device.type != "cpu"

    def about(self, path: DataPath, device: torch.device) -> str:
        """What there is to say of the way to the device besides its name; may be empty."""
        return ""


class _Foreign(Served):
    """A user's own split, which only fetches."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self.fingerprint = split.fingerprint
        self.labels = split.labels

    def __len__(self) -> int:
        return len(self.split)

    def fetch(self, index: Tensor) -> Batch:
        return self.split.fetch(index)


def served(split: Split) -> Served:
    """The split as the loader serves it: our own as they are, a user's by what every split has."""
    return split if isinstance(split, Served) else _Foreign(split)


def free_memory(device: torch.device) -> int:
    """Bytes of memory that the device has free; of the CPU's, what holds only copies of files counts as free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # no Linux: half of all there is, where that can be asked for
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if hasattr(os, "sysconf") else 1 << 32
