"""Pictures of filters, of feature maps, of what units answer to, and of images that are alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cnnlab.explain.inside import Maximized
from cnnlab.explain.pictures import cell
from cnnlab.sinks.picture import VIRIDIS
from cnnlab.tasks.pictures import above, captioned, enlarged, grid, stretched

MOST_FILTERS, MOST_INPUTS, MOST_MAPS = 64, 16, 64
_CELL, _PANEL = 48, 96
_FOR, _AGAINST = torch.tensor([0.84, 0.15, 0.16]), torch.tensor([0.12, 0.35, 0.75])


def filters_picture(weights: Tensor, name: str) -> Tensor:
    """(3, H, W) uint8. Of three input channels, each filter in colour, grey where it is 0, its largest magnitude at
    full contrast; of others a row each, a column an input channel, red above 0 and blue below, one scale for all.

    Args:
        weights: (K, C, h, w).
    """
    shown = weights[:MOST_FILTERS]
    if weights.shape[1] == 3:
        most = shown.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-30)
        picture = grid(enlarged(0.5 + 0.5 * shown / most, _CELL), 8, gap=2)
        words = "each filter scaled to its largest weight; grey: 0"
    else:
        shown = shown[:, :MOST_INPUTS]
        most = shown.abs().max().clamp_min(1e-30)
        level = (shown / most).flatten(0, 1)[:, None]
        paint = torch.where(level > 0, _FOR[:, None, None], _AGAINST[:, None, None])
        cells = torch.lerp(torch.ones_like(paint), paint, level.abs().expand_as(paint))
        columns = shown.shape[1] if shown.shape[1] > 1 else 8
        picture = grid(enlarged(cells, 24), columns, gap=2)
        words = f"red above 0, blue below; full colour: {most.item():.2g}; a row a filter, a column an input channel"
    count = f"{len(shown)} of {len(weights)} filters" + (
        f", {shown.shape[1]} of {weights.shape[1]} input channels" if weights.shape[1] != 3 else ""
    )
    return _with_words(picture, [f"{name}: {count}, {weights.shape[2]}x{weights.shape[3]}", words])


def features_picture(image: Tensor, maps: Tensor, name: str) -> Tensor:
    """(3, H, W) uint8: an image (C, H, W), and each map (K, h, w) of it; one scale for all maps of the image, dark is
    its lowest value."""
    shown = maps[:MOST_MAPS]
    low, high = shown.min(), shown.max()
    level = (shown - low) / (high - low).clamp_min(1e-30)
    colours = torch.from_numpy(VIRIDIS)[(level * 255).round().long()].permute(0, 3, 1, 2) / 255
    side = _PANEL / max(colours.shape[-2:])
    colours = enlarged(colours, _PANEL) if side >= 1 else interpolate(colours, scale_factor=side, mode="area")
    captions = [
        [f"{number}: {each.max():.2g}" + (" silent" if not each.any() else "")] for number, each in enumerate(shown)
    ]
    picture = grid(captioned(colours, captions), 8, gap=4)
    dead = int((~maps.flatten(1).any(1)).sum())
    words = [
        f"{name}: {len(shown)} of {len(maps)} maps, {maps.shape[1]}x{maps.shape[2]}; each map's number and maximum",
        f"yellow {high:.3g}, dark {low:.3g}; {dead} of {len(maps)} are 0 everywhere for this image",
    ]
    head = grid(cell(image)[None], 1)
    return _with_words(_stacked([head, picture]), words)


def maximized_picture(found: Sequence[Maximized], name: str) -> Tensor:
    """(3, H, W) uint8: the images, each from its 1st to its 99th percentile, with what the unit reaches."""
    cells = torch.stack([stretched(each.image[None], 192)[0] for each in found])
    captions = [
        [f"{name}:{each.unit}", f"reaches {each.reached:.3g}", f"of images: {each.of_images:.3g}"] for each in found
    ]
    return grid(captioned(cells, [[*lines, ""] for lines in captions]), 4, gap=4)


def nearest_picture(image: Tensor, others: Sequence[Tensor], captions: Sequence[Sequence[str]], name: str) -> Tensor:
    """(3, H, W) uint8: an image and those that are most like it, the nearest first.

    Args:
        captions: of the image, and of each of the others.
    """
    cells = [cell(each) for each in (image, *others)]
    most = max(map(len, captions)) + 1
    lines = [[*words, *[""] * (most - len(words))] for words in captions]
    picture = grid(captioned(torch.stack(cells), lines), len(cells), gap=4)
    return _with_words(picture, [f"cosine of what {name} gives, its mean over places"])


def _with_words(picture: Tensor, lines: Sequence[str]) -> Tensor:
    width = max(picture.shape[2], 6 * max(map(len, lines)) + 12)
    return above(picture, captioned(torch.ones(1, 3, 4, width), [list(lines)])[0])


def _stacked(pictures: Sequence[Tensor]) -> Tensor:
    first, *others = pictures
    for each in others:
        first = above(first, each / 255)
    return first
