"""Penalties on how the units of a layer stand to each other."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cnnlab.penalties.norms import weights_of
from cnnlab.schema import NonNegative


class Orthogonality:
    """λ·Σ‖G - I‖² over the weights (Bansal et al. 2018, "Can We Gain More from Orthogonality Regularizations", equation
    2, the soft one).

    A weight is a matrix W of a unit a row (an output channel of a convolution with all that it reads). G is WWᵀ where
    there are fewer rows than columns, else WᵀW: the smaller of the two, which alone can be the identity.

    Args:
        strength: λ.
    """

    def __init__(self, strength: NonNegative = 1e-4):
        self.strength = strength

    def __call__(self, weights: Mapping[str, Tensor]) -> Tensor:
        terms = []
        for weight in weights_of(weights.values()):
            matrix = weight.flatten(1)
            matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
            gram = matrix @ matrix.T
            terms.append((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).square().sum())
        return self.strength * torch.stack(terms).sum() if terms else torch.zeros(())
