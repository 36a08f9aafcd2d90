"""The last step before the network: how values in [0, 1] are centred and scaled.

What a normalization knows of the data is computed on the training set only, by `fit`, and belongs to the
run's state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from cnnlab.augment.base import Placed, as_float
from cnnlab.augment.moments import channel_moments, image_moments
from cnnlab.protocols import DataSpec, Split
from cnnlab.schema import NonNegative, Positive

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_WHITENED = 3072
"""Values an image (32x32x3) up to which its covariance is inverted: 75 MB, and seconds on a CPU."""
_CONSTANT = 1e-6
"""Standard deviation below which a channel is constant up to rounding."""
_RANK = 1e-7
"""Eigenvalue, relative to the largest, below which there is only float32 rounding."""


class Normalize(ABC):
    """What every normalization has. To add one, subclass this, call its constructor, write a YAML."""

    def __init__(self) -> None:
        self._placed = Placed()

    @abstractmethod
    def __call__(self, image: Tensor) -> Tensor:
        """(N, C, H, W) uint8, or float in [0, 1], to (N, C, H, W) float32."""

    def supports(self, spec: DataSpec) -> str | None:
        """Why such images cannot be normalized so, or `None`. Asked once, when the pipeline is built."""
        return None

    def fit(self, split: Split, seed: int) -> None:  # noqa: B027 (some know all they need)
        """Computes what is needed of the training set, from at most `moments.MAX_IMAGES` random images."""

    def state_dict(self) -> dict[str, Tensor]:
        """What `fit` computed: CPU tensors."""
        return dict(self._placed.tensors)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state_dict` gave."""
        self._placed.replace(state)

    def describe(self) -> str:
        """One word for the pipeline's line."""
        return type(self).__name__


class Identity(Normalize):
    """Values in [0, 1] as they are."""

    def __call__(self, image: Tensor) -> Tensor:
        return as_float(image)


class Half(Normalize):
    """x / 255 - 0.5: values in [-0.5, 0.5], whatever the data."""

    def __call__(self, image: Tensor) -> Tensor:
        return as_float(image) - 0.5


class Channelwise(Normalize):
    """(x - mean) / std, with one mean and one standard deviation a channel.

    uint8 images go straight to the result, x·(1 / (255·std)) - mean / std, without a pass for x / 255.
    """

    def keep(self, mean: Tensor, std: Tensor) -> None:
        """Sets the (C,) mean and standard deviation, of values in [0, 1]."""
        self._placed.replace({"mean": mean.float(), "std": std.float()})

    def __call__(self, image: Tensor) -> Tensor:
        mean, std = (self._placed.get(name, image.device) for name in ("mean", "std"))
        scale = 1 / (std if image.is_floating_point() else 255 * std)
        return torch.mul(image, scale[:, None, None]).add_((-mean / std)[:, None, None])


class Standardize(Channelwise):
    """Mean 0 and standard deviation 1 in each channel of the training set; constant channels become 0."""

    def fit(self, split: Split, seed: int) -> None:
        mean, covariance = channel_moments(split, seed)
        std = covariance.diagonal().clamp(min=0).sqrt()
        self.keep(mean, torch.where(std < _CONSTANT, 1.0, std))


class Pretrained(Channelwise):
    """The mean and standard deviation that a pretrained network was trained with; by default ImageNet's."""

    def __init__(self, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[Positive, ...] = IMAGENET_STD):
        super().__init__()
        if len(mean) != len(std):
            raise ValueError(f"expected as many means as standard deviations, received {len(mean)} and {len(std)}")
        self.channels = len(mean)
        self.keep(torch.tensor(tuple(mean)), torch.tensor(tuple(std)))

    def supports(self, spec: DataSpec) -> str | None:
        if spec.channels == self.channels:
            return None
        return f"expected images of as many channels as means, {self.channels}, received {spec.channels}"


class PerImage(Normalize):
    """Mean 0 and standard deviation 1 in each image; a deviation below `epsilon` counts as `epsilon`."""

    def __init__(self, epsilon: Positive = 1e-3):
        super().__init__()
        self.epsilon = epsilon

    def __call__(self, image: Tensor) -> Tensor:
        image = as_float(image)
        centred = image - image.mean((1, 2, 3), keepdim=True)
        variance = centred.square().mean((1, 2, 3), keepdim=True)
        return centred / variance.sqrt().clamp(min=self.epsilon)


class _Whitening(Normalize):
    """W·(x - mean) of the flattened image, W from eigenvectors U and eigenvalues λ of the covariance."""

    def __init__(self, epsilon: NonNegative):
        super().__init__()
        self.epsilon = epsilon

    def supports(self, spec: DataSpec) -> str | None:
        values = spec.channels * spec.size[0] * spec.size[1]
        if values <= MAX_WHITENED:
            return None
        return (
            f"expected images of at most {MAX_WHITENED} values, as their covariance is inverted, "
            f"received {spec.channels}x{spec.size[0]}x{spec.size[1]} = {values}; take normalize=standardize"
        )

    @abstractmethod
    def weight(self, vectors: Tensor, scale: Tensor) -> Tensor:
        """W (D, D) from U (D, D), in columns, and (λ + epsilon)^-1/2 (D,), largest λ first."""

    def fit(self, split: Split, seed: int) -> None:
        mean, covariance = image_moments(split, seed)
        values, vectors = torch.linalg.eigh(covariance)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        # Directions in which the training set does not vary are left out instead of divided by zero.
        varies = values > values[0] * _RANK
        scale = torch.where(varies, (values + self.epsilon).rsqrt(), 0.0)
        self._placed.replace({"mean": mean.float(), "weight": self.weight(vectors, scale).float()})

    def __call__(self, image: Tensor) -> Tensor:
        mean, weight = (self._placed.get(name, image.device) for name in ("mean", "weight"))
        return ((as_float(image).flatten(1) - mean) @ weight.T).view(image.shape)


class PcaWhitening(_Whitening):
    """(λ + ε)^-1/2·Uᵀ(x - mean): uncorrelated, of variance λ / (λ + ε), the largest λ first.

    The result has the image's shape but no longer its geometry: it is for networks without convolutions.
    """

    def __init__(self, epsilon: NonNegative = 1e-3):
        super().__init__(epsilon)

    def weight(self, vectors: Tensor, scale: Tensor) -> Tensor:
        # An eigenvector's sign is arbitrary: fixed, so that every LAPACK gives the same network input.
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        return (vectors * largest.sign() * scale).T


class ZcaWhitening(_Whitening):
    """U(λ + ε)^-1/2·Uᵀ(x - mean): whitened, and still like the image (Krizhevsky 2009, appendix A)."""

    def __init__(self, epsilon: NonNegative = 1e-3):
        super().__init__(epsilon)

    def weight(self, vectors: Tensor, scale: Tensor) -> Tensor:
        return (vectors * scale) @ vectors.T
