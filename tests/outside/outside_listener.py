"""A listener from outside: it counts the updates and tells a picture of how many there were."""

from __future__ import annotations

from typing import Any

import torch

from cnnlab.protocols import Listener, StepResult


class Bar(Listener):
    """A white bar, a pixel an update."""

    def __init__(self, height: int = 8):
        self.height = height
        self.updates = 0

    def on_step(self, run: Any, result: StepResult) -> None:
        self.updates += 1

    def on_epoch(self, run: Any, figures: dict[str, float]) -> None:
        bar = torch.full((3, self.height, self.updates), 255, dtype=torch.uint8)
        run.tell("on_pictures", {"updates/bar": bar}, run.clock.step)
