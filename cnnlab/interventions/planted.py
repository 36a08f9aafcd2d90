"""A value that is not finite, planted: to see what a run makes of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cnnlab.errors import UsageError, did_you_mean
from cnnlab.protocols import Batch, Intervention
from cnnlab.schema import NonNegativeInt, PositiveInt


class PlantedNaN(Intervention):
    """Makes one sample's output of a layer NaN, or the gradient that comes back to it, in one update.

    Args:
        layer: name of a module (`cnnlab summary` lists them); `None`: the first that has weights of its own.
        step: the update, from 1.
        sample: position in each micro-batch, counted round where there are fewer.
        backward: spoils the gradient at the layer's output, and not the output.
    """

    eager_only = "a planted fault comes and goes"

    def __init__(
        self, layer: str | None = None, step: PositiveInt = 10, sample: NonNegativeInt = 0, backward: bool = False
    ):
        self.layer = layer
        self.step = step
        self.sample = sample
        self.backward = backward
        self._now = False

    def attach(self, model: nn.Module, seed: int) -> None:
        """Raises `UsageError` where there is no such layer."""
        named = dict(model.named_modules())
        weighted = (name for name, module in named.items() if any(True for _ in module.parameters(recurse=False)))
        layer = next(weighted, "") if self.layer is None else self.layer
        if layer not in named:
            meant = did_you_mean(layer, named)
            raise UsageError(f"`layer={layer}`: this network has none of this name{meant}; cnnlab summary lists them")
        named[layer].register_forward_hook(self._spoil)

    def batch(self, batch: Batch, step: int) -> Batch:
        self._now = step + 1 == self.step
        return batch

    def _spoil(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if not self._now or not module.training or not isinstance(output, Tensor):
            return output
        row = self.sample % len(output)
        if self.backward:
            return _Spoiled.apply(output, row)  # type: ignore[no-untyped-call]
        return output.index_fill(0, torch.tensor([row], device=output.device), torch.nan)


class _Spoiled(torch.autograd.Function):
    """The same tensor, whose gradient is NaN in one row."""

    @staticmethod
    def forward(context: Any, tensor: Tensor, row: int) -> Tensor:
        context.row = row
        return tensor.view_as(tensor)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.index_fill(0, torch.tensor([context.row], device=gradient.device), torch.nan), None
