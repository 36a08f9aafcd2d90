"""Image files to arrays of one size. Loads Pillow and numpy, not torch: decoding processes start in 0.15 s.

Such a process (`serve`) gets pickled jobs on stdin and puts pickled results on stdout. Processes and Pillow, because
that is the fastest for small files that reads every format. 10,000 CIFAR-10 JPEGs on 2 cores: Pillow in one process
0.76 s, two threads 0.99 s (they wait for the interpreter's lock), two processes 0.54 s; torchvision's `decode_jpeg` in
two threads 0.36 s, but with 1.4 to 1.9 s of import, and JPEG only. `multiprocessing` is not used: it would run a
notebook-like script (one without a main guard) again in each process.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from cnnlab.data.bounds import bounded, require_pixels
from cnnlab.data.formats import opened, require_file
from cnnlab.data.mask_pixels import require_exact
from cnnlab.data.pixels import TURNS, Depth, Pixels, Recipe, cropped, fitted, letterbox

__all__ = ["Decoded", "Depth", "Item", "Recipe", "cropped", "decode", "decode_chunk", "letterbox"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Fitted:
    """A file that takes the place of an image of another size: a mask that is smaller than its image."""

    path: str
    like: tuple[int, int]
    """(height, width) of that image."""


Item = str | tuple[str, int, int] | Fitted
"""An image file, or `(file, offset, bytes)` of one inside another (a shard's member), or a `Fitted` file."""
_SAYS_HOW_IT_LIES = frozenset({"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"})
"""Keys of Pillow's `info`, one of which is there where a file may say how it is to be turned."""
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PARENTS_SIGNALS = [number for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None)) if number]
_ORIENTATION = 0x0112
_BEGINNING = 4096


@dataclass
class Decoded:
    """A chunk's arrays (n, C, H, W) uint8, the files' own (height, width) (n, 2), and why any failed.

    A failed image is black with size (0, 0); `failures` holds its position in the chunk and the reason; `depth` is
    of the images of more than 8 bits.
    """

    images: Array
    sizes: Array
    failures: list[tuple[int, str]]
    depth: Depth = field(default_factory=Depth)


def name_of(item: Item) -> str:
    """The item in a message."""
    if isinstance(item, Fitted):
        return item.path
    return item if isinstance(item, str) else f"{item[0]} at byte {item[1]:,}"


def contents(item: Item) -> bytes:
    """The item's bytes, undecoded. Raises `OSError`."""
    path, offset, size = item if isinstance(item, tuple) else (name_of(item), 0, -1)
    require_file(path)
    with open(path, "rb") as file:  # noqa: PTH123 (pathlib: twice the time)
        file.seek(offset)
        return file.read(size)


def decode_chunk(items: Sequence[Item], recipe: Recipe, begins: Callable[[int], None] | None = None) -> Decoded:
    """Decodes the items; one that cannot be read is a failure, not an error.

    Args:
        begins: is told the position of each item before it is read.
    """
    images = np.zeros((len(items), recipe.channels, recipe.height, recipe.width), np.uint8)
    sizes = np.zeros((len(items), 2), np.int64)
    failures, depth = [], Depth()
    hush()
    for number, item in enumerate(items):
        if begins is not None:
            begins(number)
        try:
            source = io.BytesIO(contents(item)) if isinstance(item, tuple) else name_of(item)
            like = item.like if isinstance(item, Fitted) else None
            images[number], sizes[number] = decode(source, recipe, depth, like)
        except MemoryError:
            raise
        except Exception as error:  # each of Pillow's parsers raises what it stumbles on
            failures.append((number, reason_of(error)))
    return Decoded(images, sizes, failures, depth)


