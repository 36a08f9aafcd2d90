"""Saves a run so that it can go on: when it starts, at every epoch's end, now and then inside one, and when it is
interrupted."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cnnlab.errors import CheckpointError, InterruptedRun
from cnnlab.machine.copies import on_cpu
from cnnlab.runs import checkpoint
from cnnlab.runs.folder import write_atomically
from cnnlab.train.origin import chosen, is_chosen, load_own

if TYPE_CHECKING:
    from cnnlab.train.run import Run

_DUE = 1 << 10
"""A flag above every signal's number: a checkpoint is due, on all ranks at the same step."""


class Checkpointer:
    """Writes `last.pt` and `best.pt`, and ends an interrupted run.

    The run calls it after its listeners: what they keep in the State is complete by then. Where there is no file for
    the best weights (a run from Python without a folder, `trainer.checkpoint=false`), they are kept in memory.

    Args:
        enabled: whether anything is written.
        minutes: between two checkpoints inside an epoch.
    """

    def __init__(self, *, enabled: bool, minutes: float):
        self.enabled = enabled
        self._seconds = 60 * minutes
        self._best: dict[str, Any] | None = None
        """The best weights so far that are in no file, on rank 0's CPU."""
        self._saved_at = time.monotonic()
        self._vote: Callable[[], int] = lambda: 0

    def begin(self, run: Run) -> None:
        """The first checkpoint of a run; or its files made whole, where a kill left a part of them."""
        if not run.resumed:
            self.save(run)
        elif run.folder is not None and run.is_main and self.enabled:
            self._complete(run)

    def _complete(self, run: Run) -> None:
        """Writes the best checkpoint of a run that was killed between its two files: the last one is the same."""
        folder, selection = run.folder, run.selection
        assert folder is not None
        if selection.step != run.clock.step or not run.clock.closed:
            return
        with suppress(CheckpointError):
            if is_chosen(load_own(folder, "best", run.config), selection.state_dict()):
                return
        write_atomically(folder.best, folder.last.read_bytes())

    def after_step(self, run: Run) -> None:
        """A checkpoint where one is due. Raises `InterruptedRun` where the run was asked to stop."""
        due = self.enabled and time.monotonic() - self._saved_at >= self._seconds
        vote = run.ranks.vote(run.interrupted_by or (_DUE if due else 0))
        if run.ranks.world > 1:  # counted a step later, so that no rank waits for the others here
            vote, self._vote = self._vote, vote
        wish = vote()
        if wish:
            self.save(run)
            self._stop_for(run, wish)

    def stop(self, run: Run) -> None:
        """Between two updates, when the next batch does not come. Raises `InterruptedRun`."""
        self.save(run)
        self._stop_for(run, run.interrupted_by)

    def can_return(self, run: Run) -> bool:
        """Whether there is a checkpoint to go back to; on all ranks alike."""
        return self.enabled and run.folder is not None

    def back(self, run: Run, *, returned: int) -> int:
        """Makes the last checkpoint one that has been returned to, so that whoever goes on with it, now or after a
        kill, does so at the smaller rate. Returns its step."""
        assert run.folder is not None
        step = 0
        if run.is_main:
            state = checkpoint.load(run.folder.last)
            state["clock"]["returned"] = returned
            checkpoint.save(state, run.folder.last)
            step = state["clock"]["step"]
        return run.ranks.share(step)

    def after_epoch(self, run: Run, *, best: bool) -> None:
        """The checkpoint of an epoch. Raises `InterruptedRun` where the run was asked to stop.

        Args:
            best: whether its weights are the best so far.
        """
        self.save(run, best=best)
        self._stop_for(run, run.ranks.any(run.interrupted_by))

    def require(self, run: Run, best: Mapping[str, Any]) -> None:
        """Raises `CheckpointError` where the best checkpoint does not hold what `take_best` is to take from it."""
        run.state.require(best, None if run.folder is None else run.folder.best, only=_evaluated(run))

    def take_best(self, run: Run) -> None:
        """Gives the network the weights that val chose, with which the test split is evaluated."""
        run.saved = True
        best = run.ranks.share(self._chosen(run) if run.is_main else None)
        if best is not None:
            run.state.load_state_dict(best, only=tuple(best))

    def _chosen(self, run: Run) -> dict[str, Any] | None:
        """The best weights, from memory or from their file; `None` where no evaluation gave a best one.

        Raises `CheckpointError` where the file is not that of the evaluation that chose it.
        """
        if self._best is not None or run.folder is None:
            return self._best
        state = chosen(run.folder, run.config, run.selection.state_dict(), None)
        return None if state is None else {name: state[name] for name in ("origin", *_evaluated(run))}

    def save(self, run: Run, *, best: bool = False) -> None:
        """Writes what there is. Raises `DivergedError` rather than to overwrite what did not diverge."""
        self._saved_at = time.monotonic()
        pending = self._vote()
        self._vote = lambda: 0 if pending == _DUE else pending
        if best and run.is_main:
            in_file = self.enabled and run.folder is not None
            state = run.state.state_dict(only=_evaluated(run))
            self._best = None if in_file else on_cpu(state)
        if not self.enabled:
            return
        run.complete_state()
        if run.folder is not None and run.is_main:
            # In this order: killed between the two, the last one stands in for the best (`_complete`).
            paths = [run.folder.last, run.folder.best] if best else [run.folder.last]
            checkpoint.save(run.state.state_dict(), *paths)
        run.ranks.wait()

    def _stop_for(self, run: Run, wish: int) -> None:
        if wish in (0, _DUE):
            return
        where = f"interrupted by {signal.Signals(wish).name} at step {run.clock.step} of {run.total_steps}"
        if not self.enabled or run.folder is None:
            raise InterruptedRun(f"{where}; nothing was saved (trainer.checkpoint=false)", wish)
        raise InterruptedRun(f"{where}; saved. Go on with: cnnlab train resume={run.folder.path}", wish)


def _evaluated(run: Run) -> tuple[str, ...]:
    """The parts of the State that make the network as it is evaluated."""
    return ("model", *run.interventions.of_evaluation())
