"""Losses that are no likelihood: the hinge and the squared error."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cnnlab.losses.base import PerSample, as_distribution
from cnnlab.schema import Positive


class Hinge(PerSample):
    """max(0, margin + max_{j≠y} z_j - z_y) (Crammer & Singer 2001, equation 3 and section 2).

    A soft target gives the mean of the classes' losses under it.

    Args:
        num_classes: C.
        margin: by how much the target's logit must lead.
        squared: squares the value, which makes the loss smooth at the margin.
    """

    def __init__(self, num_classes: int, margin: Positive = 1.0, squared: bool = False):
        super().__init__(num_classes)
        self.margin = margin
        self.squared = squared

    def per_position(self, logits: Tensor, target: Tensor) -> Tensor:
        # The best rival of every class: the second largest logit for the class that leads, the largest for
        # the rest.
        top, index = logits.topk(2, dim=1)
        classes = torch.arange(self.num_classes, device=logits.device)
        rival = torch.where(classes == index[:, :1], top[:, 1:], top[:, :1])
        losses = (self.margin + rival - logits).clamp(min=0)
        losses = losses.square() if self.squared else losses
        return (losses * as_distribution(target, self.num_classes, logits.dtype)).sum(1)


class MSE(PerSample):
    """Σ_c (a_c - t_c)² to the one-hot or soft target t.

    Summed over the classes: on `probabilities` (a, the softmax) it is the Brier score (Brier 1950), between
    0 and 2; on `logits` it is least-squares classification.

    Args:
        num_classes: C.
        space: what is compared to the target.
    """

    def __init__(self, num_classes: int, space: Literal["probabilities", "logits"] = "probabilities"):
        super().__init__(num_classes)
        self.space = space

    def per_position(self, logits: Tensor, target: Tensor) -> Tensor:
        answer = torch.softmax(logits, 1) if self.space == "probabilities" else logits
        return (answer - as_distribution(target, self.num_classes, logits.dtype)).square().sum(1)
