"""The step of a run: made from the config, and settled by what works on this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch

from cnnlab.data.loader import Loader
from cnnlab.data.places import cache_folder
from cnnlab.errors import UsageError
from cnnlab.machine.device import Placement, has_compiler
from cnnlab.machine.ranks import Ranks
from cnnlab.observe.taps import Taps
from cnnlab.optim.traits import Traits
from cnnlab.protocols import Batch
from cnnlab.schema import Precision, StepKind, Trainer
from cnnlab.train.forward import Forward, Penalties
from cnnlab.train.interventions import Interventions
from cnnlab.train.step import CapturedStep, ClosureStep, CompiledStep, EagerStep, GraphClosureStep
from cnnlab.train.steps import trial


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

    def settle(self, total_steps: int, taps: Taps | None) -> tuple[EagerStep, str | None]:
        """The step that the run takes, the wanted one or the best of those that work here; and a line on why."""
        step, notice = self.make(), None
        wanted = self.trainer.step is not StepKind.auto
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
