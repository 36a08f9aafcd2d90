"""What networks and heads share: the factories of their norm and activation layers, and a convolution with its norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from torch import nn

from cnnlab.schema import Range

ActivationFactory = Callable[[], nn.Module]
NormFactory = Callable[[int], nn.Module]
DropRate = Annotated[float, Range(low=0, below=1)]


def conv_norm(
    norm: NormFactory, in_channels: int, out_channels: int, kernel: int | tuple[int, int], **options: Any
) -> tuple[nn.Conv2d, nn.Module]:
    """A convolution and its norm layer; the convolution has a bias exactly where the norm layer adds none."""
    normalizer = norm(out_channels)
    bias = getattr(normalizer, "bias", None) is None
    return nn.Conv2d(in_channels, out_channels, kernel, bias=bias, **options), normalizer
