"""The sinks of an ordinary run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, TextIO

from torch import Tensor

from cnnlab.protocols import Listener
from cnnlab.runs.folder import RunDir
from cnnlab.sinks.console import Console
from cnnlab.sinks.samples import SamplePictures
from cnnlab.sinks.tensorboard import TensorBoard

_log = logging.getLogger(__name__)


class Unfailing(Listener):
    """Passes on what happens to a listener that only shows it, and goes on without it if it fails: no fault of a
    display, and nothing that a terminal answers, is a reason to end a training.

    Args:
        what: it is, for the message.
    """

    def __init__(self, inner: Listener, what: str = "the display"):
        self._inner: Listener | None = inner
        self._what = what

    def _pass_on(self, event: str, *arguments: Any) -> None:
        if self._inner is None:
            return
        try:
            getattr(self._inner, event)(*arguments)
        except Exception as error:
            self._inner = None
            _log.warning("%s failed (%s: %s); the run goes on without it", self._what, type(error).__name__, error)

    def restored(self) -> list[str]:
        return [] if self._inner is None else self._inner.restored()

    def on_start(self, run: Any) -> None:
        self._pass_on("on_start", run)

    def on_step(self, run: Any, result: Any) -> None:
        self._pass_on("on_step", run, result)

    def on_notice(self, run: Any, text: str) -> None:
        self._pass_on("on_notice", run, text)

    def on_record(self, run: Any, record: dict[str, Any]) -> None:
        self._pass_on("on_record", run, record)

    def on_stats(self, run: Any, record: dict[str, Any]) -> None:
        self._pass_on("on_stats", run, record)

    def on_epoch(self, run: Any, figures: dict[str, float]) -> None:
        self._pass_on("on_epoch", run, figures)

    def on_pictures(self, run: Any, pictures: Mapping[str, Tensor], step: int) -> None:
        self._pass_on("on_pictures", run, pictures, step)

    def on_save(self, run: Any) -> None:
        self._pass_on("on_save", run)

    def on_trained(self, run: Any) -> None:
        self._pass_on("on_trained", run)

    def on_end(self, run: Any, error: BaseException | None) -> None:
        self._pass_on("on_end", run, error)


def attach(run: Any, folder: RunDir, stream: TextIO) -> Console:
    """Lets a console on `stream` and TensorBoard listen to the run; returns the console."""
    console = Console(stream, live=run.trainer.progress)
    shown = Unfailing(console)
    board = TensorBoard(folder.tensorboard)
    pictures = [SamplePictures(board)] if run.experiment.stats.pictures else []
    run.listeners += [shown, board, *pictures]
    return console
