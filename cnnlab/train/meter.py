"""From the steps' sums to the training records; and that a run whose loss or weights are not finite ends."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cnnlab import measure
from cnnlab.errors import DivergedError
from cnnlab.machine.copies import Arriving
from cnnlab.protocols import StepResult
from cnnlab.tasks import Task

if TYPE_CHECKING:
    from cnnlab.train.run import Run


class Meter:
    """Adds up the steps' sums in the run's totals, and makes a record of them every `trainer.log_every` updates and at
    an epoch's end.

    On one process a record's figures travel to the host while the next steps run; nobody waits for them.
    """

    def __init__(self) -> None:
        self._coming: tuple[dict[str, Any], Arriving] | None = None

    def add(self, run: Run, result: StepResult) -> None:
        """After an update. Raises `DivergedError` for a record whose loss is not finite."""
        run.totals.add(result.sums)
        clock = run.clock
        at_end = clock.batch == run.steps_per_epoch or run.finished()
        if clock.step % run.trainer.log_every == 0 or at_end:
            self.flush(run)
            record = {**run.place(), "split": "train", "lr": run.last_lr}
            if run.ranks.world > 1:
                self._tell(run, record, run.totals.take())
            else:
                self._coming = record, run.totals.take_later()
        if self._coming is not None and (at_end or self._coming[1].ready()):
            self.flush(run)

    def flush(self, run: Run) -> None:
        """Hands over the record whose figures were on their way, waiting for them if need be."""
        if self._coming is not None:
            (record, sums), self._coming = self._coming, None
            self._tell(run, record, sums.wait())

    @staticmethod
    def _tell(run: Run, record: dict[str, Any], sums: dict[str, Tensor]) -> None:
        """None of updates that were all left out."""
        if float(sums["count"]) > 0:
            run.record({**record, **run.describe(sums)})


def require_finite(run: Run, record: dict[str, Any]) -> None:
    """Raises `DivergedError` for a record whose loss is not finite."""
    if not math.isfinite(record["loss"]):
        raise diverged(run, record["split"])


def require_finite_weights(run: Run) -> None:
    """Raises `DivergedError`. Reads the weights back: before a checkpoint, not in a step."""
    if not _finite(run):
        raise diverged(run)


def diverged(run: Run, split: str = "train") -> DivergedError:
    """The error of a loss on `split` that is not finite, with what may help."""
    rate = run.last_lr
    where = f"by step {run.clock.step} (epoch {run.clock.epoch}); expected a finite loss"
    if split == "train" or not _finite(run):
        return DivergedError(
            f"the loss became non-finite {where}. Try a smaller rate (optim.lr={rate / 10:.2g}; it was {rate:.2g} "
            "here) or trainer.clip_norm=1"
        )
    return DivergedError(
        f"the loss on {split} is non-finite {where}, and that of the training is not. The last updates may have "
        f"been too large, or a batch norm's running moments too young: try optim.lr={rate / 10:.2g}, or "
        "trainer.precision=fp32 (bf16 overflows later than fp16), a larger norm.momentum, or trainer.eval_every"
    )


def _finite(run: Run) -> bool:
    return bool(measure.total_norm(run.step.parameters).isfinite())


def describe_sums(task: Task, sums: dict[str, Any]) -> dict[str, float]:
    """A record's figures from summed measures: `loss`, `data_loss` and `penalty`, each followed by its parts, and the
    task's metrics."""
    count = sums.pop("count").item()
    data_loss = (sums.pop("data_loss") / count).item()
    parts, terms = (
        {name: (sums.pop(name) / count).item() for name in list(sums) if name.startswith(prefix)}
        for prefix in ("data_loss/", "penalty/")
    )
    penalty = (sums.pop("penalty") / count).item() if "penalty" in sums else 0.0
    figures = {"loss": data_loss + penalty, "data_loss": data_loss, **parts, "penalty": penalty, **terms}
    return {**figures, **task.metrics(sums)}
