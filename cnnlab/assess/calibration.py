"""Whether a network is right as often as it says: reliability diagrams and the expected calibration error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cnnlab import rng
from cnnlab.tasks.metrics import CONFIDENCE_BINS, confidence_bin

DRAWS = 500
"""Of the outcomes of a network that is as sure and calibrated."""
_AT_ONCE = 1 << 22


@dataclass
class Calibration:
    """Of answers with a confidence in (0, 1], each right or wrong.

    `bins` (B, 3) float64: answers, the sum of their confidences, those that are right; bin m has the confidences in
    (m / B, (m + 1) / B].
    """

    bins: Tensor
    adaptive_ece: float | None = None
    """The same with `bins` of equally many answers, in the order of their confidence (Nguyen & O'Connor 2015)."""
    chance: tuple[float, float] | None = None
    """The ECE that a calibrated network with these confidences has on so many answers: its mean, and what it exceeds
    once in twenty times (Bröcker & Smith 2007, "consistency resampling")."""

    @property
    def ece(self) -> float:
        """The mean over the answers of |accuracy - confidence| of their bin (Guo et al. 2017, equation 3)."""
        return _ece(self.bins).item()

    @property
    def accuracy(self) -> float:
        return (self.bins[:, 2].sum() / self.bins[:, 0].sum()).item()

    @property
    def confidence(self) -> float:
        return (self.bins[:, 1].sum() / self.bins[:, 0].sum()).item()

    def described(self) -> dict[str, Any]:
        """For JSON; of bins without answers, accuracy and confidence are `None`."""
        number = len(self.bins)
        rows = [
            {
                "from": m / number,
                "to": (m + 1) / number,
                "count": int(count),
                "confidence": confidence / count if count else None,
                "accuracy": right / count if count else None,
            }
            for m, (count, confidence, right) in enumerate(self.bins.tolist())
        ]
        return {
            "ece": self.ece,
            "binning": f"{number} bins of equal width in the confidence",
            "adaptive_ece": self.adaptive_ece,
            "ece_if_calibrated": None if self.chance is None else self.chance[0],
            "ece_if_calibrated_95": None if self.chance is None else self.chance[1],
            "mean_confidence": self.confidence,
            "accuracy": self.accuracy,
            "bins": rows,
        }


def calibration(confidence: Tensor, right: Tensor, bins: int = CONFIDENCE_BINS) -> Calibration:
    """Of independent answers.

    Args:
        confidence: (N,) of the predicted class.
        right: (N,) bool.
    """
    confidence, right = confidence.double().cpu(), right.double().cpu()
    number = confidence_bin(confidence, bins)
    table = torch.stack([torch.ones_like(confidence), confidence, right], 1)
    summed = torch.zeros(bins, 3, dtype=torch.float64).index_add_(0, number, table)
    return Calibration(summed, _adaptive(confidence, right, bins), _by_chance(confidence, number, bins))


def of_bins(bins: Tensor) -> Calibration:
    """Of pixels, counted by image, (N, B, 3), or (B, 3). They are not independent, so nothing is said of chance."""
    return Calibration(bins.double().cpu().reshape(-1, *bins.shape[-2:]).sum(0))


def _ece(bins: Tensor) -> Tensor:
    """Of (..., B, 3)."""
    return (bins[..., 2] - bins[..., 1]).abs().sum(-1) / bins[..., 0].sum(-1)


def _adaptive(confidence: Tensor, right: Tensor, bins: int) -> float:
    order = confidence.argsort(stable=True)
    gaps = (right - confidence)[order].tensor_split(min(bins, len(order)))
    return sum(gap.sum().abs().item() for gap in gaps) / len(order)


def _by_chance(confidence: Tensor, number: Tensor, bins: int) -> tuple[float, float]:
    """From answers that are right with the probability of their confidence."""
    generator = rng.generator(0, "eval/calibration")
    member = torch.nn.functional.one_hot(number, bins).double()
    sure = confidence @ member
    found: list[Tensor] = []
    for part in torch.arange(DRAWS).split(max(1, _AT_ONCE // len(confidence))):
        right = torch.rand(len(part), len(confidence), generator=generator, dtype=torch.float64) < confidence
        found.append((right.double() @ member - sure).abs().sum(1) / len(confidence))
    drawn = torch.cat(found)
    return drawn.mean().item(), drawn.quantile(0.95).item()


def in_words(found: Calibration) -> Sequence[str]:
    """The error and its binning; where it is known, what chance makes of it."""
    told = f"{found.ece:.4f}  {len(found.bins)} bins of equal width"
    if found.adaptive_ece is not None:
        told += f" (of equal counts: {found.adaptive_ece:.4f})"
    lines = [told]
    gap = found.confidence - found.accuracy
    how = f"{'over' if gap > 0 else 'under'}confident by {abs(gap):.4f} in the mean"
    if found.chance is None:
        return [*lines, how]
    mean, high = found.chance
    if found.ece <= high:
        how = "no more than chance"
    return [*lines, f"{how}; calibrated, it would be {mean:.4f}, and above {high:.4f} once in 20"]
