"""Image classification: one label an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from cnnlab.protocols import Batch, DataSpec, Loss, Outputs
from cnnlab.schema import NonNegative
from cnnlab.tasks.metrics import by_class, confusion, picture_grid


class Classification:
    """Minimizes `loss(logits, label)`, plus `aux_weight` times that of a second output where there is one.

    `aux_weight` follows Szegedy et al. 2015 (0.4 in the reference implementation of Inception v3; the earlier
    GoogLeNet used 0.3).

    `views` is test-time augmentation: an image is evaluated by the mean logits of several views of it. `mirror`:
    itself and its mirror image; `mirror_translate`: these with weight 1/2, and with 1/2 both again, shifted by a
    pixel up-left and down-right, reflected at the border (Jordan 2024, arXiv 2404.00498, section 3.5).
    """

    needs: tuple[str, ...] = ("label",)
    monitor: tuple[str, Literal["max", "min"]] = ("accuracy", "max")

    def __init__(
        self,
        loss: Loss,
        spec: DataSpec,
        aux_weight: NonNegative = 0.4,
        views: Literal["none", "mirror", "mirror_translate"] = "none",
    ):
        self.criterion = loss
        self.spec = spec
        self.aux_weight = aux_weight
        self._views = views

    def head(self, model: nn.Module) -> nn.Module | None:
        return None

    def views(self, image: Tensor) -> list[tuple[float, Tensor]]:
        """The views (N, C, H, W) of a batch of images to evaluate, each with its weight; the weights sum to 1."""
        if self._views == "none":
            return [(1.0, image)]
        pair = [image, image.flip(-1)]
        if self._views == "mirror":
            return [(0.5, view) for view in pair]
        height, width = image.shape[-2:]
        padded = functional.pad(image, (1, 1, 1, 1), mode="reflect")
        shifted = [padded[..., :height, :width], padded[..., 2:, 2:]]
        moved = [view for shift in shifted for view in (shift, shift.flip(-1))]
        return [(0.25, view) for view in pair] + [(0.125, view) for view in moved]

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

    def by_class(self, sums: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        return by_class(sums["confusion"], self.spec.classes)

    def pictures(self, batch: Batch, outputs: Outputs | None) -> dict[str, Tensor]:
        return {"inputs": picture_grid(batch["image"])}


def class_counts(labels: Tensor | None, classes: int) -> Tensor | None:
    """How many samples of each class there are: (classes,) int64."""
    return None if labels is None else torch.bincount(labels, minlength=classes)
