"""Noise floors: maps that know nothing of the network, and what a measure says of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cnnlab import rng
from cnnlab.explain.maps import Map

FLOORS = ("random", "centre", "swapped")
DRAWS = 4
"""Random maps an image."""
_SPREAD = 0.2
"""Of the centred Gaussian: its standard deviation, as a part of the side; where it is above half, it covers 17 %."""


def floors(found: Map) -> Iterator[tuple[str, Tensor]]:
    """Maps (N, H, W) of the kind and grain of `found` that say nothing of the network, by the floor they belong to:

    - `random`: `DRAWS` times, independent values a pixel, or a cell of the layer's maps, positive where the method's
      are;
    - `centre`: a Gaussian in the middle;
    - `swapped`: the method's own map of another image, with its grain, its smoothness and its liking for the middle.
    """
    count, height, width = found.values.shape
    for number in range(DRAWS):
        yield "random", random(found, number)
    yield "centre", centre((height, width)).expand(count, -1, -1)
    if count > 1:
        yield "swapped", found.values.roll(1, 0)


def random(found: Map, number: int) -> Tensor:
    """(N, H, W): independent normal values for a signed method, their magnitudes for others, each image's its own."""
    count, *size = found.values.shape
    grid = found.grid or tuple(size)
    drawn = torch.randn((count, *grid), generator=rng.generator(0, "explain/random", number))
    values = drawn if found.signed else drawn.abs()
    if grid == tuple(size):
        return values
    return interpolate(values[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def centre(size: tuple[int, int]) -> Tensor:
    """(1, H, W): a Gaussian in the middle of the image."""
    sides = [torch.arange(length) + 0.5 - length / 2 for length in size]
    falls = [torch.exp(-0.5 * (at / (_SPREAD * length)) ** 2) for at, length in zip(sides, size)]
    return falls[0][None, :, None] * falls[1][None, None, :]
