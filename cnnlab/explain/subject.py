"""A network as it is explained: in evaluation mode, in float32, with gradients for its input and for nothing else; and
as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cnnlab.errors import UsageError
from cnnlab.inspect.untouched import untouched
from cnnlab.protocols import DataSpec, Outputs, as_outputs
from cnnlab.tasks import Task


@dataclass
class Subject:
    """A network, and what is needed to read its answers.

    It computes in float32 (float64 where its weights are), whatever precision it trains in or its weights have, because
    the gradients of half-precision answers are mostly rounding; of the image alone, where evaluation averages several
    views of it.
    """

    model: nn.Module
    task: Task
    spec: DataSpec

    @property
    def classes(self) -> tuple[str, ...]:
        return self.task.class_names(self.spec)

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def outputs(self, images: Tensor) -> Outputs:
        """What the network gives for (N, C, H, W), by name, with its graph."""
        with torch.autocast(images.device.type, enabled=False):
            return as_outputs(self.model(images))

    def views(self) -> int:
        """How many views of an image evaluation averages, of which the image alone is explained."""
        return len(self.task.views(torch.zeros(1, self.spec.channels, *self.spec.size, device=self.device)))

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """For the block, the network in evaluation mode, its weights in float32 or wider and without gradients;
        afterwards each module's mode, what asks for gradients, the gradients, weights, buffers and random generators
        are what they were.

        Raises `UsageError` for networks that hooks cannot look into.
        """
        _require_open(self.model)
        exact = torch.autocast(self.device.type, enabled=False)  # it reaches into the backward pass
        with untouched(self.model), torch.enable_grad(), exact, _widened(self.model):
            self.model.eval().requires_grad_(False)
            yield


@contextmanager
def _widened(model: nn.Module) -> Iterator[None]:
    """For the block, weights and buffers of half precision as float32."""
    tensors = (*model.parameters(), *model.buffers())
    narrow = [(tensor, tensor.data) for tensor in tensors if tensor.is_floating_point() and tensor.itemsize < 4]
    try:
        for tensor, value in narrow:
            tensor.data = value.float()
        yield
    finally:
        for tensor, value in narrow:
            tensor.data = value


def _require_open(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = f"`{name}`" if name else "the network"
        if isinstance(module, torch.jit.ScriptModule):
            raise UsageError(
                f"{where} is a TorchScript module, whose layers cannot be looked at; give the plain module"
            )
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise UsageError(
                f"{where} is compiled, and hooks on compiled layers never fire; open the run with cnnlab.open, which "
                "compiles nothing, or give the module that was compiled"
            )
