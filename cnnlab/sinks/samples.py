"""Sample pictures: what the network gets, and what it makes of it."""

from __future__ import annotations

from typing import Any

from cnnlab.protocols import Listener
from cnnlab.sinks.tensorboard import TensorBoard


class SamplePictures(Listener):
    """Shows the first training batch, augmented and normalized, when the run starts."""

    def __init__(self, board: TensorBoard):
        self._board = board

    def on_start(self, run: Any) -> None:
        if run.resumed:
            return
        with run.observer.overhead.charging():
            batch, _ = run.loaders["train"].first()
            self._board.pictures(run.task.pictures(batch, None))
