"""Penalties on the weights, added to the mean loss, and the projection of max-norm.

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


@torch.no_grad()
def max_norm_(params: Iterable[Tensor], limit: float) -> None:
    """Scales each unit's incoming weights to L2 norm `limit` where it is larger, in place
    (Srebro & Shraibman 2005; Srivastava et al. 2014, "Dropout", section 5.1).

    A unit is an entry of a weight's first axis: an output channel of a convolution or of a linear layer
    (for a transposed convolution an input channel). Units within the limit keep their bits.
    """
    if limit <= 0:
        raise ValueError(f"expected a limit > 0, received {limit}")
    found = weights(params)
    if not found:
        return
    norms = [torch.linalg.vector_norm(w.flatten(1), dim=1).view(-1, *[1] * (w.ndim - 1)) for w in found]
    # A quotient of equal numbers is exactly 1; `limit` times a reciprocal may be a little less.
    torch._foreach_mul_(found, [limit / norm.clamp(min=limit) for norm in norms])
