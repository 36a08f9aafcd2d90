"""What the laboratory's own optimizers share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True)
class Batched:
    """Parameters of one device and dtype with their gradients, which one `foreach_*` call updates."""

    params: list[Tensor]
    grads: list[Tensor]

    @classmethod
    def of(cls, params: Iterable[Tensor]) -> list[Batched]:
        """The parameters that have a gradient, by device and dtype, in their order."""
        kinds: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for param in params:
            if param.grad is not None:
                own, grads = kinds.setdefault((param.device, param.dtype), ([], []))
                own.append(param)
                grads.append(param.grad)
        return [cls(own, grads) for own, grads in kinds.values()]

    def state(self, optimizer: Optimizer, name: str) -> list[Tensor]:
        """The state `name` of each parameter, zeros of its shape at first."""
        for param in self.params:
            if name not in optimizer.state[param]:
                optimizer.state[param][name] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return [optimizer.state[param][name] for param in self.params]


def by_shape(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Positions of tensors of equal shape, to be stacked."""
    places: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for place, tensor in enumerate(tensors):
        places[tuple(tensor.shape)].append(place)
    return list(places.values())


def evaluate(closure: Callable[[], Tensor] | None) -> Tensor | None:
    """The loss of an optional closure, with gradients enabled."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
