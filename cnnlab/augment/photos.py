"""From whole photos, which are stored larger than the network's input, to images of its size.

A batch of whole photos has a `view` (N, 2, 2) beside its images: the linear map from stored pixels, counted from the
photo's middle, to pixels of the image that the network would get without augmentation, counted from its middle. So the
way of storing (squeezed, or lying on its side) and that of fitting (the middle of the resized photo, or a letterbox)
are one matrix, which folds into those of the augmentation: pixels are resampled once.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from cnnlab.augment.base import Fill, as_float
from cnnlab.augment.warp import affine, compose, inside, resample
from cnnlab.protocols import VIEW, Batch, Split

_SLIGHT = 1.25
"""Stored pixels a pixel of the image up to which one reading does: their weights then differ by less than a third."""


def readings(minification: float) -> int:
    """Readings along each axis that an antialiased resampling takes."""
    # The tolerance keeps the rounding of 0.9 · (1 / 0.9) from costing a whole further reading.
    return max(1, ceil(minification - 1e-6))


def extent(batch: Batch) -> Tensor:
    """(N, 2) height and width of each whole photo, in pixels of the network's image."""
    height, width = batch["image"].shape[-2:]
    view = batch[VIEW].abs()
    return (view[:, :, 0] * width + view[:, :, 1] * height).flip(1)


def from_photos(
    batch: Batch, matrix: Tensor | None, fill: Fill | None, size: tuple[int, int], minification: float = 1.0
) -> Batch:
    """The photos as images of the network's size, and no `view` any more.

    Args:
        matrix: (N, 3, 3) what happens to the image, old place to new; `None` leaves it as it is.
        fill: what lies outside the photo; `None` is black.
        size: (height, width) of the images.
        minification: largest factor by which `matrix` shrinks.
    """
    view = batch[VIEW]
    placed = affine(view, xx=view[:, 0, 0], xy=view[:, 0, 1], yx=view[:, 1, 0], yy=view[:, 1, 1])
    placed = placed if matrix is None else compose(matrix, placed)
    photos = {name: tensor for name, tensor in batch.items() if name != VIEW}
    image = as_float(photos["image"])
    height, width = image.shape[-2:]
    if minification == 1 and height <= _SLIGHT * min(size):
        read: dict[str, int] = {"across": readings(width / min(size))}
    else:
        read = {"samples": readings(minification * max(height, width) / min(size))}
    moved = resample({**photos, "image": image}, placed, fill or "edge", size=size, **read)
    if fill is None:  # black up to the border's own half pixels, which `zeros` would darken
        moved["image"] = moved["image"] * inside(image, placed, size)[:, None]
    return moved


class Seen:
    """A split of whole photos, with the images that the network would get without augmentation, as uint8."""

    def __init__(self, split: Split, size: tuple[int, int]) -> None:
        self.split = split
        self.size = size
        self.fingerprint = split.fingerprint
        self.labels = split.labels

    def __len__(self) -> int:
        return len(self.split)

    def fetch(self, index: Tensor) -> Batch:
        batch = self.split.fetch(index)
        if VIEW not in batch:
            return batch
        seen = from_photos(batch, None, None, self.size)
        return {**seen, "image": (seen["image"] * 255).round().clamp(0, 255).to(torch.uint8)}
