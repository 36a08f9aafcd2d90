"""What a source of weights owes the laboratory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Trained:
    """Weights that were trained before, on the CPU.

    `source` says in words whose they are; `classes` names what their classifier tells apart, in its order, `None` where
    that is not known; `record` is what `run.json` keeps of where they came from. `normalized`: whether they want images
    normalized by the mean and deviation of ImageNet (`normalize=pretrained`).
    """

    source: str
    state: Mapping[str, Tensor]
    classes: tuple[str, ...] | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    normalized: bool = False


class Weights:
    """Base of the sources. Its constructor touches no file; `read` does, once, when a run begins, and never again:
    a run's own checkpoints hold all that it goes on with."""

    def read(self) -> Trained:
        """Raises `CheckpointError` for what is missing, damaged, out of reach or no weights at all."""
        raise NotImplementedError(f"{type(self).__name__} implements read")
