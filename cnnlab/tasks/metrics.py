"""Measures that add up over batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cnnlab.protocols import VOID

CONFIDENCE_BINS = 15
"""Of equal width, in which answers are counted by their confidence, as in Guo et al. 2017."""


def confusion(predicted: Tensor, target: Tensor, classes: int) -> Tensor:
    """Counts (classes, classes) int64, rows the target, columns the prediction; void counts nowhere.

    As in the losses, void is in dense targets (N, H, W) only: of 1000 labels (N,), 255 is one. It falls into a row
    that is cut off, since the host would have to wait for the size of what a boolean mask keeps.
    """
    dense = target.ndim > 1
    row = torch.where(target == VOID, classes, target) if dense else target
    cell = torch.add(predicted, row, alpha=classes).flatten()
    counts = cell.new_zeros((classes + dense) * classes).scatter_add_(0, cell, torch.ones_like(cell))
    return counts.view(-1, classes)[:classes]


def by_class(counts: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """What became of each class, from a confusion matrix (classes, classes), rows the target.

    `samples` (images, or pixels of masks), `recall` (the share of them that is found), `precision` (the share of what
    is taken for the class that is of it), `f1` (their harmonic mean), `iou` (intersection over union), `taken_for` (the
    class that most of those that are missed are taken for, `None` where none is); a rate of nothing is `None`.
    """
    matrix = counts.double().cpu()
    correct, target, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    missed = matrix - correct.diag()
    rates = {
        "recall": correct / target,
        "precision": correct / predicted,
        "f1": 2 * correct / (target + predicted),
        "iou": correct / (target + predicted - correct),
    }
    return [
        {
            "class": name,
            "samples": int(target[row]),
            **{rate: None if values[row].isnan() else values[row].item() for rate, values in rates.items()},
            "taken_for": names[int(missed[row].argmax())] if missed[row].sum() else None,
        }
        for row, name in enumerate(names)
    ]


def overlaps(predicted: Tensor, target: Tensor, classes: int) -> dict[str, Tensor]:
    """Of masks (N, H, W) by class, (N, classes) int64: `intersection` and `union` in pixels, void left out."""
    seen = target != VOID
    counts = {}
    for name, classed, chosen in (
        ("predicted", predicted, seen),
        ("target", target, seen),
        ("both", target, seen & (predicted == target)),
    ):
        # what does not count falls into a column that is cut off
        cell = torch.where(chosen, classed, classes).flatten(1).long()
        rows = cell.new_zeros(len(cell), classes + 1).scatter_add_(1, cell, torch.ones_like(cell))
        counts[name] = rows[:, :classes]
    return {"intersection": counts["both"], "union": counts["predicted"] + counts["target"] - counts["both"]}


def confidence_bin(confidence: Tensor, bins: int = CONFIDENCE_BINS) -> Tensor:
    """The number of the bin of each confidence, int64: bin m has those in (m / bins, (m + 1) / bins]."""
    edges = torch.arange(1, bins, dtype=confidence.dtype, device=confidence.device) / bins
    return torch.bucketize(confidence, edges)


def reliability(confidence: Tensor, right: Tensor, counted: Tensor, bins: int = CONFIDENCE_BINS) -> Tensor:
    """(N, bins, 3) float64: of each image's pixels (N, H, W) those with a confidence in each bin, the sum of their
    confidences, and how many are right.

    Args:
        counted: which pixels do (N, H, W), bool.
    """
    number = torch.where(counted, confidence_bin(confidence, bins), bins).flatten(1)
    table = number.new_zeros((len(number), bins + 1, 3), dtype=torch.float64)
    for column, values in enumerate((torch.ones_like(confidence), confidence, right)):
        table[:, :, column].scatter_add_(1, number, values.double().flatten(1))
    return table[:, :bins]
