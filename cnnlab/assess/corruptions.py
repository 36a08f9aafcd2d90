"""What happens to images outside of a data set: noise, blur, less contrast, JPEG, a shift; each at five strengths.

The kinds are those of Hendrycks & Dietterich 2019 (arXiv 1903.12261) that need no further data; blur and shift are in
parts of the shorter side, so that they are the same for images of 32 and of 224 pixels. Images are (N, C, H, W) uint8,
as they are before normalization; what comes out is rounded and cut to 0...255 again.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cnnlab import rng
from cnnlab.protocols import VOID, Batch

STRENGTHS = 5
NOISE = (0.04, 0.08, 0.12, 0.18, 0.26)
BLUR = (0.006, 0.012, 0.018, 0.024, 0.03)
CONTRAST = (0.75, 0.5, 0.35, 0.2, 0.1)
JPEG = (80, 60, 40, 20, 10)
SHIFT = (0.03, 0.06, 0.1, 0.15, 0.2)
_DIRECTIONS = ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1))


@dataclass(frozen=True)
class Corruption:
    """`apply(batch, strength)` gives a batch with other images (and for a shift, other targets), of the same samples.

    What is random in it is a function of the sample's index alone: the same at every strength, in any batch.
    """

    apply: Callable[[Batch, int], Batch]
    says: str
    """The formula, with its values from the weakest to the strongest."""
    pixels: Callable[[int], Sequence[float]] | None = None
    """What the strengths come to where the shorter side has so many pixels."""

    def formula(self, side: int) -> str:
        if self.pixels is None:
            return self.says
        return f"{self.says}; of {side}: {_values(self.pixels(side))} pixels"


def _pixels(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)


def noise(batch: Batch, strength: int) -> Batch:
    """x + 255 s n, with n from N(0, 1) for each value."""
    images = batch["image"]
    drawn = [
        torch.randn(images.shape[1:], generator=rng.generator(0, "robustness/noise", index))
        for index in batch["index"].tolist()
    ]
    return {**batch, "image": _pixels(images.float() + 255 * NOISE[strength] * torch.stack(drawn).to(images.device))}


def blur(batch: Batch, strength: int) -> Batch:
    """A Gaussian, its standard deviation s times the shorter side, cut off at three of them; mirrored at the edges."""
    from torchvision.transforms.v2.functional import gaussian_blur

    images = batch["image"]
    sigma = BLUR[strength] * min(images.shape[-2:])
    reach = min(math.ceil(3 * sigma), min(images.shape[-2:]) - 1)
    side = 2 * reach + 1
    return {**batch, "image": _pixels(gaussian_blur(images.float(), [side, side], [sigma, sigma]))}


def contrast(batch: Batch, strength: int) -> Batch:
    """m + s (x - m), with m the mean of the image's channel."""
    images = batch["image"].float()
    mean = images.mean((2, 3), keepdim=True)
    return {**batch, "image": _pixels(mean + CONTRAST[strength] * (images - mean))}


def jpeg(batch: Batch, strength: int) -> Batch:
    """Written and read again by Pillow at quality s, colours at half the resolution.

    Raises `ValueError` for images of other than 1 or 3 channels.
    """
    from PIL import Image

    images = batch["image"]
    if images.shape[1] not in (1, 3):
        raise ValueError(f"JPEG has 1 or 3 channels, and these images {images.shape[1]}")
    written = []
    for image in images.permute(0, 2, 3, 1).cpu().numpy():
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[2] == 1 else image)).save(
            buffer, "JPEG", quality=JPEG[strength]
        )
        with Image.open(buffer) as read:
            written.append(np.asarray(read).reshape(image.shape))
    return {**batch, "image": torch.from_numpy(np.stack(written)).permute(0, 3, 1, 2).to(images.device)}


def shift(batch: Batch, strength: int) -> Batch:
    """By s times the shorter side (one pixel at least) in one of eight directions; edge pixels are repeated.

    Masks and boxes move along: masks are void where nothing was, boxes are cut at the frame and (0, 0, 0, 0) outside.
    """
    images = batch["image"]
    height, width = images.shape[-2:]
    pixels = _shifts(min(height, width))[strength]
    drawn = rng.uniform(0, "robustness/shift", 0, batch["index"], 1)[:, 0]
    ways = torch.tensor(_DIRECTIONS, device=images.device)[(drawn * len(_DIRECTIONS)).long().to(images.device)]
    down, right = (ways * pixels).unbind(1)
    rows = torch.arange(height, device=images.device) - down[:, None]
    columns = torch.arange(width, device=images.device) - right[:, None]
    at = torch.arange(len(images), device=images.device)[:, None, None]
    y, x = rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]
    moved = {**batch, "image": images[at, :, y, x].permute(0, 3, 1, 2).contiguous()}
    if "mask" in batch:
        inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
        moved["mask"] = torch.where(inside, batch["mask"][at, y, x], VOID)
    if "box" in batch:
        by = torch.stack([right / width, down / height], 1).to(batch["box"].dtype)
        box = (batch["box"] + by.repeat(1, 2)).clamp(0, 1)
        moved["box"] = torch.where((box[:, 2:] > box[:, :2]).all(1, keepdim=True), box, 0)
    return moved


def _shifts(side: int) -> list[int]:
    return [max(1, round(part * side)) for part in SHIFT]


def _values(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:.3g}" for number in numbers)


CORRUPTIONS: dict[str, Corruption] = {
    "noise": Corruption(noise, f"x + 255 s n, n from N(0, 1); s {_values(NOISE)}"),
    "blur": Corruption(
        blur, f"Gaussian of s times the shorter side; s {_values(BLUR)}", lambda side: [part * side for part in BLUR]
    ),
    "contrast": Corruption(contrast, f"m + s (x - m), m the channel's mean; s {_values(CONTRAST)}"),
    "jpeg": Corruption(jpeg, f"JPEG of quality s; s {_values(JPEG)}"),
    "shift": Corruption(
        shift, f"by s times the shorter side, one of eight ways, edges repeated; s {_values(SHIFT)}", _shifts
    ),
}
