"""Expectations of an activation over Gaussian pre-activations: what mean-field theory propagates.

A wide layer of random weights of mean 0 adds up many small terms: its pre-activations are Gaussian, and what comes next
depends on their second moments alone (Poole et al. 2016, arXiv 1606.05340, eqs. 2-5; Schoenholz et al. 2017,
arXiv 1611.01232, eqs. 3-6).

Integrals over one Gaussian are sums over nodes, by Gauss-Legendre in panels that meet at 0 rather than by
Gauss-Hermite: the kink of a rectifier at 0 then costs no accuracy (of E|t|, 84 nodes of Gauss-Hermite keep 2 digits,
these 11). Integrals over two correlated Gaussians are sums over Hermite coefficients (Mehler's formula):
E φ(z)φ(z') = Σ_k a_k a'_k ρ^k.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Activation = Callable[[Tensor], Tensor]
"""Acts on each element by itself."""

_PANELS = (-12.0, -4.0, -1.5, 0.0, 1.5, 4.0, 12.0)
_NODES = 14  # in each panel
_TERMS = 32  # Hermite coefficients that are told apart
_CHUNK = 1 << 15  # Gaussians at a time: 84 nodes each, 22 MB


@dataclass(frozen=True)
class Moments:
    """What is known of a layer's values x at each place: means over its units, and over random weights.

    All of one shape, (N, 1, ...): N inputs, then places. `cross` is E[x x'] with the same unit's value x' for the next
    input (that of the last is the first).
    """

    mean: Tensor
    second: Tensor
    cross: Tensor

    @classmethod
    def measured(cls, x: Tensor, axis: int = 1) -> Moments:
        """The moments of a layer's values, over its units, which lie along `axis`; float64."""
        x = x.detach().double()
        x = x.movedim(axis, 1)
        following = x.roll(-1, 0)
        means = (values.mean(1, keepdim=True) for values in (x, x.square(), x * following))
        return cls(*means)

    @property
    def std(self) -> float:
        """Over all units, places and inputs."""
        return math.sqrt(max(float(self.second.mean() - self.mean.mean() ** 2), 0.0))

    @property
    def signal(self) -> float:
        """The part of the standard deviation that is between inputs, by which they can be told apart."""
        return math.sqrt(max(float((self.second - self.cross).mean()), 0.0))

    @property
    def angle(self) -> float:
        """Between two inputs' values, in degrees, the mean over all pairs that `cross` has; NaN for zeros."""
        return angle(self.second.flatten(1).sum(1), self.cross.flatten(1).sum(1))


def angle(norms: Tensor, products: Tensor) -> float:
    """The mean angle in degrees between each vector and the next one.

    Args:
        norms: (N,) squared lengths.
        products: (N,) inner products with the next one.
    """
    lengths = (norms * norms.roll(-1)).sqrt()
    known = lengths > 0
    if not bool(known.any()):
        return math.nan
    cosine = (products[known] / lengths[known]).clamp(-1, 1)
    return float(torch.rad2deg(torch.acos(cosine)).mean())


@cache
def _rule() -> tuple[Tensor, Tensor, Tensor]:
    """Nodes t (Q,), weights (Q,) of the standard normal, and the normalized Hermite polynomials there (Q, K)."""
    x, w = np.polynomial.legendre.leggauss(_NODES)
    nodes, weights = [], []
    for low, high in pairwise(_PANELS):
        half = (high - low) / 2
        t = low + half * (x + 1)
        nodes.append(t)
        weights.append(half * w * np.exp(-t * t / 2) / math.sqrt(2 * math.pi))
    t, weight = np.concatenate(nodes), np.concatenate(weights)
    hermite = [np.ones_like(t), t]
    for k in range(2, _TERMS):
        hermite.append((t * hermite[-1] - math.sqrt(k - 1) * hermite[-2]) / math.sqrt(k))
    return torch.from_numpy(t), torch.from_numpy(weight), torch.from_numpy(np.stack(hermite, 1))


def expectation(function: Activation, mean: float = 0.0, std: float = 1.0) -> float:
    """E f(z) of z ~ N(mean, std²)."""
    t, weight, _ = _rule()
    return float((function(mean + std * t) * weight).sum())


def activated(activation: Activation, before: Moments) -> tuple[Moments, Tensor]:
    """The moments of φ(z) for z ~ N(mean, second - mean²) at each place, and the slope E φ'(z)² there, by which the
    second moment of a gradient is multiplied on its way back (Schoenholz et al. 2017, eq. 12).

    Raises whatever the activation raises for a tensor of any shape.
    """
    shape = before.second.shape
    mean, second, cross = (m.flatten(1) for m in (before.mean, before.second, before.cross))
    found = [
        _activated(activation, *(m[:, columns] for m in (mean, second, cross)))
        for columns in torch.arange(mean.shape[1]).split(max(1, _CHUNK // len(mean)))
    ]
    parts = [torch.cat(part, 1).reshape(shape) for part in zip(*found, strict=True)]
    return Moments(*parts[:3]), parts[3]


def slope_at_largest(activation: Activation, before: Moments, count: float) -> Tensor:
    """E φ'(z)² at the largest of `count` independent Gaussians, for each place taken as one of them: what passes where
    a maximum sends the gradient to the winner, which a rectifier has let through more often than the others.
    """
    t, weight, _ = _rule()
    share = count * torch.special.ndtr(t) ** (count - 1)
    pieces = []
    for place in before.second.flatten(1).split(max(1, _CHUNK // len(before.second)), 1):
        std = place.sqrt()
        slopes = _slopes(activation, std[..., None] * t)[1]
        pieces.append((slopes.square() * weight * share).sum(-1))
    return torch.cat(pieces, 1).reshape(before.second.shape)


def _slopes(activation: Activation, z: Tensor) -> tuple[Tensor, Tensor]:
    """φ(z) and φ'(z)."""
    # Hooks of our own: a checkpoint around this counts what is saved.
    with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):
        z = z.detach().requires_grad_()
        y = activation(z)
        (slope,) = torch.autograd.grad(y.sum(), z) if y.requires_grad else (torch.zeros_like(z),)
    return y.detach(), slope


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _activated(activation: Activation, mean: Tensor, second: Tensor, cross: Tensor) -> tuple[Tensor, ...]:
    t, weight, hermite = _rule()
    std = (second - mean.square()).clamp_min(0).sqrt()
    z = mean[..., None] + std[..., None] * t
    y, slope = _slopes(activation, z)
    after = (y.square() * weight).sum(-1)
    coefficients = (y * weight) @ hermite
    others, following = coefficients.roll(-1, 0), std.roll(-1, 0)
    covariance = cross - mean * mean.roll(-1, 0)
    correlation = torch.where(std * following > 0, covariance / (std * following), 0.0).clamp(-1, 1)
    powers = correlation[..., None] ** torch.arange(hermite.shape[1], dtype=correlation.dtype)
    product = (coefficients * others * powers).sum(-1)
    # What the coefficients leave out, of the even and of the odd part, is taken for one of the next order: exact where
    # two inputs are one, or opposite.
    mirrored = (y * y.flip(-1) * weight).sum(-1)
    for parity, part in ((0, (after + mirrored) / 2), (1, (after - mirrored) / 2)):
        rest = (part - coefficients[..., parity::2].square().sum(-1)).clamp_min(0)
        product = product + (rest * rest.roll(-1, 0)).sqrt() * correlation ** (hermite.shape[1] + parity)
    return coefficients[..., 0], after, product, (slope.square() * weight).sum(-1)
