"""What every initialization shares: which tensors it fills, from which stream, and the fans of a layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

from cnnlab.rng import generator
from cnnlab.torch_private import ConvNd, ConvTransposeNd, NormBase

Layer = nn.Linear | ConvNd
_NORMS = (NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_RESIDUAL_NORMS = {"BasicBlock": "bn2", "Bottleneck": "bn3"}
"""The last norm of torchvision's residual blocks, which state no `residual_norm`."""


def is_layer(module: nn.Module) -> TypeGuard[Layer]:
    """Whether a scheme fills the module's weight: convolutions, transposed ones, linear layers."""
    return isinstance(module, nn.Linear | ConvNd)


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a norm layer: torch's, or one that says so in its class's name."""
    return isinstance(module, _NORMS) or type(module).__name__.endswith(("Norm", "Norm2d"))


def layers(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    """The layers by name, in the order of their registration, a shared one once."""
    for name, module in model.named_modules():
        if is_layer(module):
            yield name, module


@dataclass(frozen=True)
class Fans:
    """How many inputs a unit adds up, and how many outputs an input reaches.

    Zero padding and stride are left out, as in the papers: the counts hold for the inside of a large map.
    Entries that a pruning mask silences still count, since a mask is not known here.
    """

    fan_in: int
    fan_out: int

    @classmethod
    def of(cls, layer: Layer) -> Fans:
        """With k the kernel's entries and g the groups: fan_in = k·in/g and fan_out = k·out/g."""
        if isinstance(layer, nn.Linear):
            return cls(layer.in_features, layer.out_features)
        kernel = math.prod(layer.kernel_size)
        return cls(kernel * layer.in_channels // layer.groups, kernel * layer.out_channels // layer.groups)


class Initializer:
    """Fills a model in place: `init(model, seed)`.

    - The weight of each convolution and linear layer comes from `weight`, its bias from `bias` (zeros). A layer that
      must start as something (`own_weight()` gives its weight) starts so.
    - A norm layer starts as plain normalization: scale 1, shift 0, running statistics reset.
    - PReLU gets the slope it was constructed with. Every other parameter keeps its value.

    Each tensor is drawn on the CPU from the stream (seed, "init", parameter name), so another layer's
    change of shape, the device and the order of the layers leave its numbers alone. It works on any device
    and on memory that `to_empty` left unset. A weight under a parametrization keeps its value.

    Args:
        zero_residual: sets the scale of the last norm layer of every residual branch to 0, so that each block
            starts as the identity (Goyal et al. 2017, section 5.1). A block names that norm layer in
            `residual_norm`.
    """

    needs_batch = False
    """Whether `calibrate(model, images)` must follow the call."""

    def __init__(self, *, zero_residual: bool = False):
        self.zero_residual = zero_residual

    def weight(self, layer: Layer, rng: torch.Generator) -> Tensor:
        """The layer's weight: a CPU tensor of its shape."""
        raise NotImplementedError(f"{type(self).__name__} implements weight")

    def bias(self, layer: Layer, rng: torch.Generator) -> Tensor:
        """The layer's bias: a CPU tensor of its shape."""
        return torch.zeros(_bias_of(layer).shape)

    def validate(self, model: nn.Module) -> None:
        """Raises `ValueError` where the initialization does not fit the model, which may be on the meta
        device."""
        if self.zero_residual:
            residual_norms(model)

    def notices(self, model: nn.Module) -> list[str]:
        """What of its settings a model has no use for."""
        return []

    @torch.no_grad()
    def __call__(self, model: nn.Module, seed: int) -> None:
        self.validate(model)
        for name, module in model.named_modules():
            prefix = f"{name}." if name else ""
            own = dict(module.named_parameters(recurse=False))
            if is_layer(module):
                if "weight" in own:
                    stated = getattr(module, "own_weight", None)
                    start = None if stated is None else stated()
                    if start is None:
                        start = self.weight(module, generator(seed, "init", f"{prefix}weight"))
                    own["weight"].copy_(start)
                if "bias" in own:
                    own["bias"].copy_(self.bias(module, generator(seed, "init", f"{prefix}bias")))
            elif is_norm(module):
                _reset_norm(module)
            elif isinstance(module, nn.PReLU):
                module.weight.fill_(module.init)
        if self.zero_residual:
            for norm in residual_norms(model):
                norm.get_parameter("weight").zero_()


def _reset_norm(norm: nn.Module) -> None:
    for name, parameter in norm.named_parameters(recurse=False):
        parameter.fill_(1.0 if name == "weight" else 0.0)
    if isinstance(norm, NormBase):
        norm.reset_running_stats()


def _bias_of(layer: Layer) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def grouped_view(layer: Layer) -> tuple[int, int, int, int]:
    """(groups, rows, columns, kernel) of the layer's weight, whose memory is (groups·rows, columns, *kernel).

    Rows are a group's outputs (of a transposed convolution, its inputs), columns what each is joined to.
    """
    if isinstance(layer, nn.Linear):
        return 1, layer.out_features, layer.in_features, 1
    outer, inner = layer.out_channels, layer.in_channels
    if isinstance(layer, ConvTransposeNd):
        outer, inner = inner, outer
    return layer.groups, outer // layer.groups, inner // layer.groups, math.prod(layer.kernel_size)


def residual_norms(model: nn.Module) -> list[nn.Module]:
    """The last norm layer of every residual branch.

    Raises:
        ValueError: the model has none with a scale.
    """
    found = []
    for module in model.modules():
        name = getattr(module, "residual_norm", None) or _RESIDUAL_NORMS.get(type(module).__name__)
        norm = getattr(module, name, None) if isinstance(name, str) else None
        if isinstance(norm, nn.Module) and isinstance(getattr(norm, "weight", None), nn.Parameter):
            found.append(norm)
    if not found:
        raise ValueError(
            "expected a network with a norm layer (of learned scale) at the end of each residual branch for "
            f"zero_residual=true, received {type(model).__name__} without any; type init.zero_residual=false"
        )
    return found
