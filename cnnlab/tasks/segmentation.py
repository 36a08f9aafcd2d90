"""Semantic segmentation: one class a pixel, decoded from a backbone's features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from cnnlab.protocols import VOID, Batch, ConvNet, DataSpec, Loss, Outputs, Split
from cnnlab.tasks.base import Task
from cnnlab.tasks.metrics import by_class, confusion, overlaps, reliability
from cnnlab.tasks.pictures import above, beside, coloured, enlarged, grid, legend, stretched

_PIECE = 64
"""Samples whose masks are counted at a time."""


class Segmentation(Task):
    """Minimizes the mean over each image's pixels of `loss(mask logits, mask)`, void left out.

    Balanced class weights count pixels (Badrinarayanan et al. 2015, "SegNet", section 4, has the median in the place of
    the mean).

    `head=auto` unpools where 2x2 max-poolings halve the backbone's maps (VGG, the small CNN), and else repeats values.
    With `views=mirror`, an image is evaluated by the mean logits of itself and its mirror image, mirrored back.
    """

    needs = ("mask",)
    reads = ("mask",)
    monitor: tuple[str, Literal["max", "min"]] = ("mean_iou", "max")

    def __init__(self, loss: Loss, spec: DataSpec, views: Literal["none", "mirror"] = "none"):
        super().__init__(loss, spec)
        self.num_classes = len(spec.mask_classes)
        self._views = views

    @classmethod
    def class_names(cls, spec: DataSpec) -> tuple[str, ...]:
        return spec.mask_classes

    @classmethod
    def class_counts(cls, spec: DataSpec, labels: Tensor | None) -> Tensor | None:
        return None  # a mask has no label

    @classmethod
    def weighed_counts(cls, spec: DataSpec, split: Split) -> Tensor | None:
        """Pixels of each class in all training masks, (classes,) int64, void left out: one pass over the split."""
        counts = torch.zeros(VOID + 1, dtype=torch.int64)
        for rows in torch.arange(len(split)).split(_PIECE):
            counts += torch.bincount(split.fetch(rows)["mask"].flatten(), minlength=VOID + 1).cpu()
        return counts[: len(spec.mask_classes)]

    def own_head(self, model: ConvNet) -> Mapping[str, Any]:
        kind = "UnpoolDecoder" if model.pool_channels and model.unpools else "NearestDecoder"
        return {"_target_": f"cnnlab.heads.{kind}"}

    def losses(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        return self.criteria(outputs["mask"], batch["mask"])

    def measure(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"confusion": confusion(outputs["mask"].argmax(1), batch["mask"], self.num_classes)}

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """`pixel_accuracy`, and `mean_iou` over the classes that occur in target or prediction."""
        counts = sums["confusion"].double()
        correct = counts.diagonal()
        union = counts.sum(0) + counts.sum(1) - correct
        present = union > 0
        return {
            "pixel_accuracy": (correct.sum() / counts.sum()).item(),
            "mean_iou": (correct[present] / union[present]).mean().item(),
        }

    def by_class(self, sums: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        return by_class(sums["confusion"], self.spec.mask_classes)

    def of_samples(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """`iou`, the mean over the classes in the image's target or prediction; `intersection` and `union` (N, classes)
        in pixels; `reliability` of the pixels (see `cnnlab.tasks.metrics`)."""
        target = batch["mask"]
        sure, predicted = outputs["mask"].float().softmax(1).max(1)
        found = overlaps(predicted, target, self.num_classes)
        each = found["intersection"] / found["union"]
        return {
            "iou": each.nanmean(1),
            **found,
            "reliability": reliability(sure, predicted == target, target != VOID),
        }

    def views(self, image: Tensor) -> list[tuple[float, Tensor]]:
        return [(1.0, image)] if self._views == "none" else [(0.5, image), (0.5, image.flip(-1))]

    def merge(self, views: Sequence[tuple[float, Outputs]]) -> Outputs:
        plain, *mirrored = views
        back = [(weight, {**outputs, "mask": outputs["mask"].flip(-1)}) for weight, outputs in mirrored]
        return super().merge([plain, *back])

    def answers(self, outputs: Outputs, top: int = 3) -> list[dict[str, Any]]:
        """As every task's; and of the mask `top`, the classes with the most pixels of the input, each with its `share`
        of them, and `probability`, the mean over the pixels of that of their class."""
        sure, mask = outputs["mask"].float().softmax(1).max(1)
        names, probabilities = self.spec.mask_classes, sure.mean((1, 2)).tolist()
        rows = super().answers(outputs, top)
        for number, row in enumerate(rows):
            counts = torch.bincount(mask[number].flatten(), minlength=self.num_classes)
            order = torch.sort(counts, descending=True, stable=True).indices[: max(1, top)].tolist()
            shares = [{"class": names[c], "share": int(counts[c]) / mask[number].numel()} for c in order if counts[c]]
            row |= {"probability": probabilities[number], "top": shares}
        return rows

    def pictures(self, batch: Batch, outputs: Outputs | None = None) -> dict[str, Tensor]:
        """`inputs` and `masks`; with outputs, `predictions`: image, truth and prediction of each sample, and below
        them the classes' colours."""
        if outputs is None:
            return {**super().pictures(batch), "masks": grid(self._painted(batch["mask"][:16]), 8)}
        masks = (batch["mask"], self.predictions(outputs)["mask"])
        cells = beside(stretched(batch["image"]), *map(self._painted, masks))
        picture = grid(cells, columns=max(1, min(4, 1024 // cells.shape[3])), gap=4)
        return {"predictions": above(picture, legend(self.spec.mask_classes, picture.shape[2]))}

    def _painted(self, mask: Tensor) -> Tensor:
        return enlarged(coloured(mask, self.num_classes), 64)
