"""The sinks of an ordinary run."""

from __future__ import annotations

from typing import Any, TextIO

from cnnlab.rundir import RunDir
from cnnlab.sinks.console import Console
from cnnlab.sinks.samples import SamplePictures
from cnnlab.sinks.tensorboard import TensorBoard


def attach(run: Any, folder: RunDir, stream: TextIO) -> Console:
    """Lets a console on `stream` and TensorBoard listen to the run; returns the console.

    They go before the checkpointer, which comes last.
    """
    console = Console(stream, live=run.trainer.progress)
    board = TensorBoard(folder.tensorboard)
    pictures = [SamplePictures(board)] if run.config["stats"]["pictures"] else []
    run.listeners[-1:-1] = [console, board, *pictures]
    return console
