"""A penalty from outside: many small weights rather than few large ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cnnlab.schema import NonNegative


class Sparsity:
    """λ·Σ log(1 + w²) over all weights (Olshausen & Field 1996)."""

    def __init__(self, strength: NonNegative = 1e-3):
        self.strength = strength

    def __call__(self, weights: Mapping[str, Tensor]) -> Tensor:
        return self.strength * torch.stack([w.square().log1p().sum() for w in weights.values()]).sum()
