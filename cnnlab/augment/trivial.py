"""TrivialAugment: one random operation an image, at a random strength (Müller & Hutter 2021, ICCV)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnlab.augment.base import Barrier, Draws, Fill, check_fill
from cnnlab.augment.photometric import apply_matrix, brightness_matrix, contrast_matrix, saturation_matrix
from cnnlab.augment.warp import affine, resample
from cnnlab.protocols import Batch
from cnnlab.schema import PositiveInt

OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "saturation",
    "contrast", "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
_GEOMETRIC = range(OPERATIONS.index("shear_x"), OPERATIONS.index("rotate") + 1)
Signed = Callable[[str], Tensor]
"""The signed strengths (N,) of an operation, zero in images that get another."""
STRENGTHS = 31
"""Strengths are 0/30 ... 30/30 of an operation's largest."""


class TrivialAugment(Barrier):
    """One of the 14 operations of the paper's "wide" space for each image, at one of 31 strengths.

    Largest strengths: shear 0.99 about the top left corner, translation by `translate` pixels (or the image's
    side, if that is less), rotation by 135 degrees, enhancement factors 0.01 and 1.99, posterization to 2
    bits, solarization of everything. The whole batch goes through every operation and each image keeps its
    own: 14 cheap passes, no waiting for the device. Interpolation is bilinear, where the authors' code took
    the nearest pixel.
    """

    draws = 3
    bounded = True

    def __init__(self, translate: PositiveInt = 32, fill: Fill = "zeros"):
        check_fill(fill)
        self.translate = translate
        self.fill = fill

    def apply(self, batch: Batch, draws: Draws) -> Batch:
        operation = (draws.uniforms[:, 0] * len(OPERATIONS)).floor()
        strength = (draws.uniforms[:, 1] * STRENGTHS).floor() / (STRENGTHS - 1)
        sign = torch.where(draws.uniforms[:, 2] < 0.5, -1.0, 1.0)
        return self.transform(batch, operation, strength, sign, draws)

    def transform(self, batch: Batch, operation: Tensor, strength: Tensor, sign: Tensor, draws: Draws) -> Batch:
        """Number `operation` (N,) of `OPERATIONS`, at `strength` (N,) in [0, 1], in direction `sign` (N,)."""

        def chosen(name: str) -> Tensor:
            return operation == OPERATIONS.index(name)

        def signed(name: str) -> Tensor:
            return torch.where(chosen(name), strength * sign, 0.0)

        batch = {**batch, "image": batch["image"].clamp(0, 1)}
        batch = self._move(batch, operation, signed, draws)
        image = _enhance(batch["image"], signed, draws)
        for name, function in (("posterize", posterize), ("solarize", solarize)):
            image = torch.where(_wide(chosen(name)), function(image, strength), image)
        image = torch.where(_wide(chosen("autocontrast")), autocontrast(image), image)
        image = torch.where(_wide(chosen("equalize")), equalize(image), image)
        return {**batch, "image": image}

    def _move(self, batch: Batch, operation: Tensor, signed: Signed, draws: Draws) -> Batch:
        height, width = draws.size
        shear_x, shear_y = signed("shear_x") * 0.99, signed("shear_y") * 0.99
        angle = signed("rotate") * math.radians(135)
        # Whole pixels, as in the authors' code.
        x = (signed("translate_x") * min(self.translate, width)).trunc() + shear_x * (height / 2)
        y = (signed("translate_y") * min(self.translate, height)).trunc() + shear_y * (width / 2)
        sin, cos = angle.sin(), angle.cos()
        matrix = affine(angle, xx=cos, xy=sin + shear_x, x=x, yx=-sin + shear_y, yy=cos, y=y)
        moved = resample(batch, matrix, self.fill)
        touched = (operation >= _GEOMETRIC.start) & (operation < _GEOMETRIC.stop)
        # Resampling by the identity is exact only up to rounding; the other images stay as they are.
        return {**moved, "image": torch.where(_wide(touched), moved["image"], batch["image"])}


def _wide(values: Tensor) -> Tensor:
    """(N,) as (N, 1, 1, 1)."""
    return values[:, None, None, None]


def _enhance(image: Tensor, signed: Signed, draws: Draws) -> Tensor:
    """Brightness, saturation, contrast, sharpness by 1 + signed strength · 0.99: 1 for all but the chosen."""
    draws = replace(draws, mean=image.mean((2, 3)))
    matrix = torch.eye(draws.channels, draws.channels + 1, device=image.device)
    matrices = (
        ("brightness", brightness_matrix),
        ("saturation", saturation_matrix),
        ("contrast", contrast_matrix),
    )
    # Three of the four are the identity in each image, and maps that are the identity but for one add up.
    matrix = matrix + sum(build(1 + signed(name) * 0.99, draws) - matrix for name, build in matrices)
    return sharpen(apply_matrix(image, matrix), signed("sharpness") * 0.99).clamp(0, 1)


def sharpen(image: Tensor, amount: Tensor) -> Tensor:
    """image + amount·(image - smooth), `amount` (N,).

    `smooth` is PIL's 3x3 mean, with weights 5/13 in the centre and 1/13 around. The border of one pixel has
    no whole neighbourhood and stays.
    """
    if min(image.shape[-2:]) < 3:
        return image
    centre = image[:, :, 1:-1, 1:-1]
    rows = image[:, :, :-2] + image[:, :, 1:-1] + image[:, :, 2:]
    around = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth = (around + 4 * centre) / 13
    return image + _wide(amount) * F.pad(centre - smooth, (1, 1, 1, 1))


def posterize(image: Tensor, strength: Tensor) -> Tensor:
    """Keeps the upper 8 - round(6·strength) of 8 bits, `strength` (N,)."""
    step = _wide(2.0 ** (6 * strength).round())
    return ((image * 255).round() / step).floor() * step / 255


def solarize(image: Tensor, strength: Tensor) -> Tensor:
    """Inverts what is at least 255·(1 - strength) of 255, `strength` (N,)."""
    return torch.where((image * 255).round() >= _wide(255 * (1 - strength)), 1 - image, image)


def autocontrast(image: Tensor) -> Tensor:
    """Stretches each channel of each image to [0, 1]; a constant channel stays."""
    low, high = image.amin((2, 3), keepdim=True), image.amax((2, 3), keepdim=True)
    return torch.where(high > low, (image - low) / torch.where(high > low, high - low, 1.0), image)


def equalize(image: Tensor) -> Tensor:
    """Makes the histogram of 256 levels flat, channel by channel.

    As PIL's `ImageOps.equalize`: level v becomes (pixels below v + step // 2) // step, where step is the
    number of pixels below the highest level // 255; with fewer than 255 of those, the channel stays.
    """
    level = (image * 255).round().long().flatten(2)
    histogram = torch.zeros(*level.shape[:2], 256, dtype=torch.long, device=image.device)
    histogram.scatter_add_(2, level, torch.ones_like(level))
    highest = level.amax(2, keepdim=True)
    step = (level.shape[2] - histogram.gather(2, highest)) // 255
    below = histogram.cumsum(2) - histogram
    divisor = step.clamp(min=1)
    table = ((below + divisor // 2) // divisor).clamp(max=255)
    flat = table.gather(2, level).to(image.dtype) / 255
    return torch.where(step[..., None] > 0, flat.view(image.shape), image)
