"""What a check says, and what the checks look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torch import Tensor

from cnnlab.protocols import Batch
from cnnlab.train.objective import Mode
from cnnlab.train.run import Run

FEW = 8
"""Samples that a network has to be able to learn by heart."""
MOST = 8 * FEW
"""Samples of the batch that the checks look at."""


class Verdict(StrEnum):
    good = "good"
    watch = "watch"
    bad = "bad"
    unknown = "unknown"


@dataclass(frozen=True)
class Finding:
    """One check: what was measured, whether that is well, and what to do where it is not."""

    name: str
    verdict: Verdict
    evidence: str
    advice: str = ""


@dataclass(frozen=True)
class Check:
    """A check by name; `what` says in a line what it asks."""

    name: str
    what: str
    look: Callable[[Subject], Finding | None]


@dataclass
class Subject:
    """What the checks look at: a run, built and not begun, and what several of them need of it."""

    run: Run
    batch: Batch
    """The first training batch, as the network gets it, on the device; at most `MOST` samples."""

    @classmethod
    def of(cls, run: Run) -> Subject:
        batch, _ = run.loaders["train"].images.first()
        return cls(run, first_samples(batch, MOST))

    @property
    def few(self) -> Batch:
        return first_samples(self.batch, FEW)

    @property
    def objective(self) -> Any:
        return self.run.objective(self.batch, mode=Mode.train)


def first_samples(batch: Batch, count: int) -> Batch:
    return {name: tensor[:count] for name, tensor in batch.items()}


def named(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def ranged(values: Tensor) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:.2f}" if high - low < 0.005 else f"{low:.2f} to {high:.2f}"
