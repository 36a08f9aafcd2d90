"""Pure measurements on tensors: norms and moments. They read, never write, and never synchronize."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of each tensor, in float32: (len(tensors),)."""
    if not tensors:
        return torch.zeros(0)
    return torch.stack(torch._foreach_norm([t.detach().float() for t in tensors]))


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all tensors taken as one vector: a scalar."""
    return torch.linalg.vector_norm(norms(tensors))


def update_ratios(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """‖after - before‖ / ‖before‖ of each tensor: (len(before),).

    NaN where ‖before‖ is 0: a fresh BatchNorm bias would otherwise report 1e9.
    """
    old = norms(before)
    change = norms(torch._foreach_sub([t.detach() for t in after], list(before)))
    return torch.where(old > 0, change / old, torch.full_like(old, float("nan")))


def gradients_of(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, zeros where a parameter took no part in the loss."""
    return [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
