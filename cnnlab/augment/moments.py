"""Means and covariances of a training set, read in chunks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cnnlab import rng
from cnnlab.protocols import Split

MAX_IMAGES = 50_000
"""Images that statistics are computed on; a larger training set is sampled at random."""
_CHUNK_VALUES = 2**22
_NARROW = 16
"""Values a row up to which its products are computed in float64: 16 ms for four million values instead of 4."""


def chunks(split: Split, seed: int) -> Iterator[Tensor]:
    """Images (n, C, H, W) uint8 of the split, at most `MAX_IMAGES` random ones, some million values each."""
    index = torch.arange(len(split))
    if len(split) > MAX_IMAGES:
        chosen = torch.randperm(len(split), generator=rng.generator(seed, "moments"))[:MAX_IMAGES]
        index = chosen.sort().values
    first = split.fetch(index[:1])["image"]
    for part in index.split(max(1, _CHUNK_VALUES // first.numel())):
        yield split.fetch(part)["image"]


class Moments:
    """Mean and covariance of row vectors, accumulated without cancellation.

    Rows are shifted by the first chunk's mean, so that products of two of them are about as large as the
    covariance. Of wide rows (whole images) they are computed in float32, twice as fast, and kept in float64; a
    chunk has a thousand of them. Of narrow ones (pixels) it has millions, whose sum in float32 is off by .5 %.
    """

    def __init__(self) -> None:
        self.count = 0

    def add(self, rows: Tensor) -> None:
        """Takes in (n, D) float32 rows."""
        if self.count == 0:
            self.shift = rows.mean(0)
            self.sum = torch.zeros(rows.shape[1], dtype=torch.float64)
            self.product = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
        rows = rows - self.shift
        self.count += len(rows)
        self.sum += rows.sum(0, dtype=torch.float64)
        products = rows.double() if rows.shape[1] <= _NARROW else rows
        self.product += products.T @ products

    def mean(self) -> Tensor:
        """(D,) float64."""
        return self.sum / self.count + self.shift

    def covariance(self) -> Tensor:
        """(D, D) float64, divided by the count."""
        mean = self.sum / self.count
        return self.product / self.count - torch.outer(mean, mean)


def channel_moments(split: Split, seed: int) -> tuple[Tensor, Tensor]:
    """Mean (C,) and covariance (C, C) of the pixels' colours in [0, 1], float64."""
    moments = Moments()
    for images in chunks(split, seed):
        moments.add(images.movedim(1, -1).reshape(-1, images.shape[1]).float() / 255)
    return moments.mean(), moments.covariance()


def image_moments(split: Split, seed: int) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of whole images in [0, 1], D = C·H·W, float64."""
    moments = Moments()
    for images in chunks(split, seed):
        moments.add(images.flatten(1).float() / 255)
    return moments.mean(), moments.covariance()
