"""A run of a folder as it stood at a checkpoint, for who measures it: nothing is written, nothing goes on."""

from __future__ import annotations

from dataclasses import dataclass

from cnnlab.building.builder import build
from cnnlab.building.opened import weights
from cnnlab.building.reopen import reopened
from cnnlab.building.trial import check
from cnnlab.composing.trust import TYPED, Trust
from cnnlab.machine.resolved import Resolved
from cnnlab.runs.folder import RunDir
from cnnlab.schema import StepKind
from cnnlab.train.run import Run


@dataclass(frozen=True)
class Standing:
    """`checkpoint` says which was taken, `changes` how the data differs from what the run had (empty: not)."""

    run: Run
    checkpoint: str
    changes: str


def standing(folder: RunDir, checkpoint: str = "last", *, device: str | None = None, trust: Trust = TYPED) -> Standing:
    """The run with the weights, the optimizer and the averages of a checkpoint, and with its data; it steps eagerly.

    Args:
        checkpoint: `best` or `last`; of a run that was never evaluated, and so has no best one, the last.
        device: as `trainer.device`; `None` takes the kind that the run had.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or another run's.
        DataError: the data is missing or unusable.
        UsageError: no run folder, or one that names code that nobody vouches for.
    """
    experiment = reopened(folder, trust)
    which, state = weights(folder, checkpoint, experiment.config)
    values = {"trainer.step": StepKind.eager.value, **({} if device is None else {"trainer.device": device})}
    resolved = Resolved.of(state["origin"]["choices"]).eager()
    run = build(check(experiment.with_values(values)), resumed=True, resolved=resolved)
    changes = run.origin.changes(state["origin"], folder.path)
    parts = ("model", "optimizer", "normalize", "clock", *run.interventions.stateful())
    scaler = ("scaler",) if run.step.scaler is not None and "scaler" in state else ()
    run.state.load_state_dict(state, only=(*parts, *scaler), path=folder.path)
    run.listeners.clear()
    return Standing(run, which, changes)
