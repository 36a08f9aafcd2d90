"""Pixels of one image: to 8 bits grey or RGB, and to the size that is asked for. Loads Pillow and numpy, not torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 50_000_000
"""Of one image, unless told: 200 MB as Pillow holds them."""
SIXTEEN_BITS = 65535
_BAND = 1 << 22
"""Pixels that are converted at a time: what a conversion needs besides its result does not grow with the image."""
_LONG = 16
"""Where a crop would resize so many times what it keeps, and more than a band, only what is kept is resized."""


@dataclass(frozen=True)
class Recipe:
    """How a file becomes an array (channels, height, width) uint8.

    `fit`: `crop` resizes the shorter side to `resize` and cuts the middle out; `letterbox` fits the whole
    image in and fills the rest with black (a mask: with void, 255); `stretch` resizes each side by itself.
    `mask` reads class numbers: no conversion, nearest neighbour. Images are resized bilinearly with
    antialiasing.

    `value_range`: (low, high), the values of a pixel of more than 8 bits that become 0 and 255, others by the
    straight line between them, beyond it cut off; `None` takes 0 and 65,535, and refuses floats and what 16 bits do
    not hold. `max_pixels`: that an image may have; a baseline JPEG may have four times as many, and is decoded at
    half its size.
    """

    channels: int
    height: int
    width: int
    fit: Literal["crop", "letterbox", "stretch"]
    resize: int = 0
    mask: bool = False
    value_range: tuple[float, float] | None = None
    max_pixels: int = MAX_PIXELS

    def __repr__(self) -> str:
        """What decides the pixels; the same text as ever where nothing new does: runs are known by it."""
        text = (
            f"channels={self.channels}, height={self.height}, width={self.width}, fit={self.fit!r}, "
            f"resize={self.resize}, mask={self.mask}"
        )
        return f"Recipe({text})" if self.value_range is None else f"Recipe({text}, value_range={self.value_range})"


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


def converted(image: Image, recipe: Recipe, depth: Depth | None = None) -> Image:
    """The image in mode L or RGB, from greyscale, palette, transparency (over white), CMYK and more than 8 bits.

    Args:
        depth: is told of an image of more than 8 bits.

    Raises:
        ValueError: values that the recipe gives no meaning to.
    """
    mode = "L" if recipe.channels == 1 else "RGB"
    if is_deep(image):
        return _from_deep(image, recipe.value_range, depth or Depth()).convert(mode)
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _by_bands(image, mode, lambda band: _over_white(band).convert(mode))
    return _by_bands(image, mode, lambda band: band.convert(mode))


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
    see_through = image.info.get("transparency")
    seen = Depth(1, -np.inf)

    def eight_bits(band: Image) -> Image:
        values = np.asarray(band)
        finite = values[np.isfinite(values)] if band.mode == "F" else values
        seen.highest = max(seen.highest, float(finite.max()) if finite.size else -np.inf)
        grey = _straight(values) if value_range is None else _ranged(values, *value_range)
        if isinstance(see_through, int):
            grey = np.where(values == see_through, np.uint8(255), grey)
        return pillow.fromarray(grey)

    result = _by_bands(image, "L", eight_bits)
    depth.add(seen)
    return result


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


def _by_bands(image: Image, mode: str, convert: Callable[[Image], Image]) -> Image:
    """`convert(image)`, of mode `mode`; where it looks at each pixel by itself: a large image a few rows at a time."""
    from PIL import Image as pillow

    width, height = image.size
    if width * height <= _BAND:
        return convert(image)
    result = pillow.new(mode, image.size)
    rows = max(1, _BAND // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        result.paste(convert(image.crop((0, top, width, bottom))), (0, top))
    return result


def class_numbers(image: Image) -> Image:
    """The mask's values as mode L; a palette's indices are the values.

    Raises:
        ValueError: it holds colours, or numbers beyond 255.
    """
    from PIL import Image as pillow

    if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
        raise ValueError(f"expected a greyscale or palette image of class numbers, received {image.mode}")

    def numbers(band: Image) -> Image:
        values = np.asarray(band)
        if values.min() < 0 or values.max() > 255:
            raise ValueError(f"expected class numbers 0..255, received {values.min()}..{values.max()}")
        return pillow.fromarray(values.astype(np.uint8))

    return _by_bands(image, "L", numbers)


def fitted(image: Image, recipe: Recipe) -> Image:
    """The image at the recipe's size."""
    from PIL import Image as pillow

    how = pillow.Resampling.NEAREST if recipe.mask else pillow.Resampling.BILINEAR
    target = (recipe.width, recipe.height)
    if recipe.fit == "stretch":
        return image if image.size == target else image.resize(target, how)
    if recipe.fit == "crop":
        return _cut(image, recipe, how)
    left, top, width, height = letterbox(image.size[1], image.size[0], recipe.height, recipe.width)
    canvas = pillow.new(image.mode, target, 255 if recipe.mask else 0)
    canvas.paste(image.resize((width, height), how), (left, top))
    return canvas


def _cut(image: Image, recipe: Recipe, how: Any) -> Image:
    """The middle of the resized image. Of a long strip only that part is resized: the same but for rounding."""
    target = (recipe.width, recipe.height)
    scaled, left, top = cropped(image.size[0], image.size[1], recipe)
    right, bottom = left + recipe.width, top + recipe.height
    if scaled[0] * scaled[1] > max(_BAND, _LONG * target[0] * target[1]):
        across, down = image.size[0] / scaled[0], image.size[1] / scaled[1]
        box = (left * across, top * down, min(right * across, image.size[0]), min(bottom * down, image.size[1]))
        return image.resize(target, how, box=box)
    image = image if image.size == scaled else image.resize(scaled, how)
    return image if scaled == target else image.crop((left, top, right, bottom))


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