def reason_of(error: Exception) -> str:
    """Why an image failed, in a line."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{type(error).__name__}: {error.strerror}"  # whoever tells it names the file
    text = " ".join(str(error).split())
    if type(error).__name__ == "UnidentifiedImageError":  # which names the file, or an object's address
        text = "cannot identify the image's format"
    return text if text.startswith("expected ") else f"{type(error).__name__}: {text}"


def decode(
    source: str | BinaryIO, recipe: Recipe, depth: Depth | None = None, like: tuple[int, int] | None = None
) -> tuple[Array, tuple[int, int]]:
    """One file, by its path or open: (channels, height, width) uint8, and its own (height, width).

    The latter is as the file has the image turned: by EXIF, XMP, or whatever else Pillow's transposition honours.

    Args:
        depth: is told of an image of more than 8 bits.
        like: (height, width) of another image, whose place it takes.

    Raises:
        ValueError: it has more pixels than the recipe allows, or values of no meaning.
        Exception: what Pillow's parsers raise for a file that they cannot read.
    """
    with _open(source) as file, _held(file, recipe.max_pixels), _identified(file) as image:
        if recipe.mask:
            require_exact(image, _beginning(file))
        own = bounded(image, recipe.max_pixels)
        image.load()
        require_pixels(image, recipe.max_pixels)  # a container may hold another size than it says
        pixels = Pixels(image, recipe, _turning(image))
        size = pixels.size if own is None else own[:: -1 if pixels.size != image.size else 1]
        if recipe.fit == "whole" and like is None:  # which of its sides is longer, halving may hide
            like = (size[1], size[0])
        array = np.asarray(fitted(pixels, recipe, None if like is None else (like[1], like[0])))
        if depth is not None:
            depth.add(pixels.depth)
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return array, (size[1], size[0])


def _open(source: str | BinaryIO) -> AbstractContextManager[BinaryIO]:
    if not isinstance(source, str):
        return nullcontext(source)
    require_file(source)
    return open(source, "rb")  # noqa: PTH123 (pathlib: twice the time)


def _identified(file: BinaryIO) -> Any:
    """The file as Pillow opens it. A JPEG that is too large for it, too: it may be decoded at half its size."""
    from PIL import Image, JpegImagePlugin

    try:
        return opened(file)
    except Image.DecompressionBombError as error:
        file.seek(0)
        if file.read(3) == b"\xff\xd8\xff":
            file.seek(0)
            return JpegImagePlugin.JpegImageFile(file)
        raise ValueError(f"expected fewer pixels, received: {error}; type data.max_pixels=NUMBER to take it") from error


def _beginning(file: BinaryIO) -> bytes:
    """Some of a file that is being read by somebody else."""
    place = file.tell()
    file.seek(0)
    content = file.read(_BEGINNING)
    file.seek(place)
    return content


def _turning(image: Any) -> int | None:
    """Pillow's transposition that turns the image as its EXIF or XMP says; whatever Pillow's own one honours."""
    # Asking for the EXIF of a file that has none takes as long as decoding a small JPEG.
    if image.format == "TIFF" or not _SAYS_HOW_IT_LIES.isdisjoint(image.info):
        return TURNS.get(image.getexif().get(_ORIENTATION, 1))
    return None


# ---- Pillow's settings and its libraries' noise, for the time of a decoding ----


class _Held:
    """A setting of the whole process that is changed as long as anybody needs it so; threads may overlap."""

    def __init__(self, change: Callable[[], Callable[[], None]]) -> None:
        self._change = change
        self._lock = threading.Lock()
        self._users = 0
        self._restore: Callable[[], None] = lambda: None

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._restore = self._change()
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._restore()


def _without_stderr() -> Callable[[], None]:
    """What libtiff says goes to the file descriptor, past Python."""
    try:
        saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # there is none
        return lambda: None
    os.dup2(nowhere, 2)
    os.close(nowhere)

    def restore() -> None:
        os.dup2(saved, 2)
        os.close(saved)

    return restore


_STDERR_CLOSED = _Held(_without_stderr)
_PILLOW_BOUNDED = _Held(lambda: _pillows_bound())


def _pillows_bound() -> Callable[[], None]:
    """Puts back the bound that Pillow had."""
    from PIL import Image

    before = Image.MAX_IMAGE_PIXELS

    def restore() -> None:
        Image.MAX_IMAGE_PIXELS = before

    return restore


def hush() -> None:
    """Pillow's warnings and log lines are kept out, for good: filters belong to all threads."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logger = logging.getLogger("PIL")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.CRITICAL)


@contextmanager
def _held(file: BinaryIO, max_pixels: int) -> Iterator[None]:
    """Pillow bounded, also where it decodes one file inside another, and what its libraries say kept out."""
    from PIL import Image

    start = file.read(4)
    file.seek(0)
    with _PILLOW_BOUNDED, _STDERR_CLOSED if start in _TIFF else nullcontext():
        Image.MAX_IMAGE_PIXELS = max(1, max_pixels // 2)  # it warns from there on, and refuses twice as many
        yield


READY = b"\xfe" * 8
"""On the board of a process that is between two jobs."""


def serve(board: int) -> None:
    """Answers jobs `(items, recipe)` until stdin ends.

    Args:
        board: descriptor of a file that always holds the position of the item that is being decoded (8 bytes, the
            lowest first), or `READY`, for who waits for it; -1 for none.
    """
    # Ctrl-C and a scheduler's SIGTERM reach the whole group, and are the parent's to answer, with a checkpoint that
    # may need another batch. However it ends, its end of the pipe then closes.
    for number in _PARENTS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    results = sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing that a decoder prints may get between the results
    with suppress(OSError):  # what a library says goes nowhere; what Python says, an error of this file's, is told
        sys.stderr = os.fdopen(os.dup(2), "w")
        _without_stderr()

    def begins(number: int) -> None:
        os.pwrite(board, number.to_bytes(8, "little"), 0)

    while True:
        if board >= 0:
            os.pwrite(board, READY, 0)
        try:
            items, recipe = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer = decode_chunk(items, recipe, begins if board >= 0 else None)
        pickle.dump(answer, results, protocol=pickle.HIGHEST_PROTOCOL)
        results.flush()
