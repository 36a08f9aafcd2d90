"""The focal loss, which turns the easy samples down."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cnnlab.losses.base import ClassWeights, PerSample, as_distribution, class_weight_tensor
from cnnlab.schema import NonNegative, Probability, Range


class Focal(PerSample):
    """(1 - p_t)^γ times a cross entropy (Lin et al. 2017, "Focal Loss for Dense Object Detection").

    - `sigmoid`, the paper's equation 5, one-vs-all and summed over the classes:
      α(1-p)^γ(-log p) for the target class, (1-α)p^γ(-log(1-p)) for each other; γ = 0 without α is `BCE`.
    - `softmax`: α(1-p_y)^γ(-log p_y); γ = 0 without α is `CrossEntropy`.

    Both are linear in a soft target: a mixed sample has the mixture of its two labels' losses.

    Args:
        num_classes: C.
        class_counts: (C,) samples of each class in the training set, for `balanced`.
        variant: which of the two.
        gamma: γ.
        alpha: α; `None` leaves out both α and 1 - α. With the softmax it scales the whole loss.
        prior: π, the probability that every class starts with (section 3.3), for `sigmoid`: the builder
            sets the classifier's bias to `initial_bias`. Without it the many negatives dominate the first
            updates.
        class_weights: weight of each class's term.
    """

    weight: Tensor | None

    def __init__(
        self,
        num_classes: int,
        class_counts: Tensor | None = None,
        variant: Literal["sigmoid", "softmax"] = "sigmoid",
        gamma: NonNegative = 2.0,
        alpha: Probability | None = 0.25,
        prior: Annotated[float, Range(above=0, below=1)] | None = 0.01,
        class_weights: ClassWeights = None,
    ):
        super().__init__(num_classes)
        if variant == "softmax" and prior is not None:
            raise ValueError(
                f"expected prior=null with variant=softmax (its probabilities sum to 1), received {prior:g}; "
                "use variant=sigmoid for a prior"
            )
        self.variant = variant
        self.gamma = gamma
        self.alpha = alpha
        self.prior = prior
        weight = class_weight_tensor(class_weights, num_classes, class_counts)
        self.register_buffer("weight", weight, persistent=False)

    def per_position(self, logits: Tensor, target: Tensor) -> Tensor:
        target = as_distribution(target, self.num_classes, logits.dtype)
        losses = self._sigmoid(logits, target) if self.variant == "sigmoid" else self._softmax(logits, target)
        return (losses if self.weight is None else losses * self.weight.to(logits)).sum(1)

    def _sigmoid(self, logits: Tensor, target: Tensor) -> Tensor:
        log_p, log_q = F.logsigmoid(logits), F.logsigmoid(-logits)
        # (1-p)^γ as exp(γ log(1-p)): the power has an infinite slope at p = 1 when γ < 1.
        positive = -log_p * torch.exp(self.gamma * log_q)
        negative = -log_q * torch.exp(self.gamma * log_p)
        alpha, beta = (1.0, 1.0) if self.alpha is None else (self.alpha, 1 - self.alpha)
        return alpha * target * positive + beta * (1 - target) * negative

    def _softmax(self, logits: Tensor, target: Tensor) -> Tensor:
        log_p = torch.log_softmax(logits, 1)
        # The clamp has slope 0 where p rounds to 1; there the power's slope is infinite when γ < 1.
        easy = (1 - log_p.exp()).clamp(min=torch.finfo(logits.dtype).tiny)
        scale = 1.0 if self.alpha is None else self.alpha
        return -scale * target * easy**self.gamma * log_p

    def initial_bias(self, num_classes: int) -> Tensor | None:
        """-log((1-π)/π) for every class (section 4.1, "Initialization"), or `None` without a prior."""
        if self.prior is None:
            return None
        return torch.full((num_classes,), -math.log((1 - self.prior) / self.prior))
