"""Pixels of one image: to 8 bits grey or RGB, and to the size that is asked for. Loads Pillow and numpy, not torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cnnlab.data.mask_pixels import Meaning, class_numbers

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 50_000_000
"""Of one image, unless told: 200 MB as Pillow holds them."""
SIXTEEN_BITS = 65535
_BAND = 1 << 18
"""Pixels that are turned and converted at a time; a larger image is never held twice."""
_MANY = 1 << 22
"""Pixels of what lies between the two passes of a resize, from where on they are made piece by piece."""
_LONG = 16
"""Where a crop would resize so many times what it keeps, and more than `_MANY`, only what is kept is resized."""


@dataclass(frozen=True)
class Recipe:
    """How a file becomes an array (channels, height, width) uint8.

    `fit`: `crop` resizes the shorter side to `resize` and cuts the middle out; `letterbox` fits the whole
    image in and fills the rest with black (a mask: with void, 255); `stretch` resizes each side by itself; `whole`
    does so, too, with an image that is higher than wide laid on its side (its rows become columns).
    `mask` reads class numbers: no conversion, nearest neighbour. Images are resized bilinearly with
    antialiasing. `meaning`: the classes that a mask's values, or colours, stand for; `None` takes values as they are.

    `value_range`: (low, high), the values of a pixel of more than 8 bits that become 0 and 255, others by the
    straight line between them, beyond it cut off; `None` takes 0 and 65,535, and refuses floats and what 16 bits do
    not hold. `max_pixels`: that an image may have; see `cnnlab.data.bounds`.
    """

    channels: int
    height: int
    width: int
    fit: Literal["crop", "letterbox", "stretch", "whole"]
    resize: int = 0
    mask: bool = False
    value_range: tuple[float, float] | None = None
    max_pixels: int = MAX_PIXELS
    meaning: Meaning | None = None

    def __repr__(self) -> str:
        """What decides the pixels; the same text as ever where nothing new does: runs are known by it."""
        text = (
            f"channels={self.channels}, height={self.height}, width={self.width}, fit={self.fit!r}, "
            f"resize={self.resize}, mask={self.mask}"
        )
        more = {"value_range": self.value_range, "meaning": self.meaning}
        return f"Recipe({text}{''.join(f', {name}={value}' for name, value in more.items() if value is not None)})"


def checked_range(value_range: Sequence[float] | None) -> tuple[float, float] | None:
    """The option `data.value_range`. Raises `ValueError` for what is no range."""
    if value_range is None:
        return None
    if len(value_range) != 2 or not np.isfinite(value_range).all() or not value_range[0] < value_range[1]:
        raise ValueError(f"expected data.value_range=[LOW,HIGH] with LOW < HIGH, received {list(value_range)}")
    return float(value_range[0]), float(value_range[1])


@dataclass
class Depth:
    """What was seen of images of more than 8 bits: how many, and their highest value."""

    images: int = 0
    highest: float = 0.0

    def add(self, other: Depth) -> None:
        self.images += other.images
        self.highest = max(self.highest, other.highest)


def is_deep(image: Image) -> bool:
    """Whether a pixel has more than 8 bits: 16 or 32, or a float."""
    return image.mode.startswith("I") or image.mode == "F"


class Pixels:
    """A decoded image's pixels as the recipe has them, a few rows at a time, turned as the file says.

    From greyscale, palette, transparency (over white), CMYK and more than 8 bits to L or RGB; of a mask the class
    numbers, as L.

    Args:
        image: decoded.
        method: Pillow's transposition that turns it; `None` for none.

    Raises, as its methods do:
        ValueError: values that the recipe gives no meaning to.
    """

    def __init__(self, image: Image, recipe: Recipe, method: Any = None) -> None:
        self._image = image
        self._recipe = recipe
        self._method = method
        width, height = image.size
        self.size = (height, width) if method in _SWAP_SIDES else (width, height)
        self.mode = "L" if recipe.channels == 1 or recipe.mask else "RGB"
        self.depth = Depth()
        if is_deep(image) and not recipe.mask:
            self.depth = Depth(1, -np.inf)

    @property
    def ready(self) -> Image | None:
        """The image, where neither turning nor conversion would make another one of it."""
        as_is = self._image.mode == self.mode and "transparency" not in self._image.info
        return self._image if as_is and self._method is None and not self._recipe.mask else None

    def whole(self) -> Image:
        return self.ready or self.rows(0, self.size[1])

    def rows(self, top: int, bottom: int) -> Image:
        """The rows from `top` until before `bottom` of the turned image."""
        part = self._image
        if (top, bottom) != (0, self.size[1]):
            part = part.crop(_unturned((0, top, self.size[0], bottom), self._image.size, self._method))
        if self._method is not None:
            part = part.transpose(self._method)
        return (
            class_numbers(part, self._recipe.meaning)
            if self._recipe.mask
            else converted(part, self._recipe, self.depth)
        )


_FLIP_ACROSS, _FLIP_DOWN, _QUARTER, _HALF, _THREE_QUARTERS, _TRANSPOSE, _TRANSVERSE = range(7)
"""Pillow's transpositions; its rotations are counterclockwise."""
TURNS = {
    2: _FLIP_ACROSS,
    3: _HALF,
    4: _FLIP_DOWN,
    5: _TRANSPOSE,
    6: _THREE_QUARTERS,
    7: _TRANSVERSE,
    8: _QUARTER,
}
"""What makes an image upright, by EXIF's orientation."""
_SWAP_SIDES = (_QUARTER, _THREE_QUARTERS, _TRANSPOSE, _TRANSVERSE)
_FROM_RIGHT = (_FLIP_ACROSS, _HALF, _QUARTER, _TRANSVERSE)
"""Transpositions after which what was on the right comes first, along the axis where it then lies."""
_FROM_BOTTOM = (_FLIP_DOWN, _HALF, _THREE_QUARTERS, _TRANSVERSE)


