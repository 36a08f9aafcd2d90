"""Image files to arrays of one size. Loads Pillow and numpy, not torch: decoding processes start in 0.15 s.

As a program (`python -m cnnlab.data.decode`) it is such a process: pickled jobs on stdin, pickled results on
stdout. Processes and Pillow, because that is the fastest for small files that reads every format. 10,000
CIFAR-10 JPEGs on 2 cores: Pillow in one process 0.76 s, two threads 0.99 s (they wait for the interpreter's
lock), two processes 0.54 s; torchvision's `decode_jpeg` in two threads 0.36 s, but with 1.4 to 1.9 s of
import, and JPEG only. `multiprocessing` is not used: it would run a notebook-like script (one without a main
guard) again in each process.
"""

from __future__ import annotations

import io
import pickle
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import numpy as np

from cnnlab.data.formats import opened

Array = np.ndarray[Any, Any]
Item = str | tuple[str, int, int]
"""An image file, or `(file, offset, bytes)` of one inside another (a shard's member)."""


@dataclass(frozen=True)
class Recipe:
    """How a file becomes an array (channels, height, width) uint8.

    `fit`: `crop` resizes the shorter side to `resize` and cuts the middle out; `letterbox` fits the whole
    image in and fills the rest with black (a mask: with void, 255); `stretch` resizes each side by itself.
    `mask` reads class numbers: no conversion, nearest neighbour. Images are resized bilinearly with
    antialiasing.
    """

    channels: int
    height: int
    width: int
    fit: Literal["crop", "letterbox", "stretch"]
    resize: int = 0
    mask: bool = False


@dataclass
class Decoded:
    """A chunk's arrays (n, C, H, W) uint8, the files' own (height, width) (n, 2), and why any failed.

    A failed image is black with size (0, 0); `failures` holds its position in the chunk and the reason.
    """

    images: Array
    sizes: Array
    failures: list[tuple[int, str]]


def name_of(item: Item) -> str:
    """The item in a message."""
    return item if isinstance(item, str) else f"{item[0]} at byte {item[1]:,}"


def contents(item: Item) -> bytes:
    """The item's bytes, undecoded. Raises `OSError`."""
    path, offset, size = (item, 0, -1) if isinstance(item, str) else item
    with open(path, "rb") as file:  # noqa: PTH123 (pathlib: twice the time)
        file.seek(offset)
        return file.read(size)


def decode_chunk(items: Sequence[Item], recipe: Recipe) -> Decoded:
    """Decodes the items; one that cannot be read is a failure, not an error."""
    images = np.zeros((len(items), recipe.channels, recipe.height, recipe.width), np.uint8)
    sizes = np.zeros((len(items), 2), np.int64)
    failures = []
    for number, item in enumerate(items):
        try:
            source = item if isinstance(item, str) else io.BytesIO(contents(item))
            images[number], sizes[number] = decode(source, recipe)
        except MemoryError:
            raise
        except Exception as error:  # each of Pillow's parsers raises what it stumbles on
            failures.append((number, f"{type(error).__name__}: {error}"))
    return Decoded(images, sizes, failures)


def decode(source: str | BinaryIO, recipe: Recipe) -> tuple[Array, tuple[int, int]]:
    """One file, by its path or open: (channels, height, width) uint8, and its own (height, width).

    The latter is as EXIF has the image turned.
    """
    from PIL import Image, ImageOps

    with opened(source) as file:
        image: Image.Image = file
        # Asking for the EXIF of a file that has none takes as long as decoding a small JPEG.
        if "exif" in image.info or image.format == "TIFF":
            image = ImageOps.exif_transpose(image)
        image = _class_numbers(image) if recipe.mask else _converted(image, recipe.channels)
        width, height = image.size
        array = np.asarray(_fitted(image, recipe))
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return array, (height, width)


def _converted(image: Any, channels: int) -> Any:
    """The image in mode L or RGB, from greyscale, palette, transparency (over white), CMYK and 16 bits."""
    from PIL import Image

    mode = "L" if channels == 1 else "RGB"
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion would clip at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"expected 16-bit values, received {values.min()}..{values.max()}")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("expected integer pixels, received 32-bit floats; convert the file to 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert(mode)


def _class_numbers(image: Any) -> Any:
    """The mask's values as mode L; a palette's indices are the values."""
    from PIL import Image

    if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
        raise ValueError(f"expected a greyscale or palette image of class numbers, received {image.mode}")
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 255:
        raise ValueError(f"expected class numbers 0..255, received {values.min()}..{values.max()}")
    return Image.fromarray(values.astype(np.uint8))


def _fitted(image: Any, recipe: Recipe) -> Any:
    """The image at the recipe's size."""
    from PIL import Image

    how = Image.Resampling.NEAREST if recipe.mask else Image.Resampling.BILINEAR
    target = (recipe.width, recipe.height)
    if recipe.fit == "stretch":
        return image if image.size == target else image.resize(target, how)
    if recipe.fit == "crop":
        scaled, left, top = cropped(image.size[0], image.size[1], recipe)
        image = image if image.size == scaled else image.resize(scaled, how)
        return image if scaled == target else image.crop((left, top, left + recipe.width, top + recipe.height))
    left, top, width, height = letterbox(image.size[1], image.size[0], recipe.height, recipe.width)
    canvas = Image.new(image.mode, target, 255 if recipe.mask else 0)
    canvas.paste(image.resize((width, height), how), (left, top))
    return canvas


def cropped(width: int, height: int, recipe: Recipe) -> tuple[tuple[int, int], int, int]:
    """The (width, height) that the recipe's `crop` resizes to, and the left and top of what it then cuts out."""
    short = min(width, height)
    scaled = (
        max(recipe.width, width * recipe.resize // short),
        max(recipe.height, height * recipe.resize // short),
    )
    return scaled, (scaled[0] - recipe.width) // 2, (scaled[1] - recipe.height) // 2


def letterbox(height: int, width: int, to_height: int, to_width: int) -> tuple[int, int, int, int]:
    """Where a letterboxed image lies: (left, top, width, height) in pixels of the target."""
    scale = min(to_height / height, to_width / width)
    new_width = min(to_width, max(1, round(width * scale)))
    new_height = min(to_height, max(1, round(height * scale)))
    return (to_width - new_width) // 2, (to_height - new_height) // 2, new_width, new_height


def serve() -> None:
    """Answers jobs `(items, recipe)` until stdin ends."""
    # Ctrl-C and a scheduler's SIGTERM reach the whole group, and are the parent's to answer, with a checkpoint that
    # may need another batch. However it ends, its end of the pipe then closes.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    results = sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing that a decoder prints may get between the results
    while True:
        try:
            items, recipe = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(decode_chunk(items, recipe), results, protocol=pickle.HIGHEST_PROTOCOL)
        results.flush()


if __name__ == "__main__":
    # Pickle names classes by module: as `__main__` the results could not be read by the other side.
    from cnnlab.data import decode as module

    module.serve()
