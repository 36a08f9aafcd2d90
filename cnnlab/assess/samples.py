"""What is known of each sample of a split, gathered while it is evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cnnlab.assess.calibration import Calibration, calibration, of_bins
from cnnlab.protocols import Batch, Outputs
from cnnlab.tasks import Task


class Samples:
    """Listens to an evaluation (`Opened.summed`); nothing is brought from the device before it is asked for."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._parts: list[dict[str, Tensor]] = []
        self._found: dict[str, Tensor] | None = None

    def __call__(self, batch: Batch, outputs: Outputs, losses: Tensor) -> None:
        self._parts.append({"index": batch["index"], "loss": losses.detach(), **self._task.of_samples(outputs, batch)})

    @property
    def found(self) -> dict[str, Tensor]:
        """(N, ...) by name, on the CPU: `index` in the split, `loss`, and the task's `of_samples`."""
        if self._found is None:
            names = self._parts[0] if self._parts else {}
            self._found = {name: torch.cat([part[name] for part in self._parts]).cpu() for name in names}
            self._parts = []
        return self._found

    def hardest(self, count: int) -> Tensor:
        """The rows of the highest losses, the highest first; NaN before all others, equal ones in their order."""
        losses = self.found["loss"].nan_to_num(nan=torch.inf)
        return losses.sort(descending=True, stable=True).indices[:count]

    def calibration(self) -> Calibration | None:
        """Of the classes, or of the pixels; `None` for a task that is never sure of anything."""
        found = self.found
        if "reliability" in found:
            return of_bins(found["reliability"])
        if {"label", "predicted", "probability"} <= found.keys():
            return calibration(found["probability"], found["predicted"] == found["label"])
        return None

    def described(self, rows: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Of single samples `index`, `loss`, and what the task tells: `label` and `predicted` by name, `probability`,
        `iou`."""
        found, told = self.found, []
        for row in rows.tolist():
            one: dict[str, Any] = {"index": int(found["index"][row]), "loss": found["loss"][row].item()}
            for name in ("label", "predicted"):
                if name in found:
                    one[name] = classes[int(found[name][row])]
            for name in ("probability", "iou"):
                if name in found:
                    one[name] = found[name][row].item()
            told.append(one)
        return told
