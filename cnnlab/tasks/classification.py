"""Image classification: one label an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from cnnlab.protocols import Batch, DataSpec, Loss, Outputs
from cnnlab.schema import NonNegative
from cnnlab.tasks.metrics import confusion, picture_grid


class Classification:
    """Minimizes `loss(logits, label)`, plus `aux_weight` times that of a second output where there is one.

    `aux_weight` follows Szegedy et al. 2015 (0.4 in the reference implementation of Inception v3; the earlier
    GoogLeNet used 0.3).
    """

    needs: tuple[str, ...] = ("label",)
    monitor: tuple[str, Literal["max", "min"]] = ("accuracy", "max")

    def __init__(self, loss: Loss, spec: DataSpec, aux_weight: NonNegative = 0.4):
        self.criterion = loss
        self.spec = spec
        self.aux_weight = aux_weight

    def head(self, model: nn.Module) -> nn.Module | None:
        return None

    def prepare(self, batch: Batch) -> Batch:
        return batch

    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        main = self.criterion(outputs["logits"], batch["label"])
        if "aux" not in outputs:
            return {"loss": main}
        aux = self.criterion(outputs["aux"], batch["label"])
        return {"loss": main + self.aux_weight * aux, "main": main, "aux": aux}

    def measure(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        label = batch["label"]
        target = label if label.ndim == 1 else label.argmax(1)  # a mixed label counts as its larger share
        return {"confusion": confusion(outputs["logits"].argmax(1), target, self.spec.num_classes)}

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """`accuracy`, and `balanced_accuracy`: the mean recall of the classes that occur."""
        counts = sums["confusion"].double()
        correct, occurring = counts.diagonal(), counts.sum(1)
        recall = correct[occurring > 0] / occurring[occurring > 0]
        return {
            "accuracy": (correct.sum() / occurring.sum()).item(),
            "balanced_accuracy": recall.mean().item(),
        }

    def pictures(self, batch: Batch, outputs: Outputs | None) -> dict[str, Tensor]:
        return {"inputs": picture_grid(batch["image"])}


def class_counts(labels: Tensor | None, classes: int) -> Tensor | None:
    """How many samples of each class there are: (classes,) int64."""
    return None if labels is None else torch.bincount(labels, minlength=classes)