def _unturned(box: tuple[int, int, int, int], size: tuple[int, int], method: int | None) -> tuple[int, int, int, int]:
    """Where a (left, top, right, bottom) of the turned image lies in the (width, height) of the file's own."""
    left, top, right, bottom = box
    if method in _SWAP_SIDES:
        left, top, right, bottom = top, left, bottom, right
    if method in _FROM_RIGHT:
        left, right = size[0] - right, size[0] - left
    if method in _FROM_BOTTOM:
        top, bottom = size[1] - bottom, size[1] - top
    return left, top, right, bottom


def converted(image: Image, recipe: Recipe, depth: Depth) -> Image:
    """The image in mode L or RGB.

    Args:
        depth: is told the highest value of an image of more than 8 bits.

    Raises:
        ValueError: values that the recipe gives no meaning to.
    """
    mode = "L" if recipe.channels == 1 else "RGB"
    if is_deep(image):
        return _from_deep(image, recipe.value_range, depth).convert(mode)
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = _over_white(image)
    return image.convert(mode)


def _over_white(image: Image) -> Image:
    from PIL import Image as pillow

    layer = image.convert("RGBA")
    return pillow.alpha_composite(pillow.new("RGBA", layer.size, "white"), layer)


def _from_deep(image: Image, value_range: tuple[float, float] | None, depth: Depth) -> Image:
    """Mode L of an image of 16 or 32 bits, or of floats. A grey that the file calls transparent is white."""
    from PIL import Image as pillow

    if value_range is None and image.mode == "F":
        raise ValueError(
            "expected integer pixels, received 32-bit floats; say by data.value_range=[LOW,HIGH] what is black and "
            "what is white"
        )
    values = np.asarray(image)
    finite = values[np.isfinite(values)] if image.mode == "F" else values
    depth.highest = max(depth.highest, float(finite.max()) if finite.size else -np.inf)
    grey = _straight(values) if value_range is None else _ranged(values, *value_range)
    see_through = image.info.get("transparency")
    if isinstance(see_through, int):
        grey = np.where(values == see_through, np.uint8(255), grey)
    return pillow.fromarray(grey)


