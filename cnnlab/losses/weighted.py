"""A weighted sum of losses by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from cnnlab.losses.base import PerSample
from cnnlab.schema import NonNegative


class Weighted(PerSample):
    """Sum over the parts of weight times loss. A task records each part apart, before its weight.

    Args:
        num_classes: C.
        class_counts: (C,) of the training set, for the parts that take it.
        parts: factories of losses by name.
        weights: of the parts by name: 0 leaves one out; 1 for those that are not named.

    Raises:
        ValueError: a weight of no part, or no part with a weight.
    """

    def __init__(
        self,
        num_classes: int,
        parts: Mapping[str, Callable[..., PerSample]],
        weights: Mapping[str, NonNegative] | None = None,
        class_counts: Tensor | None = None,
    ):
        super().__init__(num_classes)
        given = {name: float(weight) for name, weight in (weights or {}).items()}
        unknown = [name for name in given if name not in parts]
        if unknown:
            raise ValueError(f"expected weights of {', '.join(parts)}, received one of {unknown[0]}")
        self.weights = {name: given.get(name, 1.0) for name in parts if given.get(name, 1.0) > 0}
        if not self.weights:
            raise ValueError(f"expected a weight above 0 for one of {', '.join(parts) or 'the parts'}, received none")
        if "loss" in self.weights or any("/" in name or "." in name for name in self.weights):
            raise ValueError("expected names of parts without a dot or slash, and other than `loss`")
        self.parts = nn.ModuleDict()
        for name in self.weights:
            counted = "class_counts" in inspect.signature(parts[name]).parameters
            takes = {"class_counts": class_counts} if counted else {}
            self.parts[name] = parts[name](num_classes=num_classes, **takes)

    def apart(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Each part's loss by name, (N,), before its weight."""
        return {name: part(logits, target) for name, part in self.parts.items()}

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        weighted = [self.weights[name] * loss for name, loss in self.apart(logits, target).items()]
        return torch.stack(weighted).sum(0)

    def _single(self) -> PerSample | None:
        first, *others = self.parts.values()
        return None if others else cast(PerSample, first)

    def initial_bias(self, num_classes: int) -> Tensor | None:
        """That of a single part; several agree on none."""
        single = self._single()
        return None if single is None else single.initial_bias(num_classes)

    def expected_initial_loss(self) -> float | None:
        """The sum of the parts', with the logits all zero; `None` where one depends on more."""
        if any(cast(PerSample, part).expected_initial_loss() is None for part in self.parts.values()):
            return None
        return super().expected_initial_loss()
