"""Frozen means frozen: parameters, and what norm layers remember."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from cnnlab.protocols import Intervention
from cnnlab.torch_private import NormBase


class Freeze(Intervention):
    """Parameters that do not train, and norm layers that keep their running statistics with them, and use them in
    training.

    Such a norm layer stands still whoever calls `model.train()`: it is put back into evaluation before it is used.

    Args:
        prefixes: names of modules (whole components: `layer1` is not `layer10`) whose norm layers are frozen even
            where they have no parameters; a norm layer with parameters is frozen if none of them trains.

    The optimizer, which is made before this is attached, has left the same parameters out (`cnnlab.optim.groups`).
    """

    def __init__(self, prefixes: Sequence[str] = ()):
        self.prefixes = tuple(prefixes)
        self._standing: dict[str, Any] = {}

    def attach(self, model: nn.Module, seed: int) -> None:
        for name, parameter in model.named_parameters():
            if self.covers(name):
                parameter.requires_grad_(False)

    def covers(self, name: str) -> bool:
        """Whether a module or a parameter is under one of the prefixes."""
        return any(f"{name}.".startswith(f"{prefix.rstrip('.')}.") for prefix in self.prefixes)

    def frozen(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The norm layers that stand still, by name."""
        for name, module in remembering(model):
            own = list(module.parameters(recurse=False))
            if not any(p.requires_grad for p in own) and (own or self.covers(name)):
                yield name, module

    def mode(self, model: nn.Module, epoch: int) -> None:
        frozen = dict(self.frozen(model))
        for name in self._standing.keys() - frozen.keys():
            self._standing.pop(name).remove()
        for name, module in frozen.items():
            module.eval()
            if name not in self._standing:
                self._standing[name] = module.register_forward_pre_hook(_stand_still)


def remembering(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The norm layers that keep running statistics, by name."""
    for name, module in model.named_modules():
        if isinstance(module, NormBase) and module.track_running_stats:
            yield name, module


def _stand_still(module: nn.Module, inputs: Any) -> None:
    if module.training:
        module.training = False
