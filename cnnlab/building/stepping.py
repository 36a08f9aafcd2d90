"""The step of a run: made from the config, and settled by what works on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from cnnlab.data.loader import Loader
from cnnlab.data.places import cache_folder
from cnnlab.errors import UsageError
from cnnlab.machine.device import Placement, has_compiler, keep_freed
from cnnlab.machine.memory import SPARE, spared
from cnnlab.machine.ranks import Ranks
from cnnlab.observe.taps import Taps
from cnnlab.optim.traits import Traits
from cnnlab.protocols import Batch
from cnnlab.schema import Precision, StepKind, Trainer
from cnnlab.train.forward import Forward, Penalties
from cnnlab.train.guard import Guard
from cnnlab.train.interventions import Interventions
from cnnlab.train.nonfinite import NonFinite
from cnnlab.train.steps import trial
from cnnlab.train.steps.captured import CapturedStep
from cnnlab.train.steps.closure import ClosureStep, GraphClosureStep
from cnnlab.train.steps.compiled import CompiledStep
from cnnlab.train.steps.eager import EagerStep
from cnnlab.train.steps.halving import HalvingForward, halve_on_demand


@dataclass(frozen=True)
class StepMaker:
    """What every way of running a step needs."""

    forward: Forward
    optimizer: torch.optim.Optimizer
    traits: Traits
    placement: Placement
    trainer: Trainer
    penalties: Penalties
    interventions: Interventions
    ranks: Ranks
    seed: int
    train: Loader

    def make(self) -> EagerStep:
        """The step that the placement names, or the one that the optimizer asks for."""
        parameters = [p for p in self.forward.model.parameters() if p.requires_grad]
        half = self.placement.precision is Precision.fp16
        arguments: dict[str, Any] = {
            "seed": self.seed,
            "ranks": self.ranks,
            "penalties": self.penalties,
            "interventions": self.interventions,
            "scaler": torch.amp.GradScaler(self.placement.device.type) if half else None,
            "accumulate": self.trainer.accumulate,
            "clip_norm": self.trainer.clip_norm,
            # An optimizer that evaluates the loss itself reads it on the host anyway.
            "guard": Guard(
                self.placement.device,
                allowed=self.nonfinite.allowed,
                prompt=True if self.traits.closure or self.traits.create_graph else None,
            ),
        }
        if self.traits.create_graph:
            return GraphClosureStep(self.forward, self.optimizer, parameters, **arguments)
        if self.traits.closure:
            return ClosureStep(self.forward, self.optimizer, parameters, **arguments)
        if self.placement.step is StepKind.eager:
            return EagerStep(self.forward, self.optimizer, parameters, **arguments)
        arguments["batch_size"] = self.train.batch_size
        if self.placement.step is StepKind.captured:
            return CapturedStep(self.forward, self.optimizer, parameters, **arguments)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder(None) / "inductor"))
        return CompiledStep(self.forward, self.optimizer, parameters, **arguments)

    @property
    def nonfinite(self) -> NonFinite:
        return NonFinite(self.trainer.on_nonfinite, self.trainer.max_nonfinite)

    def evaluator(self) -> Forward:
        """The forward pass of evaluations."""
        if not self.trainer.auto_accumulate:
            return self.forward
        forward = self.forward
        return HalvingForward(forward.model, forward.task, forward.device, forward.dtype, halves=forward.halves)

    def settle(
        self, total_steps: int, taps: Taps | None, cut: Callable[[int, str], None]
    ) -> tuple[EagerStep, str | None]:
        """The step that the run takes, the wanted one or the best of those that work here; and a line on why.

        Args:
            cut: is told where memory has doubled `trainer.accumulate`, which only `trainer.auto_accumulate` allows.
        """
        maker = self
        if self.trainer.auto_accumulate:
            maker = replace(self, trainer=replace(self.trainer, accumulate=self.accumulate_that_fits(cut)))
        step, notice = maker._settled(total_steps, taps)
        if self.trainer.auto_accumulate:
            halve_on_demand(step, cut)
        return step, notice

    def accumulate_that_fits(self, cut: Callable[[int, str], None]) -> int:
        """Found by a rehearsal of the first batch in the plain step, before anything is captured or compiled.

        On a CPU some memory is kept out of its reach: for what an update makes later (the optimizer's state, the
        kernels of an uneven batch), and because oneDNN ends the process where it gets none for a kernel.
        """
        step = self.of_kind(StepKind.eager)
        halve_on_demand(step, cut)
        on_cpu = self.placement.device.type == "cpu"
        keep_freed(False)
        with spared(SPARE + 2 * sum(p.nbytes for p in step.parameters)) if on_cpu else nullcontext():
            step.rehearse(*self.first_batch())
        keep_freed(on_cpu and step.accumulate == self.trainer.accumulate)
        return step.accumulate

    def _settled(self, total_steps: int, taps: Taps | None) -> tuple[EagerStep, str | None]:
        wanted = self.trainer.step is not StepKind.auto
        if reason := self.interventions.eager_only():
            if self.trainer.step in (StepKind.compiled, StepKind.captured):
                raise UsageError(f"`trainer.step={self.trainer.step.value}`: {reason}; type trainer.step=eager")
            if taps is not None:
                taps.keep_open(False)
            told = None if self.placement.step is StepKind.eager else f"step: eager, as {reason}"
            return self.of_kind(StepKind.eager), told
        step, notice = self.make(), None
        if (wanted and not isinstance(step, CapturedStep)) or self.traits.closure or self.ranks.world > 1:
            return step, None
        if isinstance(step, CapturedStep):
            reason = trial.refusal(step, *self.first_batch())
            if reason is not None and wanted:
                raise UsageError(
                    f"`trainer.step=captured`: no CUDA graph of this network can be made ({reason}); "
                    "type trainer.step=eager"
                )
            if reason is not None:
                step = self.of_kind(StepKind.eager)
                notice = f"step: eager, as no CUDA graph of this network can be made ({reason})"
        elif self.placement.device.type == "cpu" and has_compiler():
            step, notice = trial.compiled_if_it_pays(
                step, lambda: self.of_kind(StepKind.compiled), self.first_batch, total_steps, taps=taps
            )
        if taps is not None:
            taps.keep_open(type(step) is not EagerStep)
        return step, notice

    def of_kind(self, kind: StepKind) -> EagerStep:
        return replace(self, placement=replace(self.placement, step=kind)).make()

    def first_batch(self) -> tuple[Batch, int]:
        return self.train.first()


def halving_refused(trainer: Trainer, traits: Traits, world: int) -> str | None:
    """Why `trainer.auto_accumulate` cannot hold; `None` where it can, or is not asked for."""
    if not trainer.auto_accumulate:
        return None
    if traits.closure or traits.create_graph:
        return (
            "`trainer.auto_accumulate`: this optimizer evaluates the loss itself, and may stand between two "
            "evaluations where memory ends; type trainer.auto_accumulate=false, and trainer.accumulate=2"
        )
    if world > 1:
        return (
            f"`trainer.auto_accumulate`: expected one process, received {world}, whose micro-batches would differ; "
            "type trainer.auto_accumulate=false, and trainer.accumulate=2"
        )
    return None
