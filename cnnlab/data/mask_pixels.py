"""What the pixels of a mask's file stand for. Loads Pillow and numpy, not torch."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

Array = np.ndarray[Any, Any]
Colour = tuple[int, int, int]
Meaning = tuple[tuple[int | Colour, int], ...]
"""The class number (or 255 for void) of each value, or each colour, that may be in a file."""

_SHOWN = 8
_LOSSY = ("JPEG", "MPO", "JPEG2000", "AVIF")
_LOSSY_TIFF = ("jpeg", "tiff_jpeg")


def require_exact(image: Image, content: bytes) -> None:
    """Raises `ValueError` for a format that smears values where two classes meet, to those of others.

    Args:
        image: opened.
        content: how its file begins; some 100 bytes do.
    """
    lossy = image.format in _LOSSY or image.info.get("compression") in _LOSSY_TIFF
    if lossy or (image.format == "WEBP" and not _is_lossless_webp(content)):
        raise ValueError(
            f"expected a mask in a format that keeps each value (PNG), received {image.format}, which smears them; "
            "make it anew from what it was made of"
        )


def _is_lossless_webp(content: bytes) -> bool:
    """By the first chunk that holds an image, behind those that speak of it (RIFF: name, length, content)."""
    at = 12
    while at + 8 <= len(content):
        name, length = content[at : at + 4], int.from_bytes(content[at + 4 : at + 8], "little")
        if name in (b"VP8 ", b"VP8L"):
            return name == b"VP8L"
        at += 8 + length + length % 2
    return False


def class_numbers(image: Image, meaning: Meaning | None) -> Image:
    """The mask as mode L: class numbers, or its values as they are where `meaning` is `None`.

    A palette's indices are the values, unless colours have the meaning. A grey image that was saved in colour, three
    equal channels and nothing transparent, is a grey one.

    Raises:
        ValueError: it holds colours where values are asked for, values beyond 255, or some without a meaning.
    """
    from PIL import Image as pillow

    if meaning is None:
        return pillow.fromarray(_values(image, "; say by data.colours which colour is which class"))
    if isinstance(meaning[0][0], tuple):
        return pillow.fromarray(_of_colours(image, {c: n for c, n in meaning if isinstance(c, tuple)}))
    table = {value: number for value, number in meaning if isinstance(value, int)}
    numbers, known = np.zeros(256, np.uint8), np.zeros(256, bool)
    numbers[list(table)], known[list(table)] = list(table.values()), True
    values = _values(image)
    if not known[values].all():
        raise ValueError(f"expected {named(table)} in a mask, received {named(np.unique(values[~known[values]]))}")
    return pillow.fromarray(numbers[values])


def named(values: Collection[Any]) -> str:
    """Values in words, the first few of many; of a range, its ends."""
    found = sorted(int(value) for value in values)
    if len(found) > 2 and found == list(range(found[0], found[-1] + 1)):
        return f"{found[0]}..{found[-1]}"
    shown = ", ".join(map(str, found[:_SHOWN]))
    return shown if len(found) <= _SHOWN else f"{shown}, ... ({len(found)} values)"


def _values(image: Image, remedy: str = "") -> Array:
    """(H, W) uint8."""
    values = np.asarray(image)
    if image.mode in ("1", "L", "P") or image.mode.startswith("I"):
        if values.min() < 0 or values.max() > 255:
            raise ValueError(f"expected class numbers 0..255, received {values.min()}..{values.max()}")
        return values.astype(np.uint8)
    if image.mode in ("LA", "RGB", "RGBA") and values.dtype == np.uint8:
        colours = values[..., : 3 if image.mode != "LA" else 1]
        odd = (colours != colours[..., :1]).any(-1)
        if odd.any():
            raise ValueError(
                "expected a greyscale or palette image of class numbers, received colours, "
                f"as {_first(colours, odd)}{remedy}"
            )
        if image.mode != "RGB" and (values[..., -1] != 255).any():
            raise ValueError("expected class numbers, received transparent pixels; save it without transparency")
        return np.ascontiguousarray(colours[..., 0])
    raise ValueError(f"expected a greyscale or palette image of class numbers, received {image.mode}")


def _of_colours(image: Image, table: dict[Colour, int]) -> Array:
    """(H, W) uint8: the class of each pixel's colour, whatever is transparent."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"expected a mask of colours, received {image.mode}")
    if image.mode in ("RGBA", "RGB"):
        colours = np.asarray(image)[..., :3]
    else:
        colours = np.asarray(image.convert("RGBA"))[..., :3]
    codes = (colours.astype(np.int32) << np.array([16, 8, 0], np.int32)).sum(-1)
    order = sorted(table)
    known = np.array([red << 16 | green << 8 | blue for red, green, blue in order], np.int32)
    place = np.minimum(known.searchsorted(codes), len(known) - 1)
    odd = known[place] != codes
    if odd.any():
        raise ValueError(
            f"expected the {len(known)} colours of data.colours in a mask, received "
            f"{len(np.unique(codes[odd]))} others, as {_first(colours, odd)}"
        )
    return np.array([table[colour] for colour in order], np.uint8)[place]


def _first(colours: Array, where: Array) -> str:
    return str(tuple(int(value) for value in colours[where][0]))
