"""Splits that are decoded anew each epoch, for sets whose pixels fit nowhere."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from copy import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cnnlab.data.cache import tell_depth
from cnnlab.data.decode import Decoded, Depth, Recipe
from cnnlab.data.gpu_jpeg import GpuJpegs
from cnnlab.data.pool import DecodingPool, cores
from cnnlab.data.served import Served
from cnnlab.data.sources import Sources
from cnnlab.data.splits import digest, require_samples
from cnnlab.data.whole import views
from cnnlab.errors import DataError
from cnnlab.protocols import VIEW, Batch, Split
from cnnlab.schema import DataPath, Decoder, Loading

DISK_SHARE = 0.5
"""Part of the cache disk's free space up to which the images are decoded into it unasked."""
_CHUNK_FILES = 16
"""Files that a process decodes at a time: some 40 ms at 224 px, so that a batch ends on all of them at once."""


def streams(loading: Loading, needed: int, folder: Path, *, cached: bool) -> bool:
    """Whether images are decoded anew each epoch, rather than once into a file.

    Args:
        needed: bytes of the decoded images.
        folder: of the cache, which need not exist yet.
        cached: they are in it already.
    """
    if loading.path is not DataPath.auto:
        return loading.path is DataPath.stream
    # A cache that cannot be written is no reason to end: the same pixels come from the files.
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return not cached and (
        not os.access(there, os.W_OK | os.X_OK) or needed > DISK_SHARE * shutil.disk_usage(there).free
    )


class StreamSplit(Served):
    """Samples whose images are decoded each time that they are asked for. The pixels are those of the cache.

    Args:
        sources: the undecoded images.
        recipe: what they are decoded to.
        seen: what the network sees of them without augmentation; the same, unless they are decoded whole.
        labels: (M,) int64, one a source.
        fingerprint: names the content.
        rows: (N,) int64, the sources that make up this split, in order.
        pool: the processes that decode; splits share it.
    """

    streams = True

    def __init__(
        self,
        sources: Sources,
        recipe: Recipe,
        seen: Recipe,
        labels: Tensor,
        fingerprint: str,
        rows: Tensor,
        pool: DecodingPool,
    ) -> None:
        self.sources = sources
        self.recipe = recipe
        self.seen = seen
        self.fingerprint = fingerprint
        self.rows = rows
        self._labels = labels[rows]
        self.labels: Tensor | None = self._labels
        self.pool = pool
        self._gpu: GpuJpegs | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def stored(self) -> tuple[int, int] | None:
        return (self.recipe.height, self.recipe.width) if self.recipe.fit == "whole" else None

    def path(self, device: torch.device, loading: Loading) -> DataPath:
        return DataPath.stream

    def placed(self, path: DataPath, device: torch.device, loading: Loading) -> StreamSplit:
        return self.on_gpu(device) if loading.decode is Decoder.cuda else self

    def waits(self, path: DataPath, device: torch.device) -> bool:
        return True

    def on_gpu(self, device: torch.device) -> StreamSplit:
        """The split with the GPU decoding its JPEG files; `image` is then on `device`."""
        other = copy(self)
        other._gpu = GpuJpegs(self.recipe, device, max(2, self.pool.workers), self.pool.patience)
        return other

    def about(self, path: DataPath, device: torch.device) -> str:
        if self._gpu is not None:
            return f"JPEG decoded on {self._gpu.device}"
        count = self.pool.workers
        return f"decoded by {count} process{'es' * (count > 1)}" if count else "decoded by the fetching thread"

    def fetch(self, index: Tensor) -> Batch:
        """The samples at `index` (n,) int64. Raises `DataError` for an image that cannot be decoded."""
        return self.begin(index)()

    def begin(self, index: Tensor, pin: bool = False) -> Callable[[], Batch]:
        """Starts to decode the samples at `index`, and returns what waits for them and hands them over.

        Args:
            pin: into memory from which a GPU copies without waiting.
        """
        index = index.cpu()
        rows = self.rows[index].tolist()
        items = self.sources.items(rows)
        if self._gpu is not None:
            finish_images = self._gpu.begin(items)
        else:
            size = max(1, min(_CHUNK_FILES, -(-len(items) // max(1, self.pool.workers))))
            asked = [self.pool.ask(items[at : at + size], self.recipe) for at in range(0, len(items), size)]

            def finish_images() -> tuple[Tensor, Tensor, list[tuple[int, str]]]:
                return _joined(asked, len(items), self.recipe, pin, self._saw)

        def finish() -> Batch:
            image, sizes, failures = finish_images()
            if failures:
                raise self._broken([(rows[number], reason) for number, reason in failures])
            batch = {"image": image, "index": index, "label": self._labels[index]}
            return {**batch, VIEW: views(sizes, self.seen, self.recipe)} if self.stored else batch

        return finish

    def _saw(self, depth: Depth) -> None:
        """The first batch with images of more than 8 bits tells whether they are dark; the splits share the word."""
        if depth.images and not self.pool.said:
            self.pool.said = True
            tell_depth(depth, self.recipe)

    def _broken(self, failures: Sequence[tuple[int, str]]) -> DataError:
        named = "\n".join(f"  {self.sources.name(row)}: {reason}" for row, reason in failures[:5])
        return DataError(
            f"expected readable images, received {len(failures)} in a batch that are not:\n{named}\n"
            "repair or remove them, or type data.on_error=skip to have all files tried first and these left out"
        )


def _joined(
    asked: Sequence[Future[Decoded]], count: int, recipe: Recipe, pin: bool, saw: Callable[[Depth], None]
) -> tuple[Tensor, Tensor, list[tuple[int, str]]]:
    """The chunks as images (count, C, H, W) uint8, the files' own (height, width), and the position and reason of each
    that failed."""
    shape = (count, recipe.channels, recipe.height, recipe.width)
    images = torch.empty(shape, dtype=torch.uint8, pin_memory=pin)
    # numpy copies in this one thread; torch would take the cores from the network's own threads.
    into, done = images.numpy(), 0
    sizes = torch.zeros((count, 2), dtype=torch.int64)
    failures: list[tuple[int, str]] = []
    depth = Depth()
    for future in asked:
        chunk = future.result()
        np.copyto(into[done : done + len(chunk.images)], chunk.images)
        sizes[done : done + len(chunk.images)] = torch.from_numpy(chunk.sizes)
        failures += [(done + number, reason) for number, reason in chunk.failures]
        done += len(chunk.images)
        depth.add(chunk.depth)
    saw(depth)
    return images, sizes, failures


def streamed(
    kind: type[StreamSplit],
    sources: Sources,
    recipe: Recipe,
    labels: Tensor,
    parts: Mapping[str, Tensor],
    loading: Loading,
    stored: Recipe | None = None,
) -> dict[str, Split]:
    """Splits of one kind that share the sources and the decoding processes.

    Args:
        recipe: what the network sees of an image without augmentation.
        parts: rows by split.
        stored: what training images are decoded to, where they are decoded whole.

    Raises:
        DataError: where a split would be empty.
    """
    require_samples(parts)
    source = digest("stream", sources.fingerprint, recipe, labels)
    pool = DecodingPool(cores() if loading.workers is None else loading.workers, loading.patience)

    def split(name: str, rows: Tensor) -> Split:
        if stored is None or name != "train":
            return kind(sources, recipe, recipe, labels, digest(source, name, rows), rows, pool)
        return kind(sources, stored, recipe, labels, digest(source, stored, name, rows), rows, pool)

    return {name: split(name, rows) for name, rows in parts.items()}
