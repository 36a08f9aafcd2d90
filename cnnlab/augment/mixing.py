"""Mixup and CutMix: two images and their labels in one, `label` becoming (N, classes) float.

The partner is the previous sample of the batch (the first one's is the last), so each sample serves once and
nothing has to be sorted; since the order of an epoch is random, so are the pairs. The batch is that of an update, over
all processes and micro-batches. This is the one augmentation that depends on which samples share a batch; how much of
the partner a sample gets does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cnnlab.augment.base import Barrier, Draws, Placed
from cnnlab.augment.erasing import rectangle
from cnnlab.protocols import Batch, DataSpec
from cnnlab.schema import Positive, Probability


class BetaQuantile:
    """Beta(α, α) numbers from uniform ones, by a table of the inverse CDF.

    With e = min(α, 1) and s = x^e, the CDF up to x <= 1/2 is proportional to
    ∫ s^(α/e - 1)·(1 - s^(1/e))^(α - 1) ds, whose integrand is bounded and, for α <= 1, smooth. The table
    holds s at evenly spaced u from 0 to 1/2; the other half follows from symmetry, x(1 - u) = 1 - x(u).
    """

    cells = 4096
    _fine = 2**18

    def __init__(self, alpha: float):
        self.exponent = min(alpha, 1.0)
        s = torch.linspace(0, 0.5**self.exponent, self._fine + 1, dtype=torch.float64)
        middle = (s[1:] + s[:-1]) / 2
        log_density = (alpha / self.exponent - 1) * middle.log()
        log_density += (alpha - 1) * torch.log1p(-(middle ** (1 / self.exponent)))
        # Relative to the largest, which underflows where alpha is large.
        density = (log_density - log_density.max()).exp()
        cdf = torch.cat([torch.zeros(1, dtype=torch.float64), density.cumsum(0)])
        cdf *= 0.5 / cdf[-1]
        u = torch.linspace(0, 0.5, self.cells + 1, dtype=torch.float64)
        # Uniform numbers are multiples of 2^-24, so 0 stands for all below: not for the end of a thin tail.
        u[0] = 2.0**-25
        right = torch.searchsorted(cdf, u).clamp(1, self._fine)
        left = right - 1
        part = (u - cdf[left]) / (cdf[right] - cdf[left]).clamp(min=torch.finfo(torch.float64).tiny)
        self._placed = Placed(table=torch.lerp(s[left], s[right], part.clamp(0, 1)).float())

    def __call__(self, uniforms: Tensor) -> Tensor:
        """Uniform numbers in [0, 1), of any shape, to Beta(α, α) ones in [0, 1]."""
        table = self._placed.get("table", uniforms.device)
        position = torch.minimum(uniforms, 1 - uniforms) * (2 * self.cells)
        cell = position.long().clamp(max=self.cells - 1)
        low = torch.lerp(table[cell], table[cell + 1], position - cell) ** (1 / self.exponent)
        return torch.where(uniforms < 0.5, low, 1 - low)


def soft_labels(label: Tensor, num_classes: int) -> Tensor:
    """(N,) int64 as (N, classes) float32, one in the class; what is float already stays."""
    if label.is_floating_point():
        return label
    return (label[:, None] == torch.arange(num_classes, device=label.device)).to(torch.float32)


class _Mixing(Barrier):
    """What both have in common: draw 0 chooses the samples that are mixed, draw 1 the share that stays."""

    bounded = True
    neighbours = 1

    def __init__(self, alpha: Positive = 1.0, p: Probability = 1.0):
        self.alpha = alpha
        self.p = p
        self._beta = BetaQuantile(alpha)

    def supports(self, spec: DataSpec) -> str | None:
        wrong = sorted(spec.targets - {"label"})
        if "label" not in spec.targets or wrong:
            return f"mixes labels only, and this data has {', '.join(sorted(spec.targets)) or 'no targets'}"
        return None

    def share(self, draws: Draws) -> Tensor:
        """(N,) λ: Beta(α, α) where the sample is mixed, 1 where it is not."""
        return torch.where(draws.uniforms[:, 0] < self.p, self._beta(draws.uniforms[:, 1]), 1.0)

    @staticmethod
    def mix_labels(batch: Batch, share: Tensor, draws: Draws) -> Tensor:
        labels = soft_labels(batch["label"], draws.num_classes)
        return share[:, None] * labels + (1 - share)[:, None] * labels.roll(1, 0)


class Mixup(_Mixing):
    """λ·image + (1 - λ)·partner, labels alike, λ ~ Beta(α, α) (Zhang et al. 2018, section 2)."""

    draws = 2

    def __init__(self, alpha: Positive = 0.2, p: Probability = 1.0):
        super().__init__(alpha, p)

    def apply(self, batch: Batch, draws: Draws) -> Batch:
        share = self.share(draws)
        image = batch["image"]
        mixed = torch.lerp(image.roll(1, 0), image, share[:, None, None, None])
        return {**batch, "image": mixed, "label": self.mix_labels(batch, share, draws)}


class CutMix(_Mixing):
    """Pastes a rectangle of the partner; labels mix by area (Yun et al. 2019, section 3).

    The rectangle has sides √(1 - λ) of the image's, λ ~ Beta(α, α), is centred anywhere and cut at the
    border; the label's share is what is left of the image, pixel by pixel.
    """

    draws = 4

    def apply(self, batch: Batch, draws: Draws) -> Batch:
        height, width = draws.size
        side = (1 - self.share(draws)).sqrt()
        sides = torch.stack([side * height, side * width], dim=1).round()
        centre = torch.stack([draws.uniforms[:, 2] * height, draws.uniforms[:, 3] * width], dim=1).floor()
        low = centre - (sides / 2).floor()
        pasted = rectangle(low, low + sides, draws.size)
        share = 1 - pasted.flatten(1).float().mean(1)
        image = torch.where(pasted[:, None], batch["image"].roll(1, 0), batch["image"])
        return {**batch, "image": image, "label": self.mix_labels(batch, share, draws)}
