"""What a frozen backbone makes of a split, kept in the cache: an entry of its own, and the split that serves it.

An entry is a folder of one file a tensor (its rows in order, nothing else) and `meta.json`, which holds types, shapes,
a checksum of each block, and one of itself. It is written beside its place, synced, and renamed when it is complete, as
those of decoded images are (`cnnlab.data.entries`). What does not match is not whole, and is made again.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnnlab.data.entries import check_blocks, install, sealed, temporary, unsealed, write_synced
from cnnlab.data.formats import require_file
from cnnlab.data.served import Served, free_memory
from cnnlab.errors import UsageError
from cnnlab.protocols import Batch
from cnnlab.schema import DataPath, Loading

FORMAT = 1
"""Part of every key: raised when the files here change their meaning."""
SUFFIX = ".features"
_DTYPES = {str(dtype): dtype for dtype in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)}  # fmt: skip


def entry_name(*content: object) -> str:
    """Names what a backbone with this content makes of data with this content."""
    hasher = blake2b(digest_size=12)
    for item in (FORMAT, *content):
        hasher.update((item if isinstance(item, bytes) else str(item).encode()) + b"\x1f")
    return hasher.hexdigest() + SUFFIX


def opened(entry: Path, count: int) -> dict[str, Tensor] | str | None:
    """The tensors of an entry, mapped read-only, each with `count` rows; `None` where there is none; in words what is
    wrong with one that is not whole."""
    if not os.path.lexists(entry):
        return None
    try:
        listed = unsealed(entry / "meta.json")["tensors"]
        return {name: _mapped(entry / f"{place}.bin", count, about) for place, (name, about) in enumerate(listed)}
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{error}" or type(error).__name__


def written(entry: Path, count: int, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Writes the batches' tensors one after the other into an entry, and opens it.

    Raises:
        OSError: it cannot be written.
        ValueError: the batches have not `count` rows together, or are not alike.
    """
    entry.parent.mkdir(parents=True, exist_ok=True)
    folder = temporary(entry)
    try:
        _write(folder, count, batches)
        install(folder, entry, lambda: isinstance(opened(entry, count), dict))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = opened(entry, count)
    if not isinstance(found, dict):
        raise OSError(f"what was written to {entry} reads back otherwise ({found})")
    return found


@dataclass
class _File:
    """One tensor's, while it is written."""

    dtype: str
    shape: tuple[int, ...]
    """Of a row."""
    blocks: list[tuple[int, int]]
    """(rows, checksum) of each."""


def _write(folder: Path, count: int, batches: Iterable[Mapping[str, Tensor]]) -> None:
    files: dict[str, _File] = {}
    with ExitStack() as stack:
        # Plain writes, not a writable mapping: a full disk is then an error and not a SIGBUS.
        outs: dict[str, Any] = {}
        for batch in batches:
            for name, tensor in batch.items():
                if name not in outs:
                    outs[name] = stack.enter_context((folder / f"{len(outs)}.bin").open("wb"))
                    files[name] = _File(str(tensor.dtype), tuple(tensor.shape[1:]), [])
                file, data = files[name], content(tensor)
                if (str(tensor.dtype), tuple(tensor.shape[1:])) != (file.dtype, file.shape):
                    raise ValueError(f"`{name}` is not alike in all batches")
                outs[name].write(data)
                file.blocks.append((len(tensor), zlib.crc32(data)))
        for out in outs.values():
            out.flush()
            os.fsync(out.fileno())
    for name, file in files.items():
        if sum(rows for rows, _ in file.blocks) != count:
            raise ValueError(f"`{name}` has not {count} rows")
    listed = [(name, [file.dtype, list(file.shape), file.blocks]) for name, file in files.items()]
    write_synced(folder / "meta.json", sealed({"tensors": listed}))


def content(tensor: Tensor) -> memoryview:
    """The tensor's bytes, its values in their order."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _mapped(path: Path, count: int, about: list[Any]) -> Tensor:
    name, shape, blocks = about
    dtype = _DTYPES[name]
    row = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    require_file(str(path))
    if path.stat().st_size != count * row:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes instead of {count * row:,}")
    if count * row == 0:
        return torch.empty(count, *shape, dtype=dtype)
    raw = np.memmap(path, np.uint8, "r", shape=(count * row,))
    check_blocks(path.name, raw.reshape(count, row), blocks)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(raw).view(dtype).view(count, *shape)


class FeatureSplit(Served):
    """A split whose samples are rows of tensors that were made of the images of another one.

    Args:
        tensors: by the keys of a batch, each with a row a sample.
        images: the split that they were made of; its order, labels and fingerprint are this one's.
    """

    def __init__(self, tensors: Mapping[str, Tensor], images: Served) -> None:
        self.tensors = dict(tensors)
        self.images = images
        self.fingerprint = images.fingerprint
        self.labels = images.labels

    def __len__(self) -> int:
        return len(self.images)

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def fetch(self, index: Tensor) -> Batch:
        index = index.to(self.device)
        return {**{name: tensor.index_select(0, index) for name, tensor in self.tensors.items()}, "index": index}

    def begin(self, index: Tensor, pin: bool = False) -> Callable[[], Batch]:
        def gather() -> Batch:
            batch: Batch = {"index": index}
            for name, tensor in self.tensors.items():
                out = torch.empty((len(index), *tensor.shape[1:]), dtype=tensor.dtype, pin_memory=pin)
                batch[name] = torch.index_select(tensor, 0, index, out=out)
            return batch

        return gather

    def order(self, seed: int, epoch: int) -> Tensor:
        return self.images.order(seed, epoch)

    def path(self, device: torch.device, loading: Loading) -> DataPath:
        if self.device == device:
            return DataPath.resident
        if loading.path is DataPath.resident and self.nbytes > free_memory(device):
            raise UsageError(
                f"`loading.path=resident`: the features take {self.nbytes:,} bytes, and {device} has "
                f"{free_memory(device):,} free; type loading.path=mapped"
            )
        fits = self.nbytes <= loading.memory_share * free_memory(device)
        return DataPath.resident if fits and loading.path is not DataPath.mapped else DataPath.mapped

    def placed(self, path: DataPath, device: torch.device, loading: Loading) -> FeatureSplit:
        if path is not DataPath.resident or self.device == device:
            return self
        return FeatureSplit({name: tensor.to(device) for name, tensor in self.tensors.items()}, self.images)

    def about(self, path: DataPath, device: torch.device) -> str:
        return f"features, {self.nbytes / 2**20:,.1f} MiB"


def as_text(value: object) -> str:
    """Nested plain values in one way, for a key."""
    return json.dumps(value, sort_keys=True, default=str)
