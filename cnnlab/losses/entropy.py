"""Cross entropies: of one softmax over the classes, and of one sigmoid a class."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from cnnlab.losses.base import ClassWeights, PerSample, as_distribution, class_weight_tensor
from cnnlab.protocols import VOID
from cnnlab.schema import Positive, Range

Smoothing = Annotated[float, Range(low=0, below=1)]


class CrossEntropy(PerSample):
    """-Σ_c w_c q_c log p_c, with p the softmax of the logits.

    q is the target distribution, mixed with the uniform one by `label_smoothing` ε: q = (1-ε)·target + ε/C
    (Szegedy et al. 2016, "Rethinking the Inception Architecture", section 7). The values are not divided by
    the batch's weights, so a sample's loss does not depend on the other samples; balanced weights average
    to 1.

    Args:
        num_classes: C.
        class_counts: (C,) samples of each class in the training set, for `balanced`.
        label_smoothing: ε.
        class_weights: w.
    """

    weight: Tensor | None

    def __init__(
        self,
        num_classes: int,
        class_counts: Tensor | None = None,
        label_smoothing: Smoothing = 0.0,
        class_weights: ClassWeights = None,
    ):
        super().__init__(num_classes)
        self.label_smoothing = label_smoothing
        weight = class_weight_tensor(class_weights, num_classes, class_counts)
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        if logits.ndim == 2 or target.is_floating_point():
            return super().forward(logits, target)
        # Maps as they are: of rows of 7 classes, the whole takes four times as long on a CPU (15 ms, and 4, for
        # twelve masks of 90x90, forward and backward).
        valid = target != VOID
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        losses = self.per_position(logits, torch.where(valid, target, 0))
        total = torch.where(valid, losses, 0.0).flatten(1).sum(1)
        return total / valid.flatten(1).sum(1).clamp(min=1)

    def per_position(self, logits: Tensor, target: Tensor) -> Tensor:
        if target.is_floating_point():
            target = target.to(logits.dtype)
        weight = None if self.weight is None else self.weight.to(logits)
        return F.cross_entropy(
            logits,
            target,
            weight=weight,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )


class BCE(PerSample):
    """-Σ_c [w q_c log σ(z_c) + (1 - q_c) log(1 - σ(z_c))]: a binary cross entropy for each class, one-vs-all.

    The classes are summed, so that each logit's gradient is σ(z) - q, as large as with the softmax;
    PyTorch's mean over all elements is C times smaller. The rows of a soft target need not sum to 1: the
    classes may overlap.

    Args:
        num_classes: C.
        pos_weight: w, weight of the positive terms.
        label_smoothing: ε of q = (1-ε)·target + ε/C.
    """

    def __init__(self, num_classes: int, pos_weight: Positive = 1.0, label_smoothing: Smoothing = 0.0):
        super().__init__(num_classes)
        self.pos_weight = pos_weight
        self.label_smoothing = label_smoothing

    def per_position(self, logits: Tensor, target: Tensor) -> Tensor:
        target = as_distribution(target, self.num_classes, logits.dtype, self.label_smoothing)
        losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        if self.pos_weight != 1:
            losses = losses - (self.pos_weight - 1) * target * F.logsigmoid(logits)
        return losses.sum(1)
