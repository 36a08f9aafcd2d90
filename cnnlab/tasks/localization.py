"""Classification with localization: what is in the image, and the box around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from cnnlab.protocols import Batch, ConvNet, DataSpec, Loss, Outputs
from cnnlab.schema import NonNegative, Positive
from cnnlab.tasks.boxes import giou_loss, has_area, iou, mirrored, mse_loss, shifted, smooth_l1_loss
from cnnlab.tasks.classification import Classification, hard
from cnnlab.tasks.metrics import confusion
from cnnlab.tasks.pictures import RIGHT, TRUTH, WRONG, boxed, captioned, framed, grid, stretched

_MOVED, _FLIPPED = (0, 0, 1, 1, -1, -1), (False, True) * 3
"""Pixels to the right and down by which each of `Classification.views` is moved, and whether it is mirrored after."""
FOUND = 0.5
"""The IoU from which on an object counts as found (Russakovsky et al. 2015, "ImageNet", section 4.2)."""


class Localization(Classification):
    """Minimizes `class_weight * loss(logits, label) + mse * box_mse + smooth_l1 * box_smooth_l1 + giou * box_giou`.

    Each part is recorded by its name (`class`, `box_mse`, ...) before its weight; one of weight 0 is not computed. The
    parts: the mean over the four sides, in [0, 1] of width and height, of the squared error, and of the smooth L1 loss
    with `beta` (Girshick 2015, equation 3); and 1 - GIoU (Rezatofighi et al. 2019).

    A sample whose object augmentation has moved out of the frame has a box without area. It teaches its class, as it
    does in classification; its box counts in no loss and no metric, and `outside` is the share of such samples.

    `head=auto` is `head=box`. `views` as in `Classification`; each view's box is moved back before they are averaged.

    Raises:
        ValueError: no loss of the box has a weight.
    """

    needs = ("label", "box")
    reads = ("logits", "box")
    monitor: tuple[str, Literal["max", "min"]] = ("accuracy_at_iou_50", "max")

    def __init__(
        self,
        loss: Loss,
        spec: DataSpec,
        class_weight: NonNegative = 1.0,
        mse: NonNegative = 0.0,
        smooth_l1: NonNegative = 1.0,
        giou: NonNegative = 1.0,
        beta: Positive = 0.1,
        aux_weight: NonNegative = 0.4,
        views: Literal["none", "mirror", "mirror_translate"] = "none",
    ):
        super().__init__(loss, spec, aux_weight, views)
        self.beta = beta
        self.boxes = {"box_mse": mse, "box_smooth_l1": smooth_l1, "box_giou": giou}
        if not any(self.boxes.values()):
            raise ValueError("expected a weight above 0 for a loss of the box, received none; type task.giou=1")
        classes = {"class": 1.0, **self.weights}
        self.weights = {name: class_weight * weight for name, weight in classes.items()} | self.boxes

    def own_head(self, model: ConvNet) -> Mapping[str, Any]:
        return {"_target_": "cnnlab.heads.BoxHead"}

    def losses(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        parts = {"class" if name == "main" else name: part for name, part in super().losses(outputs, batch).items()}
        box, target = outputs["box"], batch["box"]
        there = has_area(target)
        computed = {
            "box_mse": lambda: mse_loss(box, target),
            "box_smooth_l1": lambda: smooth_l1_loss(box, target, self.beta),
            "box_giou": lambda: giou_loss(box, target),
        }
        return parts | {
            name: torch.where(there, computed[name](), 0.0) for name, weight in self.boxes.items() if weight
        }

    def measure(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """`confusion`; and by class, (classes,) each: `box_count` of those that have a box, the sum of their `box_iou`,
        and `box_found`, how many have the right class and an IoU of .5 or more."""
        label, predicted = hard(batch["label"]), outputs["logits"].argmax(1)
        there = has_area(batch["box"])
        overlap = iou(outputs["box"].clamp(0, 1), batch["box"])
        found = there & (overlap >= FOUND) & (predicted == label)
        # A sum over a matrix is the same on every device each time; adding into places is not.
        member = label[:, None] == torch.arange(self.spec.num_classes, device=label.device)
        return {
            "confusion": confusion(predicted, label, self.spec.num_classes),
            "box_count": (member & there[:, None]).sum(0),
            "box_iou": (member * (overlap * there)[:, None]).sum(0),
            "box_found": (member & found[:, None]).sum(0),
        }

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Those of `Classification`; `mean_iou` of predicted and true box; `accuracy_at_iou_50`, the share with the
        right class and an IoU of .5 or more (1 less ImageNet's localization error, of the first guess); `outside`."""
        count, samples = sums["box_count"].sum(), sums["confusion"].sum()
        return {
            **super().metrics(sums),
            "mean_iou": (sums["box_iou"].sum() / count).item(),
            "accuracy_at_iou_50": (sums["box_found"].sum() / count).item(),
            "outside": (1 - count / samples).item(),
        }

    def by_class(self, sums: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """As in classification, but that `iou` is the mean of the class's boxes; and `found`, the share of them with
        the right class and an IoU of .5 or more. A rate of nothing is `None`."""
        count = sums["box_count"].double()
        rates = {"iou": sums["box_iou"] / count, "found": sums["box_found"] / count}
        return [
            row | {name: None if rate[number].isnan() else rate[number].item() for name, rate in rates.items()}
            for number, row in enumerate(super().by_class(sums))
        ]

    def of_samples(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        overlap = iou(outputs["box"].float().clamp(0, 1), batch["box"])
        return {
            **super().of_samples(outputs, batch),
            "iou": torch.where(has_area(batch["box"]), overlap, torch.nan),
        }

    def merge(self, views: Sequence[tuple[float, Outputs]]) -> Outputs:
        """The weighted mean; each box is first moved back from its view into the image."""
        height, width = self.spec.size
        back = []
        for (weight, outputs), pixels, flipped in zip(views, _MOVED, _FLIPPED, strict=False):
            box = outputs["box"].float()
            box = mirrored(box) if flipped else box
            back.append((weight, {**outputs, "box": shifted(box, -pixels / width, -pixels / height)}))
        return super().merge(back)

    def predictions(self, outputs: Outputs) -> dict[str, Tensor]:
        """As every task's; the box is cut at the image's edges."""
        found = super().predictions(outputs)
        return {**found, "box": found["box"].clamp(0, 1)}

    def pictures(self, batch: Batch, outputs: Outputs | None = None) -> dict[str, Tensor]:
        """`inputs`, and `boxes`: the same with their true boxes; with outputs, `predictions`: the true box in white,
        the predicted one in the colour of the frame, green where the class is right and red where not; below them the
        class, and what was predicted with its probability and the boxes' IoU."""
        cells = stretched(batch["image"][:16] if outputs is None else batch["image"], 96)
        if outputs is None:
            shown = boxed(cells, batch["box"][:16], [TRUTH] * len(cells))
            return {**super().pictures(batch), "boxes": grid(shown, 8)}
        predicted = self.predictions(outputs)
        truth, guess = hard(batch["label"]).tolist(), predicted["label"].tolist()
        colours = [RIGHT if right == told else WRONG for right, told in zip(truth, guess, strict=True)]
        cells = boxed(boxed(cells, batch["box"], [TRUTH] * len(cells)), predicted["box"], colours)
        overlap, sure = iou(predicted["box"], batch["box"]).tolist(), predicted["probability"].tolist()
        names = self.spec.classes
        captions = [
            (names[t], f"{p:.2f} {names[g]}", f"IoU {o:.2f}")
            for t, g, p, o in zip(truth, guess, sure, overlap, strict=True)
        ]
        return {"predictions": grid(captioned(framed(cells, colours), captions), 8)}
