"""What follows from an update that was not finite: the run stops, leaves it out, or goes back to its last checkpoint
(`trainer.on_nonfinite`). And that a loss which cannot move is said early.

The guard of the step (`cnnlab.train.guard`) has kept it out of the weights by then. An update that is left out counts
as one: data, schedule and averages go on as if it had been made, and it has no part in the records.
"""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnlab.errors import DivergedError, RolledBack
from cnnlab.machine.copies import on_cpu
from cnnlab.machine.surroundings import shown_path
from cnnlab.protocols import Batch
from cnnlab.runs import checkpoint
from cnnlab.runs.environment import environment
from cnnlab.schema import OnNonFinite
from cnnlab.train.guard import Seen
from cnnlab.train.steps.replay import Located, locate

if TYPE_CHECKING:
    from cnnlab.train.run import Run

RETURN_RATE = 0.5
"""Of the rate, at each return to a checkpoint."""
STILL = 5
"""Updates in a row without any gradient, after which a loss is said to stand still."""
SAME = 20
"""Updates in a row with one and the same loss: batches differ, and so do their losses."""
AS_GOOD_AS = 5e-7
"""Part of a loss within which another one is the same; the order of a batch's samples changes as much."""
BUNDLE, BUNDLE_VERSION = "cnnlab.nonfinite", 1


