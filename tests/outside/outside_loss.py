"""A loss from outside: cross entropy with one more term of its series (Leng et al. 2022, "PolyLoss", equation 6)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softmax

from cnnlab.schema import NonNegative


class Poly1(nn.Module):
    """-log p + ε(1 - p) of the right class's probability p, one value a sample."""

    def __init__(self, epsilon: NonNegative = 1.0):
        super().__init__()
        self.epsilon = epsilon

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Logits (N, C) and int64 labels (N,) -> (N,)."""
        right = softmax(logits, 1).gather(1, target[:, None])[:, 0]
        return cross_entropy(logits, target, reduction="none") + self.epsilon * (1 - right)
