"""Sample pictures: what the network gets, and what it makes of it."""

from __future__ import annotations

from typing import Any

from cnnlab.protocols import Listener
from cnnlab.sinks.tensorboard import TensorBoard

SHOWN = 16
"""Images of val that are shown with what the network makes of them, from all over the split."""


class SamplePictures(Listener):
    """Shows the first training batch, augmented and normalized, when the run starts; and a few images of val with what
    the network makes of them, after the first evaluation, each that comes twice as late as the last one shown, and the
    last: a longer run has a few pictures more."""

    def __init__(self, board: TensorBoard):
        self._board = board
        self._next = 1
        """The epoch from which on the next evaluation is shown."""

    def on_start(self, run: Any) -> None:
        if run.resumed:
            return
        with run.observer.overhead.charging():
            batch, _ = run.loaders["train"].images.first()
            self._board.pictures(run.task.pictures(batch))

    def on_epoch(self, run: Any, figures: dict[str, float]) -> None:
        epoch = -(-run.clock.step // run.steps_per_epoch)
        if not figures or not (run.finished() or epoch >= self._next):
            return
        self._next = 2 * epoch
        with run.observer.overhead.charging():
            batch = run.loaders["val"].images.some(SHOWN)
            with run.evaluating():
                outputs = run.forward.outputs(batch["image"])
            self._board.pictures(run.task.pictures(batch, outputs), run.clock.step)
