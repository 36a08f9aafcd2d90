"""A run: the parts, wired, and the messages between them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from cnnlab.composing.experiment import Experiment
from cnnlab.data.ahead import NotAwaited
from cnnlab.data.loader import Loader
from cnnlab.errors import CheckpointError, UsageError
from cnnlab.machine.ranks import Ranks
from cnnlab.observe.observer import Observer
from cnnlab.protocols import Batch, DataSpec, Listener, Schedule, StepResult
from cnnlab.runs.checkpoint import State
from cnnlab.runs.data_files import Files
from cnnlab.runs.folder import RunDir
from cnnlab.schema import Precision, Trainer
from cnnlab.tasks import Task
from cnnlab.train.checkpointer import Checkpointer
from cnnlab.train.forward import Forward
from cnnlab.train.interventions import Interventions
from cnnlab.train.meter import Meter, describe_sums, require_finite, require_finite_weights
from cnnlab.train.nonfinite import NonFinite, returned_rate
from cnnlab.train.objective import Mode, Objective
from cnnlab.train.selection import Selection
from cnnlab.train.session import record_status, session
from cnnlab.train.state import Clock, Totals
from cnnlab.train.steps.eager import EagerStep


@dataclass
class Run:
    """Everything that one training needs. `cnnlab.building.builder.build` makes it from a config."""

    experiment: Experiment
    trainer: Trainer
    """Its section, with what `auto` chose when the run began."""
    folder: RunDir | None
    model: nn.Module
    task: Task
    spec: DataSpec
    forward: Forward
    step: EagerStep
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    loaders: dict[str, Loader]
    observer: Observer
    device: torch.device
    precision: Precision
    ranks: Ranks
    selection: Selection
    total_steps: int
    interventions: Interventions = field(default_factory=Interventions)
    nonfinite: NonFinite = field(default_factory=NonFinite)
    patience: int | None = None
    checkpointer: Checkpointer = field(default_factory=lambda: Checkpointer(enabled=False, minutes=math.inf))
    listeners: list[Listener] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """Each file of the data that could not be read, with the reason."""
    files: Files = field(default_factory=dict)
    """Those of each split, with their lengths."""
    weights: dict[str, Any] | None = None
    """What it started from, where that was trained before, as `run.json` keeps it."""
    state: State = field(default_factory=State)
    clock: Clock = field(default_factory=Clock)
    metrics: dict[str, float] = field(default_factory=dict)
    resumed: bool = False
    origin: Any = None
    """What its checkpoints belong to (`cnnlab.train.origin.Origin`)."""
    curve: Any = None
    """The range test that found its rate, in the session that made it (`cnnlab.train.range_test.RangeTest`)."""
    interrupted_by: int = 0
    """The signal that asked the run to stop; 0 for none."""
    saved: bool = False
    """Whether the last update is behind, with its checkpoint: from here on an interruption loses nothing."""

    def __post_init__(self) -> None:
        self.totals = Totals(self.ranks, self.device, None if self.folder is None else self.folder.last)
        self.meter = Meter()
        self.last_lr = self.lr()
        """The base learning rate of the last update."""

    # ---- what listeners ask ----

    @property
    def config(self) -> dict[str, Any]:
        """The experiment's, as the run folder keeps it and by which a checkpoint is known."""
        return self.experiment.config

    @property
    def dir(self) -> Any:
        return None if self.folder is None else self.folder.path

    @property
    def is_main(self) -> bool:
        return self.ranks.is_main

    @property
    def epochs(self) -> int:
        return self.trainer.epochs

    @property
    def steps_per_epoch(self) -> int:
        return self.loaders["train"].steps

    @property
    def batch_size(self) -> int:
        return self.trainer.batch_size

    @property
    def val_size(self) -> int:
        return len(self.loaders["val"].split)

    def place(self, step: int | None = None) -> dict[str, int]:
        """`step` and `epoch` of a record, in all files alike: how many updates are done, and in which epoch, counted
        from 1, the last one of them was made (0 before the first).

        Args:
            step: `None` takes the updates that are done now.
        """
        step = self.clock.step if step is None else step
        return {"step": step, "epoch": -(-step // self.steps_per_epoch)}

    def lr(self) -> float:
        """The base learning rate of the coming update."""
        base = float(self.optimizer.param_groups[0]["base_lr"])
        return base * self._factor(min(self.clock.step, self.total_steps - 1))

    def _factor(self, step: int) -> float:
        """Of all rates at an update: the schedule's, and that of the returns to a checkpoint."""
        return self.schedule.factor(step, self.total_steps) * returned_rate(self.clock.returned)

    # ---- what the loop asks ----

    def finished(self) -> bool:
        """Whether there is no further update to do."""
        return self.clock.step >= self.total_steps or self.stopped_early

    def complete(self) -> bool:
        """Whether the last update has been followed by its evaluation and checkpoint, too."""
        return self.finished() and self.clock.closed

    @property
    def stopped_early(self) -> bool:
        return self.patience is not None and self.selection.waited >= self.patience

    def batches(self) -> Iterator[tuple[Batch, int]]:
        """The rest of this epoch from where the clock stands, with each batch's size over all ranks; the
        learning rate of the coming update is set on the way."""
        self.clock.training.start()
        try:
            for batch, count in self.loaders["train"].batches(self.clock.epoch, self.clock.batch, self._stopping):
                if self.finished():
                    break
                self._set_lr()
                yield batch, count
        except NotAwaited:
            self.checkpointer.stop(self)
        self.clock.training.stop()
        self.observer.pause()

    def evaluated_batches(self, loader: Loader) -> Iterator[Batch]:
        """The batches of a split that is measured, inside of `evaluating`.

        Raises `NotAwaited` where the run was asked to stop meanwhile.
        """
        for batch, _ in loader.batches(0, stopping=self._stopping):
            if self._stopping():
                raise NotAwaited
            yield batch

    def _stopping(self) -> bool:
        """Whether it would rather save than wait for a batch. With other processes, all stop at the same step."""
        return bool(self.interrupted_by) and self.ranks.world == 1

    def _set_lr(self) -> None:
        factor = self._factor(self.clock.step)
        self.last_lr = self.optimizer.param_groups[0]["base_lr"] * factor
        for group in self.optimizer.param_groups:
            rate = group["base_lr"] * group.get("lr_scale", 1.0) * factor
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def tell(self, event: str, *arguments: Any) -> None:
        """Tells all listeners, each with a copy of the records."""
        for listener in self.listeners:
            getattr(listener, event)(self, *(dict(a) if isinstance(a, dict) else a for a in arguments))

    def notice(self, text: str) -> None:
        """Tells who watches the run a line; rank 0 does."""
        if self.is_main:
            self.tell("on_notice", text)

    def describe(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """See `describe_sums`."""
        return describe_sums(self.task, sums)

    def record(self, record: dict[str, Any]) -> None:
        """Tells a record of `metrics.jsonl`. Raises `DivergedError` where its loss is not finite."""
        self.tell("on_record", record)
        require_finite(self, record)

    def averaged(self) -> AbstractContextManager[None]:
        """The network as it is evaluated: with the moving averages where there are any."""
        return self.interventions.evaluated()

    def train_mode(self) -> None:
        """The network as it trains."""
        self.interventions.train(self.model, self.clock.epoch)

    def with_penalty(self, sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The sums of an evaluation, on the CPU, with the penalties of the weights at hand, where the loss has such."""
        if not self.step.penalties:
            return sums
        _, found = self.step.penalties(self.step.weights)
        return {**sums, **{name: value.cpu() * sums["count"] for name, value in found.items()}}

    def objective(
        self,
        batch: Batch,
        count: int | None = None,
        *,
        mode: Mode | Literal["train", "frozen", "eval"] = "train",
        dtype: torch.dtype | None = None,
    ) -> Objective:
        """What the coming update minimizes on a batch, as a function of the weights.

        Args:
            batch: this rank's part of one, as a loader gives it, after interventions in batches.
            count: samples of the whole batch; `None` where this rank has all of it.
            mode, dtype: see `Objective`.
        """
        whole = len(batch["index"]) if count is None else count
        stated = self.step.objective(batch, whole, self.clock.step)
        return replace(stated, mode=Mode(mode), dtype=dtype, epoch=self.clock.epoch)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The network as it is evaluated, for the block.

        Raises `InterruptedRun` where the run was asked to stop meanwhile: saved as before the evaluation, which is made
        again when it goes on.
        """
        self.model.eval()
        try:
            with torch.no_grad(), self.averaged():
                yield
        except NotAwaited:
            self.train_mode()
            self.clock.reopen(self.steps_per_epoch)
            self.checkpointer.stop(self)
        finally:
            self.train_mode()

    def share_buffers(self) -> None:
        """Rank 0's buffers on every rank: each has seen other samples, and one network is evaluated."""
        self.ranks.share_(list(self.model.buffers()))

    # ---- what decides ----

    def settle(self, result: StepResult) -> None:
        """What follows from an update: its part of the records, a checkpoint where one is due, the end where the loss
        is not finite (`DivergedError`) or the run was asked to stop (`InterruptedRun`)."""
        at_end = self.clock.batch == self.steps_per_epoch or self.finished()
        self.nonfinite.settle(self, last=at_end)
        self.meter.add(self, result)
        self.checkpointer.after_step(self)

    def decide(self, figures: Mapping[str, float]) -> bool:
        """What follows from an evaluation: whether it is the best so far, what a plateau does to the rate, and
        (`stopped_early`) whether the run goes on.

        Args:
            figures: its metrics, as `val/accuracy`; empty where none was due.
        """
        if not figures:
            return False
        value = figures[f"val/{self.selection.metric}"]
        self.schedule.observe(value, self.selection.direction)
        return self.selection.offer(value, **self.place())

    def complete_state(self) -> None:
        """Before a checkpoint: nothing is left untold, and what is spread over the ranks is brought together.

        Raises `DivergedError` for weights that are not finite.
        """
        self.nonfinite.settle(self, last=True)
        self.meter.flush(self)
        self.observer.drain()
        self.totals.gather()
        require_finite_weights(self)
        self.tell("on_save")

    # ---- going on with a checkpoint ----

    def restore(self, state: Mapping[str, Any]) -> None:
        """Puts the run where a checkpoint of it stood.

        Raises:
            CheckpointError: the checkpoint is another run's.
            UsageError: it is further than this run is to go.
        """
        path = None if self.folder is None else self.folder.last
        self.state.load_state_dict(state, only=("origin", "clock"), path=path)
        self._require_place()
        if self.clock.step > self.total_steps:
            raise UsageError(
                f"expected a run of at least the {self.clock.step} steps that it has done, received one of "
                f"{self.total_steps}; type trainer.epochs={-(-self.clock.step // self.steps_per_epoch)} or more, "
                "and trainer.max_steps=null"
            )
        self.state.load_state_dict(state, path=path)
        self.step.guard.resume(self.clock.left_out)
        self.notices += [line for listener in self.listeners for line in listener.restored()]

    def _require_place(self) -> None:
        """Raises `CheckpointError` for a clock that no run of this length of epochs has shown."""
        clock = self.clock
        if clock.step != clock.epoch * self.steps_per_epoch + clock.batch or clock.batch > self.steps_per_epoch:
            raise CheckpointError(
                f"the checkpoint stands at step {clock.step}, in batch {clock.batch} of epoch {clock.epoch}, and an "
                f"epoch of this run has {self.steps_per_epoch} steps; it is another run's"
            )

    # ---- the session around the loop ----

    def session(self) -> AbstractContextManager[None]:
        """See `cnnlab.train.session`."""
        return session(self)

    def record_progress(self) -> None:
        """Tells `run.json` how far the run is."""
        record_status(self, "running")
