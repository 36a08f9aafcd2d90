"""Rank correlation, complexity of a map, and means with their intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 100
"""Of a map's histogram, as in the reference implementation of efficient MPRT (Quantus)."""


@dataclass(frozen=True)
class Estimate:
    """A mean over images with its 95 % interval (Student's t); the interval is as wide as can be for fewer than two."""

    mean: float
    low: float
    high: float
    count: int
    """Images that have the score."""

    @property
    def known(self) -> bool:
        return self.count > 0


def estimate(values: Tensor) -> Estimate:
    """Of scores (N,), those aside that are NaN: images that do not have it."""
    known = values.double()[values.isfinite()]
    count = len(known)
    if count == 0:
        return Estimate(math.nan, -math.inf, math.inf, 0)
    mean = known.mean().item()
    if count == 1:
        return Estimate(mean, -math.inf, math.inf, 1)
    half = _t(count - 1) * known.std().item() / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count)


def _t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t."""
    from scipy.stats import t

    return float(t.ppf(0.975, freedom))


def ranks(values: Tensor) -> Tensor:
    """(N, P) float64: of each row's values, 1 the lowest; equal ones share the mean of their ranks, NaN stays NaN."""
    from scipy.stats import rankdata

    found = rankdata(values.double().numpy(), axis=1, nan_policy="omit")
    return torch.from_numpy(found)


def spearman(left: Tensor, right: Tensor) -> Tensor:
    """(N,) rank correlation of the rows of (N, P) and (N, P), where both are known; NaN where one does not vary."""
    known = left.isfinite() & right.isfinite()
    a, b = (ranks(torch.where(known, values.double(), torch.nan)) for values in (left, right))
    return _pearson(a, b, known)


def _pearson(left: Tensor, right: Tensor, known: Tensor) -> Tensor:
    count = known.sum(1, keepdim=True)

    def centred(values: Tensor) -> Tensor:
        values = torch.where(known, values, 0)
        return torch.where(known, values - values.sum(1, keepdim=True) / count, 0)

    a, b = centred(left), centred(right)
    spread = (a.square().sum(1) * b.square().sum(1)).sqrt()
    return torch.where(spread > 0, (a * b).sum(1) / spread, torch.nan)


def entropy(maps: Tensor, bins: int = BINS) -> Tensor:
    """(N,) in nats, of the histogram of each map (N, H, W) between its own least and greatest value; NaN for one that
    is not finite or does not vary (Hedström et al. 2023, arXiv 2401.06465, equation 9: complexity)."""
    flat = maps.flatten(1).double()
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    varies = (high > low) & flat.isfinite().all(1, keepdim=True)
    level = torch.where(varies, (flat - low) / torch.where(varies, high - low, 1), 0)
    place = (level * bins).long().clamp_max(bins - 1)
    share = torch.zeros(len(flat), bins, dtype=torch.float64).scatter_add_(1, place, torch.ones_like(level))
    share = share / flat.shape[1]
    found = -torch.xlogy(share, share).sum(1)
    return torch.where(varies[:, 0], found, torch.nan)
