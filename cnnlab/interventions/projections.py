"""Projections: of the weights after each update, of the gradients before it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from cnnlab.protocols import Intervention
from cnnlab.schema import Positive
from cnnlab.torch_private import foreach_mul_, foreach_sub_


class MaxNorm(Intervention):
    """Keeps every unit's incoming weights inside a ball of radius `limit` (see `max_norm_`)."""

    def __init__(self, limit: Positive = 3.0):
        self.limit = limit
        self._parameters: list[nn.Parameter] = []

    def attach(self, model: nn.Module, seed: int) -> None:
        self._parameters = list(model.parameters())

    def weights(self, step: int) -> None:
        max_norm_(self._parameters, self.limit)


class GradientCentralization(Intervention):
    """Takes the mean out of each unit's gradient: ∂L/∂w_i ← ∂L/∂w_i - mean(∂L/∂w_i) over the unit's inputs, for every
    weight of two axes or more (Yong et al. 2020, equation 1)."""

    @torch.no_grad()
    def gradients(self, parameters: Sequence[nn.Parameter], step: int) -> None:
        found = [p.grad for p in parameters if p.grad is not None and p.ndim >= 2]
        foreach_sub_(found, [g.mean(tuple(range(1, g.ndim)), keepdim=True) for g in found])


@torch.no_grad()
def max_norm_(params: Iterable[Tensor], limit: float) -> None:
    """Scales each unit's incoming weights to L2 norm `limit` where it is larger, in place
    (Srebro & Shraibman 2005; Srivastava et al. 2014, "Dropout", section 5.1).

    A unit is an entry of a weight's first axis: an output channel of a convolution or of a linear layer
    (for a transposed convolution an input channel). Units within the limit keep their bits.
    """
    if limit <= 0:
        raise ValueError(f"expected a limit > 0, received {limit}")
    found = [p for p in params if p.ndim >= 2 and p.requires_grad]
    if not found:
        return
    norms = [torch.linalg.vector_norm(w.flatten(1), dim=1).view(-1, *[1] * (w.ndim - 1)) for w in found]
    # A quotient of equal numbers is exactly 1; `limit` times a reciprocal may be a little less.
    foreach_mul_(found, [limit / norm.clamp(min=limit) for norm in norms])
