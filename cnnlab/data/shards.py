"""WebDataset shards, read by index: sets of ImageNet's size from tar files, in an order that can be resumed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cnnlab import rng
from cnnlab.data.cache import unreadable, without
from cnnlab.data.found import Findings, class_names, first_lines
from cnnlab.data.options import LabelledCut, Reading
from cnnlab.data.shard_copies import require_shards_once, tell_copies
from cnnlab.data.shard_index import ShardIndex, indexed
from cnnlab.data.splits import Fraction, require_fractions
from cnnlab.data.stream import StreamSplit, streamed
from cnnlab.errors import DataError
from cnnlab.protocols import DataSpec, Split
from cnnlab.schema import DataPath, PositiveInt

WINDOW = 4
"""Shards whose samples are mixed with each other: 4 of ImageNet's usual 150 MB stay in the system's file cache."""


class ShardSplit(StreamSplit):
    """Samples in shards. Its shuffled order goes through the shards a few at a time.

    An epoch permutes the shards, cuts them into windows of `WINDOW`, and permutes the samples inside each window.
    So a disk reads within a few files at a time, and yet the order is a function of (seed, epoch): a position in
    the epoch names a shard and an offset in it, and nothing is buffered that a checkpoint would have to hold.
    """

    def order(self, seed: int, epoch: int) -> Tensor:
        draw = rng.generator(seed, "order", epoch)
        index = self.sources
        assert isinstance(index, ShardIndex)
        shards, shard = torch.from_numpy(index.shard[self.rows.numpy()]).unique(return_inverse=True)
        # Samples in the order of their shards' random ranks; those of one window are then mixed.
        rank = torch.randperm(len(shards), generator=draw)[shard]
        by_shard = rank.argsort(stable=True)
        windows = torch.bincount(rank // WINDOW).tolist()
        parts = by_shard.split(windows)
        return torch.cat([part[torch.randperm(len(part), generator=draw)] for part in parts])


@dataclass(eq=False)
class WebDataset(Reading, LabelledCut):
    """Classification of images in tar files of the WebDataset convention (Aizman, Maltby, Breuel 2019).

    A sample is a run of members with one key: an image and, beside it, its class number, as `000123.jpg` and
    `000123.cls`. Links inside a shard are followed; a key twice in a shard is refused. The shards' headers are read
    once into an index; images are then read by offset and decoded anew each epoch, as those of a folder are (see
    `cnnlab.data.folder`): never unpacked, never stored decoded.

    Args:
        shards: the training shards: a path with braces (`train-{0000..0009}.tar`), with `*`, or of one file.
        val_shards, test_shards: those of the other splits; `None` takes them out of the training samples.
        classes: how many there are, or a file of their names, one a line; `None` reads the index for it.
        label: extension of the member that holds the class number: as text, or `json` with a value `label`.
        size: side of the images: the middle of the resized one.
        resize: shorter side before that crop; `None` takes `size`.
        channels: 3 (colour) or 1 (grey).
        val, test: fractions of the training samples for a split without shards, by class.
        on_error: whether an image that cannot be decoded ends the run when its batch is due, and one without its
            label or a link that leads nowhere at once, or all are tried first, once, and such ones left out.
    """

    streams = True

    shards: str
    val_shards: str | None = None
    test_shards: str | None = None
    classes: PositiveInt | str | None = None
    label: str = "cls"
    size: PositiveInt = 224
    resize: PositiveInt | None = 256
    channels: Literal[1, 3] = 3
    val: Fraction = 0.02
    test: Fraction = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resize is not None and self.resize < self.size:
            raise ValueError(
                f"expected data.resize >= data.size, received {self.resize} < {self.size}; type data.resize=null"
            )
        require_fractions(self.val, self.test)
        if self._loading.path not in (DataPath.auto, DataPath.stream):
            path = self._loading.path.value
            raise ValueError(f"`loading.path={path}`: shards are only streamed; type loading.path=auto")
        self._patterns = {"train": self.shards, "val": self.val_shards, "test": self.test_shards}
        self._label = self.label.lstrip(".")
        self._recipe = self.recipe(self.channels, self.size, self.size, "crop", self.resize or self.size)

    def spec(self) -> DataSpec:
        """Reads the shards' headers where nothing else tells the classes. Raises `DataError`."""
        size = (self._recipe.height, self._recipe.width)
        return DataSpec(self._recipe.channels, size, self._class_names)

    def load(self) -> dict[str, Split]:
        self.findings = Findings()
        require_shards_once(self._shards, self.findings)
        index, classes = self._index, self._class_names
        self._tell_unused(index)
        wrong = np.flatnonzero(index.label >= len(classes))
        if len(wrong):
            raise DataError(
                f"expected class numbers 0..{len(classes) - 1}, received {index.label[wrong[0]]} in "
                f"{index.name(int(wrong[0]))}; mend data.classes"
            )
        labels = torch.from_numpy(index.label)
        parts = self.parted(self._given, labels, len(classes), val=self.val, test=self.test)
        if self.on_error == "skip":
            failures = unreadable(
                index,
                self._recipe,
                cache=self.cache,
                workers=self._loading.workers,
                patience=self._loading.patience,
            )
            self.findings.leave_out(index, failures)
            parts = without(failures, parts)
        tell_copies(index, parts, self.findings)
        self.findings.record(parts, index)
        return streamed(ShardSplit, index, self._recipe, labels, parts, self._loading, self.whole(self._recipe))

    def _tell_unused(self, index: ShardIndex) -> None:
        """What belongs to no sample is told. Raises `DataError` for what lacks something, unless it is left out."""
        if index.unused:
            count = len(index.unused)
            self.findings.notices.append(
                f"data: {count:,} member{'s' * (count > 1)} without an image of the same key: not used "
                f"({index.unused[0]})"
            )
        if not index.broken:
            return
        lines = first_lines([f"{name}: {reason}" for name, reason in index.broken])
        if self.on_error == "raise":
            named = "\n".join(f"  {line}" for line in lines)
            raise DataError(
                f"expected an image and its .{self._label}, a class number, for each key, received "
                f"{len(index.broken)} without:\n{named}\nmend them, name the member that holds the class number by "
                "data.label, or type data.on_error=skip to leave them out"
            )
        self.findings.left_out += index.broken
        self.findings.notices.append(
            f"data: {len(index.broken):,} of the shards lack something, and are left out: {'; '.join(lines)}"
        )

    @cached_property
    def _shards(self) -> dict[str, list[Path]]:
        """The tar files of each split that has its own."""
        return {split: expanded(pattern) for split, pattern in self._patterns.items() if pattern is not None}

    @cached_property
    def _index(self) -> ShardIndex:
        return indexed([path for paths in self._shards.values() for path in paths], self._label, self.cache)

    @property
    def _given(self) -> dict[str, Tensor]:
        """Rows of the index by split."""
        given, first = {}, 0
        for split, paths in self._shards.items():
            inside = (self._index.shard >= first) & (self._index.shard < first + len(paths))
            given[split] = torch.from_numpy(np.flatnonzero(inside))
            first += len(paths)
        return given

    @cached_property
    def _class_names(self) -> tuple[str, ...]:
        if isinstance(self.classes, int):
            return _numbers(range(self.classes))
        if self.classes is None:
            return _numbers(range(int(self._index.label.max()) + 1))
        path = Path(self.classes).expanduser()
        if not path.exists():
            raise DataError(f"expected class names, one a line, in {path}, received nothing; type data.classes=NUMBER")
        return class_names(path)


def _numbers(numbers: Iterable[int]) -> tuple[str, ...]:
    return tuple(str(number) for number in numbers)


def expanded(pattern: str) -> list[Path]:
    """The files that a pattern names: braces as WebDataset expands them, then `*` and `?`. Raises `DataError`."""
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise DataError(f"data=webdataset needs the library: pip install 'cnnlab[webdataset]' ({error})") from error
    if "://" in pattern or pattern.startswith("pipe:"):
        raise DataError(f"expected shards on a disk, which can be read by offset, received {pattern}; copy them first")
    found: list[Path] = []
    for name in expand_urls(pattern):
        path = Path(name).expanduser()
        found += sorted(path.parent.glob(path.name)) if set("*?[") & set(path.name) else [path]
    if not found:
        raise DataError(f"expected tar files at {pattern}, received none; type data.shards=PATTERN")
    missing = [path for path in found if not path.is_file()]
    if missing:
        raise DataError(
            f"expected {len(found)} shards at {pattern}, received none for {len(missing)}, the first {missing[0]}; "
            "mend the pattern"
        )
    return found
