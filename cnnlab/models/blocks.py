"""What the networks share: the choice of a stem, pooling, stochastic depth, convolution with norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from cnnlab.blocks import DropRate, NormFactory
from cnnlab.protocols import ConvNet, Features

Stem = Literal["auto", "imagenet", "small"]
Pool = Literal["max", "avg", "conv"]


def choose_stem(stem: Stem, image_size: tuple[int, int], *, imagenet_from: int = 64) -> Literal["imagenet", "small"]:
    """What `auto` stands for: ImageNet's stem where the shorter side has `imagenet_from` pixels or more."""
    if stem == "auto":
        return "imagenet" if min(image_size) >= imagenet_from else "small"
    return stem


def stem_note(stem: str, image_size: tuple[int, int]) -> str:
    return f"stem: {stem} (images are {image_size[0]}x{image_size[1]})"


def require_size(image_size: tuple[int, int], minimum: int, network: str, advice: str) -> None:
    """Refuses images whose shorter side is below `minimum` pixels.

    Raises:
        ValueError: with `advice`, what to type instead.
    """
    if min(image_size) < minimum:
        raise ValueError(
            f"expected images of at least {minimum}x{minimum} for {network}, "
            f"received {image_size[0]}x{image_size[1]}; {advice}"
        )


def require_spatial(norm: NormFactory, smallest: tuple[int, int], network: str, advice: str) -> None:
    """Refuses instance normalization of a 1x1 map: its only value would become zero.

    Args:
        norm: the network's norm layers.
        smallest: (height, width) of the smallest map that is normalized.
        network: its name.
        advice: what to type instead, besides another norm layer.

    Raises:
        ValueError: `norm` is instance normalization and the smallest map has one pixel.
    """
    if max(smallest) <= 1 and isinstance(norm(2), nn.InstanceNorm2d):
        raise ValueError(
            f"expected a norm layer that can normalize a 1x1 map, which {network} has here, "
            f"received norm=instance; norm=group or norm=batch can, or {advice}"
        )


def divided(image_size: tuple[int, int], stride: int) -> tuple[int, int]:
    """(height, width) of what padded layers of that stride in all leave of the images."""
    return -(-image_size[0] // stride), -(-image_size[1] // stride)


def scaled(channels: int, width: float) -> int:
    """`channels` times the width multiplier, at least 1."""
    return max(1, round(channels * width))


def downsampler(pool: Pool, channels: int, kernel: int, stride: int, padding: int = 0, **max_options: Any) -> nn.Module:
    """Maximum pooling, average pooling, or the strided convolution of the same geometry that learns its own.

    `max_options` go to `nn.MaxPool2d` only.
    """
    if pool == "max":
        return nn.MaxPool2d(kernel, stride, padding, **max_options)
    if pool == "avg":
        return nn.AvgPool2d(kernel, stride, padding, count_include_pad=False)
    return nn.Conv2d(channels, channels, kernel, stride, padding)


class Poolings:
    """The max-poolings of one pass, in order: what `Features` hands on to a decoder that undoes them.

    torch computes the indices for the backward pass anyway, so that remembering them costs nothing.
    """

    def __init__(self) -> None:
        self._indices: list[Tensor] = []
        self._sizes: list[tuple[int, int]] = []

    def through(self, layer: nn.Module, x: Tensor) -> Tensor:
        """(N, C, H, W) -> what `layer` makes of it; one that returns its indices is remembered."""
        if not (isinstance(layer, nn.MaxPool2d) and layer.return_indices):
            return layer(x)
        self._sizes.append((x.shape[-2], x.shape[-1]))
        x, indices = layer(x)
        self._indices.append(indices)
        return x

    def features(self, *stages: Tensor) -> Features:
        return Features(stages, tuple(self._indices), tuple(self._sizes))


class StochasticDepth(nn.Module):
    """Drops the residual branch of a sample with probability `rate` in training (Huang et al. 2016).

    The paper draws once a mini-batch and multiplies by the survival probability in evaluation. Here each
    sample has its own draw and survivors are divided by that probability in training, which has the same
    mean and leaves evaluation to the network as it is.
    """

    def __init__(self, rate: DropRate) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"expected a stochastic depth rate in [0, 1), received {rate}")
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        if not self.training or self.rate == 0:
            return branch
        survival = 1 - self.rate
        kept = branch.new_empty(branch.shape[0], 1, 1, 1).bernoulli_(survival)
        return branch * (kept / survival)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


def linear_decay(rate: float, count: int) -> list[float]:
    """Drop rates of `count` blocks, rising linearly to `rate` at the last (Huang et al. 2016, eq. 4)."""
    return [rate * (block + 1) / count for block in range(count)]


class FeatureModule(ConvNet):
    """A network whose `features` is a submodule, as torchvision's keys `features.N.weight` ask for.

    The submodule, called with images, returns `Features`; for a caller it is the method of the base class.
    """

    @property
    def features(self) -> Callable[[Tensor], Features]:  # type: ignore[override]
        return self._modules["features"]  # type: ignore[return-value]

    @features.setter
    def features(self, module: nn.Module) -> None:
        # nn.Module registers a module before it looks for a property, so only something else arrives here
        raise TypeError(f"expected a module as the network's features, received {type(module).__name__}")