class NonFinite:
    """Decides for a run, once a step (`settle`).

    Args:
        how: see `cnnlab.schema.Trainer.on_nonfinite`.
        most: updates left out, or returns, before the run stops.
    """

    def __init__(self, how: OnNonFinite = OnNonFinite.stop, most: int = 10):
        self.how = how
        self.most = most
        self._loss = math.nan
        self._same = self._still = 0
        self._said = False

    @property
    def allowed(self) -> int:
        """Bad updates that the step may leave out while the run goes on."""
        return self.most if self.how is OnNonFinite.skip else 0

    def settle(self, run: Run, *, last: bool = False) -> None:
        """What follows from the updates that the host knows of.

        Args:
            last: waits for the one that was just made, as before a checkpoint.

        Raises:
            DivergedError: the run stops.
            RolledBack: it is to go on from its last checkpoint.
        """
        for seen in run.step.guard.seen(last=last):
            if seen.bad:
                self._bad(run, seen)
            else:
                self._look_whether_it_moves(run, seen)

    def _bad(self, run: Run, seen: Seen) -> None:
        clock = run.clock
        step, what = seen.number + 1, "loss" if not math.isfinite(seen.loss) else "gradient"
        if self.how is OnNonFinite.skip and clock.left_out < self.most:
            clock.left_out += 1
            told = f"step {step}: left out, as its {what} is not finite ({clock.left_out} of at most {self.most})"
            # Later, the weights are others than those that it was made of.
            found = self._located(run, seen)[0] if clock.step == step and run.step.guard.prompt else None
            run.notice(told if found is None else f"{told}: {found.sentence()}")
            self._record(run, seen, "left out", found)
            return
        found, batch = self._located(run, seen)
        where = "" if found is None else f": {found.sentence()}"
        bundle = None if found is None or batch is None else self._bundle(run, seen, found, batch)
        if self.how is OnNonFinite.rollback and clock.returned < self.most and run.checkpointer.can_return(run):
            self._record(run, seen, "rolled back", found)
            back = run.checkpointer.back(run, returned=clock.returned + 1)
            raise RolledBack(
                f"step {step}: its {what} is not finite{where}; back to step {back}, at "
                f"{returned_rate(clock.returned + 1):g} times the rate ({clock.returned + 1} of at most {self.most})"
            )
        self._record(run, seen, "stopped", found)
        raise DivergedError(self._words(run, step, what, where, bundle))

    def _words(self, run: Run, step: int, what: str, where: str, bundle: Path | None) -> str:
        rate = run.last_lr
        often = {
            OnNonFinite.skip: f", after {run.clock.left_out} updates that were left out",
            OnNonFinite.rollback: f", after {run.clock.returned} returns to a checkpoint",
        }.get(self.how, "")
        again = "" if bundle is None else f". To see it again, anywhere: cnnlab replay {shown_path(bundle)}"
        return (
            f"the {what} became non-finite by step {step} (epoch {-(-step // run.steps_per_epoch)}){often}; expected a "
            f"finite {what}{where}. Try a smaller rate (optim.lr={rate / 10:.2g}; it was {rate:.2g} here) or "
            f"trainer.clip_norm=1{again}"
        )

    # ---- once more ----

    def _located(self, run: Run, seen: Seen) -> tuple[Located | None, Batch | None]:
        """Where the update became what it is, and its batch. What fails here does not hide what ended the run."""
        epoch, number = divmod(seen.number, run.steps_per_epoch)
        try:
            with closing(run.loaders["train"].images.batches(epoch, number)) as batches:  # type: ignore[type-var]
                batch, count = next(batches)
            return locate(run.step, batch, count, seen.number), batch
        except (RuntimeError, ValueError, OSError) as error:
            if run.ranks.world > 1:  # the others wait for what this one found
                raise
            run.notice(f"step {seen.number + 1}: it cannot be run once more ({str(error).splitlines()[0]})")
            return None, None

    def _bundle(self, run: Run, seen: Seen, found: Located, batch: Batch) -> Path | None:
        """Writes what the update needs to be run again; on the rank that found it. Returns where it is."""
        if run.folder is None:
            return None
        path = run.folder.nonfinite / f"step-{seen.number + 1}.pt"
        if run.ranks.rank == found.rank:
            stateful = {name: part.state_dict() for name, part in run.interventions.stateful().items()}
            content = {
                "kind": BUNDLE,
                "version": BUNDLE_VERSION,
                "config": run.config,
                "config_dirs": list(run.experiment.config_dirs),
                "origin": run.origin.state_dict(),
                "versions": environment(),
                "model": run.model.state_dict(),
                "interventions": stateful,
                "batch": batch,
                "count": _count(run, seen.number),
                "number": seen.number,
                "epoch": seen.number // run.steps_per_epoch,
                "rank": run.ranks.rank,
                "world": run.ranks.world,
                "accumulate": run.step.accumulate,
                "scale": None if run.step.scaler is None else run.step.scaler.get_scale(),
                "located": found.record(),
            }
            try:
                checkpoint.save(on_cpu(content), path)
            except OSError as error:
                run.notice(f"{error}; the update is not kept")
                return None
        return path

    def _record(self, run: Run, seen: Seen, action: str, found: Located | None) -> None:
        """Keeps it in `run.json`, as `non_finite`."""
        if run.folder is None or not run.is_main:
            return
        event: dict[str, Any] = {"step": seen.number + 1, "action": action, "returned": run.clock.returned}
        if found is not None:
            event["located"] = found.record()
        known = run.folder.read().get("non_finite")
        earlier = [old for old in known if isinstance(old, dict)] if isinstance(known, list) else []
        place = (event["returned"], event["step"])
        before = [old for old in earlier if (old.get("returned", 0), old.get("step", 0)) < place]
        run.folder.update(non_finite=[*before, event])

    # ---- a loss that stands still ----

    def _look_whether_it_moves(self, run: Run, seen: Seen) -> None:
        """A loss of 0 stands still, too, and rightly so."""
        same = seen.loss != 0 and abs(seen.loss - self._loss) <= AS_GOOD_AS * abs(seen.loss)
        self._same = self._same + 1 if same else 0
        self._still = self._still + 1 if seen.norm == 0 and seen.loss != 0 else 0
        self._loss = seen.loss
        if self._said:
            return
        why = None
        if self._still >= STILL:
            why = f"no weight has had a gradient in the last {STILL} updates"
        elif self._same >= SAME:
            why = f"it has been the same in the last {SAME} updates, to six digits"
        if why is not None:
            self._said = True
            run.notice(
                f"step {seen.number + 1}: the loss, {seen.loss:.6g}, does not move: {why}. `cnnlab check` and "
                "`cnnlab probe` name what holds it"
            )


def _count(run: Run, number: int) -> int:
    """Samples of the whole batch of an update."""
    loader = run.loaders["train"]
    first = number % run.steps_per_epoch * loader.batch_size
    return min(loader.batch_size, loader.length - first)


def returned_rate(returned: int) -> float:
    """By what a run's rate is multiplied after so many returns."""
    return RETURN_RATE**returned
