"""Measures that add up over batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cnnlab.protocols import VOID


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
    is taken for the class that is of it), `iou` (intersection over union), `taken_for` (the class that most of those
    that are missed are taken for, `None` where none is); a rate of nothing is `None`.
    """
    matrix = counts.double().cpu()
    correct, target, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    missed = matrix - correct.diag()
    rates = {
        "recall": correct / target,
        "precision": correct / predicted,
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
