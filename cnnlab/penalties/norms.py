"""Penalties on the size of the weights.

All of them act on *weights*: tensors with two axes or more (kernels of convolutions and linear layers).
Biases and the scale and shift of norm layers are left alone: they are few, and pulling a scale to zero only
slows the layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from cnnlab.schema import NonNegative, Positive
from cnnlab.torch_private import foreach_mul, foreach_norm


def weights_of(params: Iterable[Tensor]) -> list[Tensor]:
    """The tensors that penalties act on: those with two axes or more that train."""
    return [param for param in params if param.ndim >= 2 and param.requires_grad]


def l1(params: Iterable[Tensor]) -> Tensor:
    """Σ|w| over the weights: a scalar to be multiplied by λ (0 without weights)."""
    found = weights_of(params)
    return torch.stack(foreach_norm(found, 1)).sum() if found else torch.zeros(())


def l2(params: Iterable[Tensor]) -> Tensor:
    """½Σw² over the weights: a scalar to be multiplied by λ (0 without weights); its gradient is λw."""
    found = weights_of(params)
    if not found:
        return torch.zeros(())
    # Not the square of a norm: its second derivative, which Newton-CG takes, is NaN for a tensor of zeros.
    return torch.stack([square.sum() for square in foreach_mul(found, found)]).sum() / 2


class L1:
    """λ·Σ|w| over the weights (Tibshirani 1996)."""

    def __init__(self, strength: NonNegative):
        self.strength = strength

    def __call__(self, weights: Mapping[str, Tensor]) -> Tensor:
        return self.strength * l1(weights.values())


class L2:
    """λ/2·Σw² over the weights; its gradient is λw."""

    def __init__(self, strength: NonNegative):
        self.strength = strength

    def __call__(self, weights: Mapping[str, Tensor]) -> Tensor:
        return self.strength * l2(weights.values())


class GroupLasso:
    """λ·Σ√n·√(‖w‖² + ε²) over the units of the weights: it pulls whole units to zero (Yuan & Lin 2006; for filters Wen
    et al. 2016, "Learning Structured Sparsity in Deep Neural Networks").

    A unit is an entry of a weight's first axis (an output channel of a convolution or of a linear layer), w its n
    incoming weights.

    Args:
        strength: λ.
        epsilon: ε > 0, so that a unit at zero has a slope and a curvature.
    """

    def __init__(self, strength: NonNegative = 1e-5, epsilon: Positive = 1e-6):
        self.strength = strength
        self.epsilon = epsilon

    def __call__(self, weights: Mapping[str, Tensor]) -> Tensor:
        terms = []
        for weight in weights_of(weights.values()):
            units = weight.flatten(1)
            norms = (units.square().sum(1) + self.epsilon**2).sqrt()
            terms.append(units.shape[1] ** 0.5 * norms.sum())
        return self.strength * torch.stack(terms).sum() if terms else torch.zeros(())
