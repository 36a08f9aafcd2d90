"""Copies between the CPU and a GPU, but for those of batches (`cnnlab.data.ahead`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def pinned(tensor: Tensor) -> Tensor:
    """A tensor of the CPU in memory from which a copy to a GPU (`non_blocking=True`) runs beside the program; one of a
    GPU as it is."""
    return tensor if tensor.is_cuda or tensor.is_pinned() else tensor.pin_memory()


def on_cpu(value: Any) -> Any:
    """Nested values (mappings, lists, tuples) with a copy of each tensor, on the CPU. Waits for the device."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: on_cpu(item) for key, item in value.items()}
    return [on_cpu(item) for item in value] if isinstance(value, list | tuple) else value


class Arriving:
    """Tensors on their way to the CPU, from where they are now."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensors = dict(tensors)
        for name, tensor in tensors.items():
            if tensor.is_cuda:
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                self._tensors[name] = host.copy_(tensor, non_blocking=True)
                self._event = self._event or torch.cuda.Event()
        if self._event is not None:
            self._event.record()

    def ready(self) -> bool:
        """Whether `wait` returns at once."""
        return self._event is None or self._event.query()

    def wait(self) -> dict[str, Tensor]:
        """The tensors on the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return {name: tensor.cpu() for name, tensor in self._tensors.items()}
