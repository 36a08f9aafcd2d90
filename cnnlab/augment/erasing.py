"""Augmentations that take information away pixel by pixel."""

from __future__ import annotations

import torch
from torch import Tensor

from cnnlab.augment.base import Barrier, Draws, standard_normal
from cnnlab.protocols import Batch
from cnnlab.schema import NonNegative, PositiveInt, Probability


def rectangle(low: Tensor, high: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, H, W) bool: pixels with low <= (y, x) < high, for corners (N, 2) of whole pixels, maybe outside."""
    height, width = size
    y = torch.arange(height, device=low.device)
    x = torch.arange(width, device=low.device)
    rows = (y >= low[:, :1]) & (y < high[:, :1])
    columns = (x >= low[:, 1:]) & (x < high[:, 1:])
    return rows[:, :, None] & columns[:, None, :]


class Cutout(Barrier):
    """Covers a square, centred on a random pixel and cut at the border (DeVries & Taylor 2017).

    The paper covers with the training set's mean colour; `value` 0.5 is near it. Mask and box stay: what is
    behind the square is still there.
    """

    draws = 2
    bounded = True

    def __init__(self, size: PositiveInt = 16, value: Probability = 0.5):
        self.size = size
        self.value = value

    def apply(self, batch: Batch, draws: Draws) -> Batch:
        height, width = draws.size
        centre = torch.stack([draws.uniforms[:, 0] * height, draws.uniforms[:, 1] * width], dim=1).floor()
        low = centre - self.size // 2
        covered = rectangle(low, low + self.size, draws.size)
        return {**batch, "image": batch["image"].masked_fill(covered[:, None], self.value)}


class GaussianNoise(Barrier):
    """Adds independent normal noise of standard deviation `std`, for values in [0, 1], to every value.

    A value of noise is hashed for each value of the image: some 50 bytes of passing memory each.
    """

    def __init__(self, std: NonNegative = 0.05):
        self.std = std

    def num_draws(self, channels: int, size: tuple[int, int]) -> int:
        return channels * size[0] * size[1]

    def apply(self, batch: Batch, draws: Draws) -> Batch:
        noise = standard_normal(draws.uniforms).view(batch["image"].shape)
        return {**batch, "image": batch["image"] + self.std * noise}
