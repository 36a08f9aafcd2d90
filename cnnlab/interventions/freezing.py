"""Frozen means frozen: parameters, and what norm layers remember."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from cnnlab.protocols import Intervention
from cnnlab.torch_private import NormBase


class Freeze(Intervention):
    """Lets norm layers whose parameters do not train keep their running statistics, too, and use them in training.

    Args:
        prefixes: names of modules (whole components: `layer1` is not `layer10`) whose norm layers are frozen even
            where they have no parameters; a norm layer with parameters is frozen if none of them trains.

    Which parameters train is settled before the optimizer is made (`cnnlab.optim.groups`).
    """

    def __init__(self, prefixes: Sequence[str] = ()):
        self.prefixes = tuple(prefixes)

    def frozen(self, model: nn.Module) -> Iterator[nn.Module]:
        """The norm layers that stand still."""
        for name, module in model.named_modules():
            if isinstance(module, NormBase) and module.track_running_stats:
                own = list(module.parameters(recurse=False))
                inside = any(f"{name}.".startswith(f"{prefix.rstrip('.')}.") for prefix in self.prefixes)
                if not any(p.requires_grad for p in own) and (own or inside):
                    yield module

    def mode(self, model: nn.Module, epoch: int) -> None:
        for module in self.frozen(model):
            module.eval()