def _straight(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """0..65535 to 0..255, rounded; Pillow's own conversion would clip at 255."""
    whole = values.astype(np.int64)
    if whole.min() < 0 or whole.max() > SIXTEEN_BITS:
        raise ValueError(
            f"expected values 0..{SIXTEEN_BITS} of a pixel, received {whole.min()}..{whole.max()}; say by "
            "data.value_range=[LOW,HIGH] what is black and what is white"
        )
    return ((whole + 128) // 257).astype(np.uint8)


def _ranged(values: np.ndarray[Any, Any], low: float, high: float) -> np.ndarray[Any, Any]:
    """`low`..`high` to 0..255, rounded; what is no number is `low`."""
    part = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.floor(np.nan_to_num(part, nan=0.0).clip(0, 255) + 0.5).astype(np.uint8)


def fitted(pixels: Pixels, recipe: Recipe, like: tuple[int, int] | None = None) -> Image:
    """The image at the recipe's size.

    Args:
        like: (width, height) of another image, whose place it takes; `None` for its own.
    """
    from PIL import Image as pillow

    target = (recipe.width, recipe.height)
    across, down = like or pixels.size
    if recipe.fit == "whole" and down > across:
        return _resized(pixels, (recipe.height, recipe.width), recipe).transpose(pillow.Transpose.TRANSPOSE)
    if recipe.fit in ("stretch", "whole"):
        return _resized(pixels, target, recipe)
    if recipe.fit == "crop":
        return _cut(pixels, target, recipe, like or pixels.size)
    left, top, width, height = letterbox(down, across, recipe.height, recipe.width)
    canvas = pillow.new(pixels.mode, target, 255 if recipe.mask else 0)
    canvas.paste(_resized(pixels, (width, height), recipe), (left, top))
    return canvas


def _cut(pixels: Pixels, target: tuple[int, int], recipe: Recipe, like: tuple[int, int]) -> Image:
    """The middle of the resized image. Of a long strip only that part is resized: the same but for rounding."""
    scaled, left, top = cropped(*like, recipe)
    right, bottom = left + recipe.width, top + recipe.height
    if scaled[0] * scaled[1] > max(_MANY, _LONG * target[0] * target[1]):
        across, down = pixels.size[0] / scaled[0], pixels.size[1] / scaled[1]
        box = (left * across, top * down, min(right * across, pixels.size[0]), min(bottom * down, pixels.size[1]))
        return _resized(pixels, target, recipe, box)
    image = _resized(pixels, scaled, recipe)
    return image if scaled == target else image.crop((left, top, right, bottom))


_Box = tuple[float, float, float, float]


def _resized(pixels: Pixels, target: tuple[int, int], recipe: Recipe, box: _Box | None = None) -> Image:
    """The part of the image in `box`, or all of it, at the size `target`.

    Pillow resizes across, then down, with 8 bits between. So can rows be resized across as they are converted, to the
    same pixels.
    """
    from PIL import Image as pillow

    how = pillow.Resampling.NEAREST if recipe.mask else pillow.Resampling.BILINEAR
    width, height = pixels.size
    left, top, right, bottom = box or (0, 0, width, height)
    if height > _LONG * width and target[0] * height > _MANY:
        return _down_first(pixels, target, how, (left, top, right, bottom))
    if pixels.ready is not None or width * height <= _BAND:
        image = pixels.whole()
        return image if box is None and image.size == target else image.resize(target, how, box=box)
    between = pillow.new(pixels.mode, (target[0], height))
    step = max(1, _BAND // width)
    for first in range(0, height, step):
        last = min(first + step, height)
        band = pixels.rows(first, last)
        between.paste(band.resize((target[0], last - first), how, box=(left, 0, right, last - first)), (0, first))
    return between.resize(target, how, box=(0, top, target[0], bottom))


def _down_first(pixels: Pixels, target: tuple[int, int], how: Any, box: _Box) -> Image:
    """Of a tall image, whose rows resized across would be large: the same but for rounding."""
    from PIL import Image as pillow

    result = pillow.new(pixels.mode, target)
    left, top, right, bottom = box
    scale = (bottom - top) / target[1]
    for row in range(target[1]):
        begin, end = top + row * scale, min(top + (row + 1) * scale, bottom)
        # A row is made of what lies up to its own height above and below it.
        first = max(0, math.floor(begin - scale) - 1)
        last = min(pixels.size[1], math.ceil(end + scale) + 1)
        rows = (0, begin - first, pixels.size[0], end - first)
        part = pixels.rows(first, last).resize((pixels.size[0], 1), how, box=rows)
        result.paste(part.resize((target[0], 1), how, box=(left, 0, right, 1)), (0, row))
    return result


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
