"""Saves a run so that it can go on: when it starts, at every epoch's end, now and then inside one, and when it is
interrupted."""

from __future__ import annotations

import signal
import time

from cnnlab import checkpoint
from cnnlab.errors import InterruptedRun
from cnnlab.protocols import Listener, StepResult
from cnnlab.train.run import Run

_DUE = 1 << 10
"""A flag above every signal's number: a checkpoint is due, on all ranks at the same step."""


class Checkpointer(Listener):
    """Writes `last.pt` and `best.pt`, selects by the monitored metric, and ends an interrupted run.

    It comes last among the listeners: what the others keep in the State is complete by then.
    """

    def __init__(self, *, enabled: bool, minutes: float):
        self.enabled = enabled
        self._seconds = 60 * minutes
        self._saved_at = time.monotonic()

    def on_start(self, run: Run) -> None:
        if run.folder is not None and run.is_main:
            checkpoint.remove_torn(run.folder.last)
        if not run.resumed:
            self._save(run)

    def on_step(self, run: Run, result: StepResult) -> None:
        due = self.enabled and time.monotonic() - self._saved_at >= self._seconds
        wish = run.ranks.any(run.interrupted_by or (_DUE if due else 0))
        if wish:
            self._save(run)
        if wish and wish != _DUE:
            raise InterruptedRun(self._farewell(run, wish), wish)

    def on_epoch(self, run: Run, figures: dict[str, float]) -> None:
        better = False
        if figures:
            value = figures[f"val/{run.selection.metric}"]
            better = run.selection.offer(value, -(-run.clock.step // run.steps_per_epoch))
            if hasattr(run.schedule, "observe"):
                run.schedule.observe(value, run.selection.direction)
        self._save(run, best=better)
        wish = run.ranks.any(run.interrupted_by)
        if wish:
            raise InterruptedRun(self._farewell(run, wish), wish)

    def on_trained(self, run: Run) -> None:
        """The test split is evaluated with the checkpoint that val chose."""
        folder = run.folder
        if not self.enabled or folder is None:
            return
        state = checkpoint.load(folder.best) if run.is_main and folder.best.exists() else None
        parts = ("model",) if run.ema is None else ("model", "ema")
        chosen = run.ranks.share(None if state is None else {name: state[name] for name in parts})
        if chosen is not None:
            run.state.load_state_dict(chosen, only=parts)

    def _save(self, run: Run, *, best: bool = False) -> None:
        self._saved_at = time.monotonic()
        if not self.enabled:
            return
        run.tell("on_save")
        if run.folder is not None and run.is_main:
            paths = [run.folder.best, run.folder.last] if best else [run.folder.last]
            checkpoint.save(run.state.state_dict(), *paths)
        run.ranks.wait()

    def _farewell(self, run: Run, number: int) -> str:
        where = f"at step {run.clock.step} of {run.total_steps}"
        name = signal.Signals(number).name
        if not self.enabled or run.folder is None:
            return f"interrupted by {name} {where}; nothing was saved (trainer.checkpoint=false)"
        return f"interrupted by {name} {where}; saved. Go on with: cnnlab train resume={run.folder.path}"
