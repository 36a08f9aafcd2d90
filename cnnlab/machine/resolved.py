"""What `auto` became when a run began: its checkpoints keep it, and a run that goes on takes it up unasked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any

from cnnlab.machine import device as devices
from cnnlab.machine.device import Placement
from cnnlab.schema import DataPath, Decoder, Device, FeatureSource, Layout, Precision, StepKind, Trainer


@dataclass(frozen=True)
class Resolved:
    """`None` stands for what was not left open, or was not yet kept when the checkpoint was written."""

    device: Device | None = None
    precision: Precision | None = None
    step: StepKind | None = None
    layout: Layout | None = None
    data_path: DataPath | None = None
    decode: Decoder | None = None
    accumulate: int | None = None
    """Micro-batches an update, where memory ended (`trainer.auto_accumulate`)."""
    lr: float | None = None
    """The base rate that a range test found (`optim.lr=auto`)."""
    features: FeatureSource | None = None
    """What became of `finetune.cache`."""

    @classmethod
    def of(cls, record: Mapping[str, str]) -> Resolved:
        """As a checkpoint keeps it. Raises `ValueError` or `TypeError` for what no run has written."""
        return cls(**{name: kind(record[name]) for name, kind in _KINDS.items() if name in record})

    @classmethod
    def placed(cls, placement: Placement, **more: Any) -> Resolved:
        """Of a run on this device, and what `more` was chosen."""
        device = Device(placement.device.type)
        return cls(device, placement.precision, placement.step, placement.layout, **more)

    def record(self) -> dict[str, str]:
        """For a checkpoint."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: _text(value) for name, value in values.items() if value is not None}

    def applied(self, trainer: Trainer) -> Trainer:
        """The settings with what `auto` chose when the run began, so that it goes on alike on another machine.

        A run that goes on on another kind of device chooses anew.
        """
        if self.accumulate is not None:
            trainer = replace(trainer, accumulate=self.accumulate)
        if self.device is not None and trainer.device is Device.auto and devices.available(self.device):
            trainer = replace(trainer, device=self.device)
        if trainer.device is not self.device:
            return trainer
        kept = {name: getattr(self, name) for name in ("precision", "step", "layout")}
        return replace(trainer, **{name: value for name, value in kept.items() if value is not None})

    def eager(self) -> Resolved:
        """For who looks at the run, and captures and compiles nothing."""
        return self if self.step is None else replace(self, step=StepKind.eager)


_KINDS: dict[str, Callable[[str], Any]] = {
    "device": Device,
    "precision": Precision,
    "step": StepKind,
    "layout": Layout,
    "data_path": DataPath,
    "decode": Decoder,
    "accumulate": int,
    "lr": float,
    "features": FeatureSource,
}


def _text(value: Any) -> str:
    return str(value.value) if isinstance(value, Enum) else repr(value)
