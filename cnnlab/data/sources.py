"""Where the images of a data set lie, undecoded."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

from torch import Tensor

from cnnlab.data.decode import Fitted, Item, Recipe
from cnnlab.data.entries import entry_key
from cnnlab.errors import DataError


class Sources(Protocol):
    """Where the images of a data set lie, undecoded: a listing of files, an index of shards."""

    bytes: int
    fingerprint: str

    def __len__(self) -> int: ...

    def items(self, rows: Sequence[int]) -> list[Item]:
        """What decoding processes read the rows from."""
        ...

    def name(self, row: int) -> str:
        """The row in a message."""
        ...

    def mark(self, row: int) -> tuple[str, int]:
        """A name of the row that stays where the data set is moved, and its length in bytes."""
        ...

    def key(self, recipe: Recipe) -> str: ...


class Listing:
    """Image files as they are now, asked for their sizes and times once.

    Args:
        root: folder that `files` are relative to.

    Raises:
        DataError: one of them is not there.
    """

    def __init__(self, root: Path, files: Sequence[str]) -> None:
        self.root = root
        self.files = files
        self.bytes = 0
        self._lengths = array("q")
        key, content = (blake2b(digest_size=size) for size in (12, 8))
        for name in files:
            try:
                status = os.stat(os.path.join(root, name))  # noqa: PTH116, PTH118 (pathlib: 3x the time)
            except OSError as error:
                raise DataError(f"expected to find {root / name}, received: {error}") from error
            named = f"{name}\0{status.st_size}".encode(errors="surrogateescape")
            content.update(named + b"\n")
            key.update(named + f"\0{status.st_mtime_ns}\n".encode())
            self.bytes += status.st_size
            self._lengths.append(status.st_size)
        self._key = key.hexdigest()
        self.fingerprint = content.hexdigest()
        """Of the names and sizes, for want of pixels: times change when a data set is copied."""

    def __len__(self) -> int:
        return len(self.files)

    def items(self, rows: Sequence[int]) -> list[Item]:
        return [os.path.join(self.root, self.files[row]) for row in rows]  # noqa: PTH118 (pathlib: 3x the time)

    def name(self, row: int) -> str:
        return self.files[row]

    def mark(self, row: int) -> tuple[str, int]:
        return self.files[row], self._lengths[row]

    def key(self, recipe: Recipe) -> str:
        """Names what the recipe makes of these files."""
        return entry_key(recipe, self._key)


class FittedListing(Listing):
    """Files each of which takes the place of an image of another size.

    Args:
        sizes: (N, 2) int64, the (height, width) of those images.
    """

    def __init__(self, root: Path, files: Sequence[str], sizes: Tensor) -> None:
        super().__init__(root, files)
        self.like: list[tuple[int, int]] = [(max(1, height), max(1, width)) for height, width in sizes.tolist()]
        text = f"{self._key} {self.like}"
        self._key = blake2b(text.encode(), digest_size=12).hexdigest()

    def items(self, rows: Sequence[int]) -> list[Item]:
        return [Fitted(os.path.join(self.root, self.files[row]), self.like[row]) for row in rows]  # noqa: PTH118
