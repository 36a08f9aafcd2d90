"""Norm layers by one signature, `factory(channels) -> nn.Module`, for feature maps (N, C, H, W).

Where a network is handed `None` it takes its own norm layer; `no_norm` is the request for none.
"""

from __future__ import annotations

from typing import Annotated

from torch import nn

from cnnlab.schema import NonNegative, Positive, PositiveInt, Range


def no_norm(channels: int) -> nn.Module:
    """The identity; the layer before it then has a bias."""
    return nn.Identity()


def batch(
    channels: int,
    *,
    eps: Positive = 1e-5,
    momentum: Annotated[float, Range(low=0, high=1)] = 0.1,
) -> nn.Module:
    """Batch normalization (Ioffe and Szegedy 2015): moments of each channel over the batch and the map.

    `momentum` is the weight of the new batch in the running moments that evaluation uses.
    """
    return nn.BatchNorm2d(channels, eps=eps, momentum=momentum)


def group(channels: int, *, groups: PositiveInt | None = None, eps: Positive = 1e-5) -> nn.Module:
    """Group normalization (Wu and He 2018): moments of each sample over a group of channels and the map.

    `groups=None` takes the largest divisor of `channels` up to the paper's 32 that leaves at least two
    channels a group: with one it would be instance normalization, which erases each channel's mean.

    Raises:
        ValueError: `groups` does not divide `channels`.
    """
    if groups is None:
        groups = max(count for count in range(1, 33) if channels % count == 0 and (count == 1 or 2 * count <= channels))
    if channels % groups:
        raise ValueError(
            f"expected a number of groups that divides {channels} channels, received {groups}; "
            f"norm.groups=null chooses one for each layer"
        )
    return nn.GroupNorm(groups, channels, eps=eps)


def layer(channels: int, *, eps: Positive = 1e-5) -> nn.Module:
    """Layer normalization (Ba, Kiros and Hinton 2016) of a map: moments of each sample over all of it."""
    return nn.GroupNorm(1, channels, eps=eps)


def instance(channels: int, *, eps: Positive = 1e-5) -> nn.Module:
    """Instance normalization (Ulyanov et al. 2016) with scale and shift: moments of each sample's channel."""
    return nn.InstanceNorm2d(channels, eps=eps, affine=True)


def local_response(
    channels: int,
    *,
    size: PositiveInt = 5,
    alpha: NonNegative = 1e-4,
    beta: NonNegative = 0.75,
    k: Positive = 2.0,
) -> nn.Module:
    """Local response normalization (Krizhevsky et al. 2012, section 3.3), with the paper's constants.

    b = a / (k + alpha * sum of a^2 over `size` neighboring channels)^beta. PyTorch's layer divides `alpha`
    by `size`, the paper does not; hence the product.
    """
    return nn.LocalResponseNorm(size, alpha=alpha * size, beta=beta, k=k)
