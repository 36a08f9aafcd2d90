"""Brightness, contrast, saturation, hue and colour noise.

A factor f blends an image with something flat, f·image + (1 - f)·flat: black (brightness), the image's mean
grey (contrast), each pixel's own grey (saturation). Grey is ITU-R 601-2 luma, as PIL's. All but hue are
linear in the colour, so neighbours fold into one matrix; unlike PIL's and torchvision's, values are clamped
once, at the end of the pipeline, so that a darkening after a brightening gets back what was beyond white.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from torch import Tensor

from cnnlab.augment.base import Barrier, Colour, Draws, Placed, standard_normal
from cnnlab.augment.moments import channel_moments
from cnnlab.protocols import Batch, DataSpec, Split
from cnnlab.schema import NonNegative, Range

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey (ITU-R BT.601)."""


def apply_matrix(image: Tensor, matrix: Tensor) -> Tensor:
    """(N, C, H, W) colours through (N, C, C + 1) affine maps.

    Written out over the channels: a `matmul` would be rounded to TF32 or bfloat16 where those are allowed.
    """
    channels = image.shape[1]
    result = image[:, :1] * matrix[:, :, 0, None, None]
    for k in range(1, channels):
        result.addcmul_(image[:, k : k + 1], matrix[:, :, k, None, None])
    return result.add_(matrix[:, :, channels, None, None])


def compose_colour(second: Tensor, first: Tensor) -> Tensor:
    """The colour map that does `first`, then `second`, (N, C, C + 1)."""
    product = (second[:, :, :-1, None] * first[:, None, :, :]).sum(2)
    product[:, :, -1] += second[:, :, -1]
    return product


def luma_weights(channels: int, like: Tensor) -> Tensor:
    """(C,) weights of the channels in grey: luma for three, the plain mean otherwise."""
    weights = like.new_full((channels,), 1 / channels)
    if channels == 3:
        # Three fills on the device: a tensor of Python numbers would be a copy from the host.
        for channel, weight in enumerate(LUMA):
            weights[channel].fill_(weight)
    return weights


def _blend(factor: Tensor, channels: int, flat: Tensor | None = None) -> Tensor:
    """(N, C, C + 1): factor·colour + (1 - factor)·flat; `flat` is a map (·, C, C + 1), `None` black."""
    matrix = factor[:, None, None] * torch.eye(channels, channels + 1, device=factor.device)
    return matrix if flat is None else matrix + (1 - factor)[:, None, None] * flat


class _Jitter(Colour):
    """A blend whose factor is uniform in [max(0, 1 - strength), 1 + strength]."""

    draws = 1

    def __init__(self, strength: NonNegative = 0.2):
        self.strength = strength

    def factor(self, draws: Draws) -> Tensor:
        return draws.between(max(0.0, 1 - self.strength), 1 + self.strength)


class Brightness(_Jitter):
    """Multiplies all channels by a factor in [max(0, 1 - `strength`), 1 + `strength`]."""

    def matrix(self, draws: Draws) -> Tensor:
        return brightness_matrix(self.factor(draws), draws)


class Contrast(_Jitter):
    """Stretches about the image's mean grey by a factor in [max(0, 1 - `strength`), 1 + `strength`]."""

    needs_mean = True

    def matrix(self, draws: Draws) -> Tensor:
        return contrast_matrix(self.factor(draws), draws)


class Saturation(_Jitter):
    """Stretches about each pixel's grey by a factor in [max(0, 1 - `strength`), 1 + `strength`].

    One channel is its own grey: such images stay as they are.
    """

    def matrix(self, draws: Draws) -> Tensor:
        return saturation_matrix(self.factor(draws), draws)


def brightness_matrix(factor: Tensor, draws: Draws) -> Tensor:
    """(N, C, C + 1) for factors (N,)."""
    return _blend(factor, draws.channels)


