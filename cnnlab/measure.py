"""Pure measurements on tensors: norms, moments, inner products and Hessian-vector products. They read, never write, and
never synchronize.

A list of tensors, one a parameter, is taken as one vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cnnlab.torch_private import foreach_add, foreach_div, foreach_mul, foreach_norm, foreach_sub


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of each tensor, in float32: (len(tensors),)."""
    if not tensors:
        return torch.zeros(0)
    return torch.stack(foreach_norm([t.detach().float() for t in tensors]))


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all tensors taken as one vector: a scalar, non-finite if one of their elements is."""
    return torch.linalg.vector_norm(norms(tensors))


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """The inner product of two vectors, a scalar."""
    return torch.stack([product.sum() for product in foreach_mul(list(left), list(right))]).sum()


def moved(start: Sequence[Tensor], direction: Sequence[Tensor], length: float | Tensor) -> list[Tensor]:
    """start + length·direction, in the dtypes of `start`."""
    along = [part.to(at) for part, at in zip(direction, start, strict=True)]
    return list(foreach_add(list(start), foreach_mul(along, length)))


def normalized(vector: Sequence[Tensor]) -> list[Tensor]:
    """The vector at length 1; zeros stay zeros."""
    length = dot(vector, vector).sqrt()
    return list(foreach_div(list(vector), torch.where(length > 0, length, 1.0)))


def update_ratios(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """‖after - before‖ / ‖before‖ of each tensor: (len(before),).

    NaN where ‖before‖ is 0: a fresh BatchNorm bias would otherwise report 1e9.
    """
    if not before:
        return torch.zeros(0)
    old = norms(before)
    change = norms(foreach_sub([t.detach() for t in after], [t.detach() for t in before]))
    return torch.where(old > 0, change / old, torch.nan)


def hessian_vector_products(
    slopes: Sequence[Tensor], params: Sequence[Tensor], vectors: Sequence[Tensor]
) -> list[Tensor]:
    """H·v by differentiating the gradient's product with v (Pearlmutter 1994), shaped like `params`.

    A loss that is linear in some parameter (the hinge in the classifier's bias) gives it a constant slope, which
    has no graph: its part of the product is zero.

    Args:
        slopes: the gradient, one tensor a parameter, with its graph, which is kept.
        params: the parameters.
        vectors: v, one tensor a parameter.
    """
    curved = [(slope, vector) for slope, vector in zip(slopes, vectors) if slope.requires_grad]
    if not curved:
        return [torch.zeros_like(param) for param in params]
    return list(
        torch.autograd.grad(
            [slope for slope, _ in curved],
            list(params),
            grad_outputs=[vector for _, vector in curved],
            retain_graph=True,
            materialize_grads=True,
        )
    )


def gradients_of(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, zeros where a parameter took no part in the loss."""
    return [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]


def merge_moments(counts: Tensor, means: Tensor, stds: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of groups taken together, from those of each (Chan et al. 1979, eq. 2.1).

    Unlike sums of squares, this keeps the digits of a small deviation about a large mean.

    Args:
        counts, means, stds: (groups, ...); a group of count 0 has no say, whatever its moments.

    Returns:
        (...) each; NaN where no group has a count.
    """
    means, stds = torch.where(counts > 0, means, 0.0), torch.where(counts > 0, stds, 0.0)
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total
    variance = (counts * (stds.square() + (means - mean).square())).sum(0) / total
    return mean, variance.sqrt()


def effective_rank(rows: Tensor) -> float:
    """How many directions a set of vectors really spans: exp of the entropy of their singular values, as shares of
    their sum (Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality", definition 1).

    Between 1 (all are multiples of one) and the number of vectors, where they are orthogonal and of one length. Not
    centred. Synchronizes.

    Args:
        rows: (N, features), one vector a row.

    Returns:
        NaN for vectors of zeros, or such as are not finite.
    """
    scale = rows.detach().abs().amax()
    if not bool(torch.isfinite(scale)) or not bool(scale > 0):
        return math.nan
    scaled = rows.detach().double() / scale
    values = torch.linalg.eigvalsh(scaled @ scaled.T).clamp_min(0).sqrt()
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())
