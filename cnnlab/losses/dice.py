"""The Dice loss, which measures overlap instead of counting positions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cnnlab.losses.base import PerSample, as_distribution, flatten_positions
from cnnlab.schema import NonNegative, Positive


class Dice(PerSample):
    """1 - mean_c (2Σpt + s)/(Σp² + Σt² + s) for each sample, over its valid positions
    (Milletari, Navab, Ahmadi 2016, "V-Net", section 3).

    The mean is over the classes that the sample's target has: a class that is absent has overlap 0 with
    whatever probability it gets, and would add a constant. A sample without valid positions has loss 0.

    Args:
        num_classes: C.
        smooth: s, which keeps the quotient finite and its slope bounded for tiny objects.
        squared: whether the denominator squares, as V-Net's does.
        cross_entropy: weight of the mean cross entropy that is added; overlap alone has hardly a gradient
            while the prediction is far off (Isensee et al. 2021, "nnU-Net": 1).
    """

    def __init__(
        self,
        num_classes: int,
        smooth: Positive = 1e-5,
        squared: bool = True,
        cross_entropy: NonNegative = 0.0,
    ):
        super().__init__(num_classes)
        self.smooth = smooth
        self.squared = squared
        self.cross_entropy = cross_entropy

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        if logits.ndim == 2:  # a sample with one position
            logits, target = logits[:, :, None], target[..., None]
        logits, target, valid = flatten_positions(logits, target)
        rows = as_distribution(target.flatten(0, 1), self.num_classes, logits.dtype)
        target = rows.view(logits.shape)
        weight = valid[:, :, None].to(logits.dtype)
        probability, target = torch.softmax(logits, 2) * weight, target * weight
        power = 2 if self.squared else 1
        overlap = (probability * target).sum(1)
        size = (probability**power + target**power).sum(1)
        dice = (2 * overlap + self.smooth) / (size + self.smooth)
        present = (target.sum(1) > 0).to(logits.dtype)
        loss = (present * (1 - dice)).sum(1) / present.sum(1).clamp(min=1)
        if self.cross_entropy == 0:
            return loss
        entropy = -(target * F.log_softmax(logits, 2)).sum((1, 2)) / valid.sum(1).clamp(min=1)
        return loss + self.cross_entropy * entropy

    def expected_initial_loss(self) -> float | None:
        """`None`: the overlap of an even prediction depends on the sizes of the objects."""
        return None
