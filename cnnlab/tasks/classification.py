"""Image classification: one label an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional

from cnnlab.protocols import Batch, DataSpec, Loss, Outputs
from cnnlab.schema import NonNegative
from cnnlab.tasks.base import Task
from cnnlab.tasks.metrics import by_class, confusion
from cnnlab.tasks.pictures import RIGHT, WRONG, captioned, framed, grid, stretched


class Classification(Task):
    """Minimizes `loss(logits, label)`, plus `aux_weight` times that of a second output where there is one, as `aux`
    beside `main`.

    `aux_weight` follows Szegedy et al. 2015 (0.4 in the reference implementation of Inception v3; the earlier
    GoogLeNet used 0.3).

    `views` is test-time augmentation: an image is evaluated by the mean logits of several views of it. `mirror`:
    itself and its mirror image; `mirror_translate`: these with weight 1/2, and with 1/2 both again, shifted by a
    pixel up-left and down-right, reflected at the border (Jordan 2024, arXiv 2404.00498, section 3.5).
    """

    needs: tuple[str, ...] = ("label",)
    reads: tuple[str, ...] = ("logits",)
    monitor: tuple[str, Literal["max", "min"]] = ("accuracy", "max")

    def __init__(
        self,
        loss: Loss,
        spec: DataSpec,
        aux_weight: NonNegative = 0.4,
        views: Literal["none", "mirror", "mirror_translate"] = "none",
    ):
        super().__init__(loss, spec, {"aux": aux_weight})
        self._views = views

    def views(self, image: Tensor) -> list[tuple[float, Tensor]]:
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

    def losses(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        main = self.criteria(outputs["logits"], batch["label"])
        return main | ({"aux": self.criterion(outputs["aux"], batch["label"])} if "aux" in outputs else {})

    def measure(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"confusion": confusion(outputs["logits"].argmax(1), hard(batch["label"]), self.spec.num_classes)}

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

    def of_samples(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        sure, predicted = outputs["logits"].float().softmax(1).max(1)
        return {"label": hard(batch["label"]), "predicted": predicted, "probability": sure}

    def pictures(self, batch: Batch, outputs: Outputs | None = None) -> dict[str, Tensor]:
        """`inputs`; with outputs, `predictions`: below each image its class, the predicted one and its probability."""
        if outputs is None:
            return super().pictures(batch)
        predicted = self.predictions(outputs)
        truth, guess = hard(batch["label"]).tolist(), predicted["label"].tolist()
        names, sure = self.spec.classes, predicted["probability"].tolist()
        frames = [RIGHT if right == told else WRONG for right, told in zip(truth, guess, strict=True)]
        captions = [(names[t], f"{p:.2f} {names[g]}") for t, g, p in zip(truth, guess, sure, strict=True)]
        return {"predictions": grid(captioned(framed(stretched(batch["image"], 96), frames), captions), 8)}


def hard(label: Tensor) -> Tensor:
    """(N,) int64; a mixed label (N, classes) counts as its larger share."""
    return label if label.ndim == 1 else label.argmax(1)
