"""Saves a run so that it can go on: when it starts, at every epoch's end, now and then inside one, and when it is
interrupted."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor

from cnnlab.errors import CheckpointError, InterruptedRun
from cnnlab.protocols import Listener, StepResult
from cnnlab.runs import checkpoint
from cnnlab.runs.folder import write_atomically
from cnnlab.train.origin import chosen, is_chosen, load_own
from cnnlab.train.run import Run

_DUE = 1 << 10
"""A flag above every signal's number: a checkpoint is due, on all ranks at the same step."""
_TELL_AT_LEAST, _TELL_AT_MOST = 1.0, 30.0
"""Seconds from one progress note to the next."""


class Progress(Listener):
    """Keeps `steps` in `run.json` true while the run goes on, for whoever reads it, also after a kill.

    What it says is half of what is done, at least, and at most half a minute old: the intervals grow with the run.
    """

    def __init__(self) -> None:
        self._began = self._told_at = time.monotonic()

    def on_start(self, run: Run) -> None:
        self._began = self._told_at = time.monotonic()

    def on_step(self, run: Run, result: StepResult) -> None:
        now = time.monotonic()
        if now - self._told_at >= min(_TELL_AT_MOST, max(_TELL_AT_LEAST, self._told_at - self._began)):
            self._told_at = now
            with suppress(OSError):  # a full disk: what must be written says so
                run.record_progress()


class Checkpointer(Listener):
    """Writes `last.pt` and `best.pt`, selects by the monitored metric, and ends an interrupted run.

    It comes last among the listeners: what the others keep in the State is complete by then. Where there is no file
    for the best weights (a run from Python without a folder, `trainer.checkpoint=false`), they are kept in memory.
    """

    def __init__(self, *, enabled: bool, minutes: float):
        self.enabled = enabled
        self._seconds = 60 * minutes
        self._best: dict[str, Any] | None = None
        """The best weights so far that are in no file, on rank 0's CPU."""
        self._saved_at = time.monotonic()
        self._vote: Callable[[], int] = lambda: 0

    def on_start(self, run: Run) -> None:
        if not run.resumed:
            self._save(run)
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

    def on_step(self, run: Run, result: StepResult) -> None:
        due = self.enabled and time.monotonic() - self._saved_at >= self._seconds
        vote = run.ranks.vote(run.interrupted_by or (_DUE if due else 0))
        if run.ranks.world > 1:  # counted a step later, so that no rank waits for the others here
            vote, self._vote = self._vote, vote
        wish = vote()
        if wish:
            self._save(run)
            self._stop_for(run, wish)

    def on_stop(self, run: Run) -> None:
        self._save(run)
        self._stop_for(run, run.interrupted_by)

    def on_epoch(self, run: Run, figures: dict[str, float]) -> None:
        better = False
        if figures:
            value = figures[f"val/{run.selection.metric}"]
            better = run.selection.offer(value, **run.place())
            if hasattr(run.schedule, "observe"):
                run.schedule.observe(value, run.selection.direction)
        self._save(run, best=better)
        self._stop_for(run, run.ranks.any(run.interrupted_by))

    def on_trained(self, run: Run) -> None:
        """The test split is evaluated with the weights that val chose."""
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

    def _save(self, run: Run, *, best: bool = False) -> None:
        self._saved_at = time.monotonic()
        pending = self._vote()
        self._vote = lambda: 0 if pending == _DUE else pending
        if best and run.is_main:
            in_file = self.enabled and run.folder is not None
            state = run.state.state_dict(only=_evaluated(run))
            self._best = None if in_file else _on_cpu(state)
        if not self.enabled:
            return
        run.tell("on_save")
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


def _on_cpu(value: Any) -> Any:
    """Nested state with a copy of each tensor, on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {name: _on_cpu(item) for name, item in value.items()}
    return [_on_cpu(item) for item in value] if isinstance(value, list | tuple) else value
