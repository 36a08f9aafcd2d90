"""An initialization from outside: sparse weights (Martens 2010, "Deep learning via Hessian-free optimization",
section 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from cnnlab.init.base import Initializer, Layer
from cnnlab.schema import Positive, PositiveInt


class Sparse(Initializer):
    """Each unit has `inputs` weights from N(0, std²), at random places; the others are 0."""

    def __init__(self, inputs: PositiveInt = 15, std: Positive = 1.0):
        super().__init__()
        self.inputs = inputs
        self.std = std

    def weight(self, layer: Layer, rng: torch.Generator) -> Tensor:
        units = layer.weight.shape[0]
        scores = torch.rand((units, layer.weight[0].numel()), generator=rng)
        rank = scores.argsort(1).argsort(1)
        drawn = torch.randn(scores.shape, generator=rng) * self.std
        return torch.where(rank < self.inputs, drawn, 0.0).reshape(layer.weight.shape)
