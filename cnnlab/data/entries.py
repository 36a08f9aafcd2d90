"""An entry of the decoded cache: how it is written, what makes it whole, and how it comes into its place.

An entry is a folder of `images.npy`, `sizes.npy` and `meta.json`. It is written beside its place, synced, and renamed
when it is complete. `meta.json` holds a checksum of itself, of the sizes, and of each block of images. What does not
match in length, header or checksum is not whole, and is built again.

The blocks are checked when an entry is opened: all of them up to `CHECKED_BYTES` (1 GiB takes 0.3 s of a core, from the
system's file cache), of a larger entry as many, drawn anew each time.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnnlab.data.decode import Recipe
from cnnlab.data.formats import require_file

_IN_THE_WAY = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
FORMAT = 4
"""Part of every key: raised when decoding or the files here change their meaning."""
CHECKED_BYTES = 1 << 30
"""Of an entry's images, whose checksums are compared when it is opened."""


def entry_key(recipe: Recipe, content: str) -> str:
    """Names what a recipe makes of sources whose content has this name."""
    text = f"{FORMAT} {recipe!r} {recipe.max_pixels} {content}"
    return blake2b(text.encode(), digest_size=12).hexdigest()


@dataclass
class Entry:
    """What an entry holds: `images` (N, C, H, W) uint8, mapped read-only; `sizes` (N, 2) int64; and the rest."""

    images: Tensor
    sizes: Tensor
    content: Content


@dataclass
class Content:
    """What `meta.json` says.

    `failures`: position and reason of the files that could not be read; `deep`: how many images of more than 8 bits
    there were, and their highest value; `blocks`: (images, checksum) of each block, in order.
    """

    fingerprint: str
    failures: list[tuple[int, str]]
    deep: tuple[int, float]
    sizes: int = 0
    blocks: list[tuple[int, int]] = field(default_factory=list)
    origin: dict[str, Any] = field(default_factory=dict)

    def sealed(self) -> bytes:
        """As it is written."""
        return sealed(self.__dict__)


def sealed(document: Any) -> bytes:
    """The document as JSON, with its own checksum."""
    text = json.dumps(document, sort_keys=True)
    return (json.dumps({"checksum": _digest(text), "content": text}) + "\n").encode()


def unsealed(path: Path) -> Any:
    """What `sealed` wrote. Raises `ValueError` or `OSError` where it is not there unharmed."""
    require_file(str(path))
    try:
        document = json.loads(path.read_bytes())
        if document["checksum"] == _digest(document["content"]):
            return json.loads(document["content"])
    except (TypeError, KeyError, RecursionError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    raise ValueError(f"{path} is damaged: its checksum does not match")


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=8).hexdigest()


def header(shape: Sequence[int], kind: str) -> bytes:
    """Of a .npy file (format 1.0) of an array in C order."""
    import io

    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": kind, "fortran_order": False, "shape": tuple(shape)})
    return out.getvalue()


def opened_entry(folder: Path, shape: tuple[int, int, int, int], *, check: bool = True) -> Entry | str | None:
    """The entry; `None` where there is none; in words what is wrong with one that is not whole.

    Args:
        shape: (N, C, H, W) that the images must have.
        check: whether the blocks' checksums are compared, too.
    """
    if not os.path.lexists(folder):
        return None
    try:
        content = Content(**unsealed(folder / "meta.json"))
        images = _mapped(folder / "images.npy", shape)
        sizes = _read(folder / "sizes.npy", (shape[0], 2), content.sizes)
        if check:
            check_blocks("images.npy", images, content.blocks)
    except (OSError, ValueError, TypeError) as error:
        return str(error)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return Entry(torch.from_numpy(images), torch.from_numpy(sizes), content)


def _mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Read-only and shared: a private writable mapping counts as memory and is refused above its size."""
    start = _start(path, shape, "|u1", 1)
    if 0 in shape:
        return np.zeros(shape, np.uint8)
    return np.memmap(path, np.uint8, "r", offset=start, shape=shape)


def _read(path: Path, shape: tuple[int, ...], checksum: int) -> np.ndarray[Any, Any]:
    start = _start(path, shape, "<i8", 8)
    data = path.read_bytes()[start:]
    if zlib.crc32(data) != checksum:
        raise ValueError(f"{path.name} is damaged: its checksum does not match")
    return np.frombuffer(data, "<i8").reshape(shape).astype(np.int64)


def _start(path: Path, shape: tuple[int, ...], kind: str, width: int) -> int:
    """Where the values begin. Raises `ValueError` where the file's length or header is not that of such an array."""
    require_file(str(path))
    expected = header(shape, kind)
    length, wanted = path.stat().st_size, len(expected) + width * int(np.prod(shape, dtype=np.int64))
    if length != wanted:
        raise ValueError(f"{path.name} has {length:,} bytes instead of {wanted:,}")
    with path.open("rb") as file:
        if file.read(len(expected)) != expected:
            raise ValueError(f"{path.name} is damaged: its header does not match")
    return len(expected)


def check_blocks(name: str, rows: np.ndarray[Any, Any], blocks: Sequence[Sequence[int]]) -> None:
    """Raises `ValueError` where a checksum does not match, of all blocks or of as many as are checked.

    Args:
        name: of the file.
        rows: what it holds.
        blocks: (rows, checksum) of each.
    """
    ends = np.cumsum([count for count, _ in blocks], dtype=np.int64)
    if (int(ends[-1]) if len(ends) else 0) != len(rows):
        raise ValueError("meta.json names other blocks than there are rows")
    chosen = range(len(blocks))
    if rows.nbytes > CHECKED_BYTES:
        chosen = random.Random().sample(chosen, max(1, len(blocks) * CHECKED_BYTES // rows.nbytes))  # type: ignore[assignment]
    for number in chosen:
        end, count = int(ends[number]), blocks[number][0]
        if zlib.crc32(rows[end - count : end].data) != blocks[number][1]:
            raise ValueError(f"{name} is damaged: its block {number} of {len(blocks)} does not match its checksum")


def temporary(entry: Path) -> Path:
    """A folder beside the entry's place to build it in."""
    folder = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", suffix=".tmp", dir=entry.parent))
    folder.chmod(0o755)  # mkdtemp's are private, and a cache may be shared
    return folder


def write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def sync_folder(folder: Path) -> None:
    """What was created or renamed in it survives a power loss, where the system can do that."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def install(built: Path, entry: Path, whole: Callable[[], bool]) -> None:
    """Moves a complete folder to the entry's place.

    Args:
        whole: whether what is at the entry's place is whole.

    What is there already stays if it is whole: it is another builder's. What is damaged is first moved away under a
    name of its own, so that of several builders each either finds its place free or another's whole entry there.
    """
    sync_folder(built)
    for _ in range(100):
        try:
            built.rename(entry)
            sync_folder(entry.parent)
            return
        except OSError as error:
            if error.errno not in _IN_THE_WAY:  # what was there may be gone again: another builder moved it
                raise
        if whole():
            return
        aside = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", suffix=".tmp", dir=entry.parent))
        with suppress(OSError):  # another builder was faster
            entry.rename(aside / "damaged")
        shutil.rmtree(aside, ignore_errors=True)
    raise OSError(f"{entry} is replaced again and again")
