"""Semantic segmentation: one class a pixel, decoded from a backbone's features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from cnnlab.protocols import Batch, ConvNet, DataSpec, Loss, Outputs
from cnnlab.tasks.base import Task
from cnnlab.tasks.metrics import by_class, confusion
from cnnlab.tasks.pictures import above, beside, coloured, enlarged, grid, legend, stretched


class Segmentation(Task):
    """Minimizes the mean over each image's pixels of `loss(mask logits, mask)`.

    `head=auto` unpools where the backbone hands on its pooling indices, and else repeats values. With `views=mirror`,
    an image is evaluated by the mean logits of itself and its mirror image, mirrored back.
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
        return None  # of pixels, nobody has counted them

    def own_head(self, model: ConvNet) -> Mapping[str, Any]:
        kind = "UnpoolDecoder" if model.pool_channels else "NearestDecoder"
        return {"_target_": f"cnnlab.heads.{kind}"}

    def losses(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"main": self.criterion(outputs["mask"], batch["mask"])}

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

    def views(self, image: Tensor) -> list[tuple[float, Tensor]]:
        return [(1.0, image)] if self._views == "none" else [(0.5, image), (0.5, image.flip(-1))]

    def merge(self, views: Sequence[tuple[float, Outputs]]) -> Outputs:
        plain, *mirrored = views
        back = [(weight, {**outputs, "mask": outputs["mask"].flip(-1)}) for weight, outputs in mirrored]
        return super().merge([plain, *back])

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
