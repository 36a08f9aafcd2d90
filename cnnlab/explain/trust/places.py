"""Does a map lie where the object is? Pointing game, energy and overlap with boxes or masks.

It asks where the object is, not what the network looks at: a network that uses something else is found to be wrong here
though its map is right.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = 0.5
"""Of a map's maximum: what is above it is taken as the object."""


def pointing(maps: Tensor, inside: Tensor) -> Tensor:
    """(N,): whether the map's maximum lies in the object (Zhang et al. 2016, pointing game, without its tolerance of 15
    pixels); where several places share it, their part that does. NaN for maps that do not vary, and without object.

    Args:
        maps: (N, H, W).
        inside: (N, H, W) bool.
    """
    most = (maps == maps.amax((1, 2), keepdim=True)).double()
    return _where((most * inside).sum((1, 2)) / most.sum((1, 2)), maps, inside)


def energy(maps: Tensor, inside: Tensor) -> Tensor:
    """(N,): the part of what is above 0 that lies in the object (Wang et al. 2020, Score-CAM, equation 9)."""
    above = maps.double().clamp_min(0)
    total = above.sum((1, 2))
    return _where(
        torch.where(total > 0, (above * inside).sum((1, 2)) / total.clamp_min(1e-300), torch.nan), maps, inside
    )


def overlap(maps: Tensor, inside: Tensor, threshold: float = _HALF) -> Tensor:
    """(N,): intersection over union of the object with where the map is above a part of its maximum."""
    shown = maps > threshold * maps.amax((1, 2), keepdim=True).clamp_min(0)
    both, either = ((shown & inside).sum((1, 2)), (shown | inside).sum((1, 2)))
    return _where(both.double() / either.clamp_min(1), maps, inside)


def _where(score: Tensor, maps: Tensor, inside: Tensor) -> Tensor:
    flat = maps.flatten(1)
    known = flat.isfinite().all(1) & (flat.amax(1) > flat.amin(1)) & inside.flatten(1).any(1)
    return torch.where(known, score, torch.nan)


def of_box(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, H, W) bool: pixels whose centre lies in the box (N, 4), (x1, y1, x2, y2) in [0, 1]."""
    height, width = size
    y = ((torch.arange(height) + 0.5) / height)[None, :, None]
    x = ((torch.arange(width) + 0.5) / width)[None, None, :]
    x1, y1, x2, y2 = (boxes[:, side, None, None] for side in range(4))
    return (x >= x1) & (x < x2) & (y >= y1) & (y < y2)