def contrast_matrix(factor: Tensor, draws: Draws) -> Tensor:
    """(N, C, C + 1) for factors (N,); reads `draws.mean`."""
    assert draws.mean is not None, "contrast states needs_mean"
    grey = (draws.mean * luma_weights(draws.channels, factor)).sum(1)
    offset = torch.zeros(draws.channels + 1, device=factor.device)
    offset[-1].fill_(1.0)
    return _blend(factor, draws.channels, (grey[:, None, None] * offset).expand(-1, draws.channels, -1))


def saturation_matrix(factor: Tensor, draws: Draws) -> Tensor:
    """(N, C, C + 1) for factors (N,)."""
    weights = torch.cat([luma_weights(draws.channels, factor), factor.new_zeros(1)])
    return _blend(factor, draws.channels, weights.expand(1, draws.channels, -1))


class ColourShift(Colour):
    """Adds to each channel its own number uniform in ±`strength`: a change of the light's colour."""

    def __init__(self, strength: NonNegative = 0.1):
        self.strength = strength

    def num_draws(self, channels: int, size: tuple[int, int]) -> int:
        return channels

    def matrix(self, draws: Draws) -> Tensor:
        return _shift((draws.uniforms * 2 - 1) * self.strength)


def _shift(offset: Tensor) -> Tensor:
    """(N, C, C + 1) that adds (N, C)."""
    count, channels = offset.shape
    eye = torch.eye(channels, device=offset.device).expand(count, -1, -1)
    return torch.cat([eye, offset[:, :, None]], dim=2)


class PcaNoise(Colour):
    """AlexNet's colour noise: adds Σ pₖ·αₖ·λₖ, with αₖ ~ N(0, `sigma`²) drawn once an image and epoch.

    pₖ and λₖ are eigenvectors and eigenvalues of the covariance of the training pixels' colours in [0, 1]
    (Krizhevsky et al. 2012, section 4.1; any number of channels).
    """

    def __init__(self, sigma: NonNegative = 0.1):
        self.sigma = sigma
        self._placed = Placed()

    def num_draws(self, channels: int, size: tuple[int, int]) -> int:
        return channels

    def fit(self, split: Split, seed: int) -> None:
        _, covariance = channel_moments(split, seed)
        values, vectors = torch.linalg.eigh(covariance)
        # An eigenvector's sign is arbitrary: fixed, so that every LAPACK gives the same augmentation.
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        self._placed.replace({"directions": (vectors * largest.sign() * values.clamp(min=0)).float()})

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._placed.tensors)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._placed.replace(state)

    def matrix(self, draws: Draws) -> Tensor:
        directions = self._placed.get("directions", draws.uniforms.device)
        alpha = standard_normal(draws.uniforms) * self.sigma
        return _shift((directions * alpha[:, None, :]).sum(2))


class Hue(Barrier):
    """Turns the hue, in HSV, by a part of the circle uniform in ±`strength`. Clamps its input.

    One channel has no hue: such images stay as they are.
    """

    draws = 1
    bounded = True

    def __init__(self, strength: Annotated[float, Range(low=0, high=0.5)] = 0.1):
        self.strength = strength

    def supports(self, spec: DataSpec) -> str | None:
        if spec.channels in (1, 3):
            return None
        return f"expected images of 3 channels (or 1, which has no hue), received {spec.channels}"

    def apply(self, batch: Batch, draws: Draws) -> Batch:
        if draws.channels == 1:
            return batch
        turn = draws.between(-self.strength, self.strength)
        return {**batch, "image": turn_hue(batch["image"].clamp(0, 1), turn)}


def turn_hue(image: Tensor, turn: Tensor) -> Tensor:
    """(N, 3, H, W) in [0, 1] with the hue of each image moved by `turn` (N,) circles.

    Saturation S and value V stay. Back from HSV, with n = 5, 3, 1 for red, green and blue and
    k = (n + 6·hue) mod 6, a channel is V - V·S·max(0, min(k, 4 - k, 1)).
    """
    red, green, blue = image.unbind(1)
    value = image.amax(1)
    chroma = value - image.amin(1)
    divisor = torch.where(chroma == 0, 1.0, chroma)
    sixths = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    sixths = sixths + 6 * turn[:, None, None]
    channels = []
    for n in (5, 3, 1):
        k = (n + sixths).remainder(6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=1)
