"""Boxes (N, 4), (x1, y1, x2, y2) in parts of width and height: how far two are apart, and how they are mirrored.

All is computed in float32, and nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def has_area(box: Tensor) -> Tensor:
    """(N,) bool."""
    return (box[:, 2:] > box[:, :2]).all(1)


def iou(one: Tensor, other: Tensor) -> Tensor:
    """(N,) intersection over union; 0 where neither has an area."""
    shared, union = _overlap(one.float(), other.float())
    return shared / union.clamp_min(torch.finfo(torch.float32).tiny)


def giou_loss(box: Tensor, target: Tensor) -> Tensor:
    """(N,) 1 - GIoU in [0, 2]: IoU less the share of the smallest box around both that neither covers (Rezatofighi et
    al. 2019, "Generalized Intersection over Union", algorithm 1). Of boxes that do not meet, it still has a slope."""
    box, target = box.float(), target.float()
    shared, union = _overlap(box, target)
    low, high = torch.minimum(box[:, :2], target[:, :2]), torch.maximum(box[:, 2:], target[:, 2:])
    around = (high - low).prod(1)
    tiny = torch.finfo(torch.float32).tiny
    return 1 - shared / union.clamp_min(tiny) + (around - union) / around.clamp_min(tiny)


def mse_loss(box: Tensor, target: Tensor) -> Tensor:
    """(N,) mean over the four sides of the squared error."""
    return (box.float() - target.float()).square().mean(1)


def smooth_l1_loss(box: Tensor, target: Tensor, beta: float) -> Tensor:
    """(N,) mean over the four sides of |error| - beta/2, and of error²/(2·beta) where |error| < beta (Girshick 2015,
    "Fast R-CNN", equation 3, with beta 1 in units of its own)."""
    return functional.smooth_l1_loss(box.float(), target.float(), beta=beta, reduction="none").mean(1)


def mirrored(box: Tensor) -> Tensor:
    """The boxes in the mirror image, left and right exchanged."""
    x1, y1, x2, y2 = box.unbind(1)
    return torch.stack([1 - x2, y1, 1 - x1, y2], 1)


def shifted(box: Tensor, x: float, y: float) -> Tensor:
    """The boxes moved right and down, in parts of width and height."""
    x1, y1, x2, y2 = box.unbind(1)
    return torch.stack([x1 + x, y1 + y, x2 + x, y2 + y], 1)


def _overlap(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) areas of intersection and union."""
    low, high = torch.maximum(one[:, :2], other[:, :2]), torch.minimum(one[:, 2:], other[:, 2:])
    shared = (high - low).clamp_min(0).prod(1)
    areas = [(box[:, 2:] - box[:, :2]).clamp_min(0).prod(1) for box in (one, other)]
    return shared, areas[0] + areas[1] - shared
