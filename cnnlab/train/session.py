"""The session around a run's loop: signals are heard, the status is kept, and the listeners learn how it ended,
whatever happens."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

from cnnlab.errors import DivergedError, InterruptedRun, RolledBack
from cnnlab.machine.interrupts import answered_by, raises, watcher
from cnnlab.runs.folder import in_words

if TYPE_CHECKING:
    from cnnlab.train.run import Run

_log = logging.getLogger(__name__)


@contextmanager
def session(run: Run) -> Iterator[None]:
    """One session of a run, in which its folder is nobody else's.

    Raises `DiskError` if a completed run cannot be recorded as such.
    """
    with nullcontext() if run.folder is None or not run.is_main else run.folder.claimed():
        run.clock.wall.start()
        record_status(run, "running")
        error: BaseException | None = None
        try:
            with _signals(run):
                run.tell("on_start")
                run.checkpointer.begin(run)
                yield
        except BaseException as caught:
            error = caught
            raise
        finally:
            run.clock.wall.stop()
            run.clock.training.stop()
            _finish(run, error)


def record_status(run: Run, status: str, reason: str | None = None) -> None:
    """Tells `run.json` how far the run is, and what became of it."""
    if run.folder is None or not run.is_main:
        return
    clock = run.clock
    run.folder.update(
        status=status,
        reason="early stopping" if status == "completed" and run.stopped_early else reason,
        steps=clock.step,
        epochs=clock.epoch,
        seconds=round(clock.wall.seconds, 3),
        images_per_second=clock.images_per_second,
        metrics=run.metrics,
        best=run.selection.as_record(),
        statistics=run.observer.describe(),
    )


def _finish(run: Run, error: BaseException | None) -> None:
    """Says how the run ended, to its folder and to the listeners; nothing that fails here hides what ended it."""
    status, reason = _status_of(error)
    if status == "failed" and run.folder is not None and run.is_main and in_words(error) is None:
        run.folder.write_traceback(error)
    refused: OSError | None = None
    try:
        record_status(run, status, reason)
    except OSError as caught:
        refused = caught
    ends = [lambda listener=listener: listener.on_end(run, error or refused) for listener in run.listeners]
    for end in [run.observer.drain, *ends]:
        try:
            end()
        except OSError as caught:
            if error is None and refused is None:
                _log.warning("%s", caught)
    if refused is not None and error is None:
        with suppress(OSError):  # shorter, it may still fit
            record_status(run, "failed", str(refused))
        raise refused


def _status_of(error: BaseException | None) -> tuple[str, str | None]:
    if error is None:
        return "completed", None
    if isinstance(error, InterruptedRun | KeyboardInterrupt):
        return "interrupted", str(error) or "stopped at once; the last checkpoint stands"
    if isinstance(error, DivergedError):
        return "interrupted" if isinstance(error, RolledBack) else "diverged", str(error)
    return "failed", in_words(error) or f"{type(error).__name__}: {error}"


@contextmanager
def _signals(run: Run) -> Iterator[None]:
    """The first SIGINT, SIGTERM or SIGHUP asks the run to stop at the next step; a second Ctrl-C stops at once, and so
    does the first one while there is nothing to save."""
    began = run.clock.step

    def ask(number: int, frame: Any) -> None:
        if (run.interrupted_by and number == signal.SIGINT) or not answers():
            raises(number, frame)
        run.interrupted_by = number

    def answers() -> bool:
        """Before its first update a session has nothing to save, and that one may compile for minutes; after the last
        checkpoint neither. With other processes, all stop at the same step."""
        return run.ranks.world > 1 or (run.clock.step > began and not run.saved)

    with watcher.answered(answers), answered_by(ask):
        yield
