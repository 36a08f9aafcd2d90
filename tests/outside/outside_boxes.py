"""A task and its head from outside: the class of an image, and the box of what is in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from cnnlab.protocols import Batch, ConvNet, DataSpec, Features, Head, Loss, Outputs
from cnnlab.schema import NonNegative, PositiveInt
from cnnlab.tasks.classification import Classification


class ClassAndBox(Classification):
    """Minimizes the weighted sum of the class's loss and of the squared error of the box's corners."""

    needs = ("label", "box")
    reads = ("logits", "box")

    def __init__(self, loss: Loss, spec: DataSpec, weights: Mapping[str, NonNegative], views: str = "none"):
        super().__init__(loss, spec, views=views)  # type: ignore[arg-type]
        self.weights = dict(weights)

    def own_head(self, model: ConvNet) -> Mapping[str, object]:
        return {"_target_": "outside_boxes.BoxHead"}

    def losses(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        box = mse_loss(outputs["box"], batch["box"], reduction="none").mean(1)
        return {"class": self.criterion(outputs["logits"], batch["label"]), "box": box}

    def measure(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        error = (outputs["box"] - batch["box"]).abs().mean(1).sum()
        return {**super().measure(outputs, batch), "box_error": error}

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return {**super().metrics(sums), "box_error": (sums["box_error"] / sums["confusion"].sum()).item()}

    def merge(self, views: Sequence[tuple[float, Outputs]]) -> Outputs:
        """A mirrored view's box is mirrored back."""
        plain, *mirrored = views
        back = []
        for weight, outputs in mirrored:
            x1, y1, x2, y2 = outputs["box"].unbind(1)
            back.append((weight, {**outputs, "box": torch.stack([1 - x2, y1, 1 - x1, y2], 1)}))
        return super().merge([plain, *back])


class BoxHead(Head):
    """The corners (x1, y1, x2, y2) in [0, 1] from the last map, whole."""

    gives = ("box",)

    def __init__(self, stage_channels: tuple[int, ...], hidden: PositiveInt = 32):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.layers = nn.Sequential(nn.Linear(16 * stage_channels[-1], hidden), nn.ReLU(), nn.Linear(hidden, 4))

    def forward(self, features: Features) -> dict[str, Tensor]:
        return {"box": self.layers(self.pool(features.stages[-1]).flatten(1)).sigmoid()}
