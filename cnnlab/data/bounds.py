"""What decoding an image takes in memory, by its format, and how large an image may be for it.

Pillow holds 4 bytes a pixel of a colour image, 1 of a grey one or of a palette, and most formats are decoded straight
into them. Some decoders hold much more meanwhile: so much less may such an image have. The bytes below were measured
with Pillow 12 on images of 12 million pixels (peak resident memory of a process, less that before).
"""

from __future__ import annotations

import math
from typing import Any

_BYTES = 4
"""A pixel, of the images that `max_pixels` speaks of."""
_STRAIGHT = frozenset({"JPEG", "MPO", "PNG", "BMP", "DIB", "GIF", "TGA", "PCX", "IM", "PPM"})
_BY_FORMAT = {"WEBP": 17, "AVIF": 15}
_OTHERS = 8
_JPEG_2000 = {1: 7, 2: 13, 3: 20, 4: 25}
"""By the number of bands: 32 bits of each, twice."""
_LONGEST_SIDE = 1 << 20


def bounded(image: Any, max_pixels: int) -> tuple[int, int] | None:
    """Sees to it that decoding takes at most the memory of `max_pixels` pixels of four bytes each, and the file's own.

    A JPEG or JPEG 2000 that takes more is decoded at half its size, where that takes no more.

    Args:
        image: opened, and not decoded yet.

    Returns:
        Its own (width, height) where it is going to be decoded at half of them; else `None`.

    Raises:
        ValueError: it is too large.
    """
    width, height = image.size
    if width < 1 or height < 1:
        raise ValueError(f"expected an image of at least one pixel, received {width} x {height}")
    if max(width, height) > _LONGEST_SIDE:
        raise ValueError(f"expected sides of at most {_LONGEST_SIDE:,} pixels, received {width} x {height}; cut it up")
    allowed = max_pixels * _BYTES
    needed = max(_BYTES, bytes_of(image)) * width * height
    if needed <= allowed:
        return None
    if bytes_of(image, halved=True) * width * height <= allowed:
        if image.format == "JPEG2000":
            image.reduce = 1
            return width, height
        image.draft(None, (width // 2, height // 2))
        if image.size != (width, height):
            return width, height
    raise _too_large((width, height), max_pixels, math.ceil(needed / _BYTES), image.format)


def require_pixels(image: Any, max_pixels: int) -> None:
    """Raises `ValueError` where a decoded image has more."""
    width, height = image.size
    if width * height > max_pixels:
        raise _too_large((width, height), max_pixels, width * height, image.format)


def _too_large(size: tuple[int, int], max_pixels: int, needed: int, kind: str | None) -> ValueError:
    pixels = size[0] * size[1]
    takes = "" if needed == pixels else f" of {kind}, whose decoding takes the memory of {needed:,}"
    return ValueError(
        f"expected at most {max_pixels:,} pixels, received {size[0]:,} x {size[1]:,}{takes}; type data.max_pixels="
        f"{needed} to take it"
    )


def bytes_of(image: Any, *, halved: bool = False) -> float:
    """Bytes of memory that decoding takes for each of the file's pixels.

    Args:
        halved: decoded at half its size, by which only JPEG and JPEG 2000 take less.
    """
    kind, part = image.format, 4 if halved else 1
    if kind in ("JPEG", "MPO"):
        return _held(image) / part + _coefficients(image)
    if kind == "JPEG2000":
        return _JPEG_2000.get(len(image.getbands()), 25) / part
    if kind == "TIFF":
        return _tiff(image)
    return _BY_FORMAT.get(kind, _held(image) if kind in _STRAIGHT else _OTHERS)


def _held(image: Any) -> int:
    """Bytes of a pixel as Pillow has it."""
    if image.mode.startswith("I;"):
        return 2
    return 1 if image.mode in ("1", "L", "P") else 4


def _coefficients(image: Any) -> float:
    """A progressive JPEG's, 16 bits each, lie in memory at full size, whatever is decoded of them."""
    if not image.info.get("progressive"):
        return 0
    samples = [(across, down) for _, across, down, _ in image.layer]
    widest = max(across for across, _ in samples) * max(down for _, down in samples)
    return 2 * sum(across * down for across, down in samples) / max(1, widest)


def _tiff(image: Any) -> float:
    """A strip or a tile is decoded whole before it is put where it belongs; one that lies turned is copied."""
    rows = image.tag_v2.get(278) or image.tag_v2.get(323) or image.size[1]
    strip = _held(image) * min(1.0, float(rows) / image.size[1]) if image.tag_v2.get(259, 1) != 1 else 0
    turned = image.tag_v2.get(274, 1) != 1
    return _held(image) + max(strip, _held(image) * turned)
