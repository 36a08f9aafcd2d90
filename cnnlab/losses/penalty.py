"""Penalties on the weights, added to the mean loss.

All of them act on *weights*: tensors with two axes or more (kernels of convolutions and linear layers).
Biases and the scale and shift of norm layers are left alone: they are few, and pulling a scale to zero only
slows the layer.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def weights(params: Iterable[Tensor]) -> list[Tensor]:
    """The tensors that penalties act on: those with two axes or more that train."""
    return [param for param in params if param.ndim >= 2 and param.requires_grad]


def l1(params: Iterable[Tensor]) -> Tensor:
    """Σ|w| over the weights: a scalar to be multiplied by λ (0 without weights)."""
    found = weights(params)
    return torch.stack(torch._foreach_norm(found, 1)).sum() if found else torch.zeros(())


def l2(params: Iterable[Tensor]) -> Tensor:
    """½Σw² over the weights: a scalar to be multiplied by λ (0 without weights); its gradient is λw."""
    found = weights(params)
    if not found:
        return torch.zeros(())
    # Not the square of a norm: its second derivative, which Newton-CG takes, is NaN for a tensor of zeros.
    return torch.stack([square.sum() for square in torch._foreach_mul(found, found)]).sum() / 2
