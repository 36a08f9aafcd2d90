"""Photos stored whole, larger than the network's input, for crops to be taken of them.

Stored images have one size, and photos have many. So a photo is squeezed, both sides by themselves, into 3 by 4: a
photo of that shape keeps its proportions, another one loses sharpness along one side, and none a pixel of its border.
One that is higher than wide lies on its side. Where a stored pixel belongs in the network's image is a matrix a photo
(`views`), which the augmentation reads (see `cnnlab.augment.photos`). Squeezing it so, rather than into a square of
the same short side, costs a third more bytes, and keeps what a photo of 3:4 has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cnnlab.data.pixels import Recipe, letterbox
from cnnlab.data.splits import digest
from cnnlab.protocols import VIEW

USUAL = 256 / 224
"""Shorter side of a stored photo for each pixel of the network's input: what ImageNet is resized to before its crop."""


def usual_side(seen: Recipe) -> int:
    """The shorter side that photos are stored at unless told."""
    return max(seen.resize, math.ceil(min(seen.height, seen.width) * USUAL))


def whole(seen: Recipe, side: int) -> Recipe:
    """The recipe that stores whole photos with a shorter side of `side` pixels, for a network that sees `seen`."""
    return replace(seen, height=side, width=2 * round(side * 2 / 3), fit="whole", resize=0)


def views(sizes: Tensor, seen: Recipe, stored: Recipe) -> Tensor:
    """(N, 2, 2) float32: from stored pixels to those of the network's image, both counted from the middle.

    Args:
        sizes: (N, 2) the photos' own height and width; (0, 0) where one could not be read.
        seen: how the network would see a photo without augmentation.
        stored: how photos are stored.
    """
    height, width = sizes.clamp(min=1).double().unbind(1)
    if seen.fit == "crop":
        scale = seen.resize / torch.minimum(height, width)
        down, across = height * scale, width * scale
    elif seen.fit == "letterbox":
        boxes = [letterbox(int(h), int(w), seen.height, seen.width) for h, w in zip(height.tolist(), width.tolist())]
        across, down = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)[:, 2:].unbind(1)
    else:
        down, across = torch.full_like(height, seen.height), torch.full_like(width, seen.width)
    none = torch.zeros_like(height)
    upright = torch.stack([across / stored.width, none, none, down / stored.height], 1)
    lying = torch.stack([none, across / stored.height, down / stored.width, none], 1)
    return torch.where((height > width)[:, None], lying, upright).view(-1, 2, 2).float()


def as_seen(
    targets: Mapping[str, Tensor], source: str, sizes: Tensor, seen: Recipe, stored: Recipe
) -> tuple[dict[str, Tensor], str]:
    """The targets with the photos' `view` among them, and the source's fingerprint with `seen` in it, where photos are
    stored whole; else as they are."""
    if stored.fit != "whole":
        return {**targets}, source
    return {**targets, VIEW: views(sizes, seen, stored)}, digest(source, seen)


def only_used(parts: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The rows that the splits use, ascending, and where among them each split's are."""
    used = torch.cat([*parts.values()]).sort().values
    return used, {name: torch.searchsorted(used, rows) for name, rows in parts.items()}
