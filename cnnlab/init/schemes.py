"""Schemes that need nothing but the shape of a layer."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from cnnlab.init.base import Fans, Initializer, Layer, grouped_view
from cnnlab.schema import NonNegative, Positive

Distribution = Literal["normal", "uniform"]


def draw(shape: torch.Size, variance: float, distribution: Distribution, rng: torch.Generator) -> Tensor:
    """A tensor with mean 0 and the given variance: N(0, v), or U(-√3v, √3v)."""
    if distribution == "normal":
        return torch.randn(shape, generator=rng) * math.sqrt(variance)
    return (torch.rand(shape, generator=rng) * 2 - 1) * math.sqrt(3 * variance)


class Default(Initializer):
    """PyTorch's own: weight and bias from U(-1/√n, 1/√n), so that Var(w) = 1/(3n).

    n is the fan-in as PyTorch counts it, the weight's second axis times the kernel, which for a transposed
    convolution is a unit's *out*-fan (the same as `nn.Conv2d.reset_parameters`).
    """

    def weight(self, layer: Layer, rng: torch.Generator) -> Tensor:
        return self._uniform(layer.weight, layer, rng)

    def bias(self, layer: Layer, rng: torch.Generator) -> Tensor:
        return self._uniform(layer.bias, layer, rng)

    def _uniform(self, parameter: Tensor | None, layer: Layer, rng: torch.Generator) -> Tensor:
        assert parameter is not None
        return draw(parameter.shape, 1 / (3 * layer.weight[0].numel()), "uniform", rng)


class Constant(Initializer):
    """Every weight equal to `value`; all units of a layer compute the same and get the same gradient."""

    def __init__(self, value: float = 0.01, *, zero_residual: bool = False):
        super().__init__(zero_residual=zero_residual)
        self.value = value

    def weight(self, layer: Layer, rng: torch.Generator) -> Tensor:
        return torch.full(layer.weight.shape, float(self.value))


class Zeros(Constant):
    """Every weight 0: no signal and no gradient passes, but for the last layer's."""

    def __init__(self, *, zero_residual: bool = False):
        super().__init__(0.0, zero_residual=zero_residual)


class Normal(Initializer):
    """N(0, std²), one width for all layers."""

    def __init__(self, std: Positive = 0.01, *, zero_residual: bool = False):
        super().__init__(zero_residual=zero_residual)
        self.std = std

    def weight(self, layer: Layer, rng: torch.Generator) -> Tensor:
        return draw(layer.weight.shape, self.std**2, "normal", rng)


class TruncatedNormal(Initializer):
    """N(0, std²) conditioned on |w| <= cut·std. `std` is the normal's: for cut 2 the weights' own is 0.88
    times it.

    Sampled by the inverse of the distribution function, w = std·√2·erfinv(u) with u in ±erf(cut/√2).
    """

    def __init__(self, std: Positive = 0.02, cut: Positive = 2.0, *, zero_residual: bool = False):
        super().__init__(zero_residual=zero_residual)
        self.std = std
        self.cut = cut

    def weight(self, layer: Layer, rng: torch.Generator) -> Tensor:
        u = (torch.rand(layer.weight.shape, generator=rng, dtype=torch.float64) * 2 - 1) * math.erf(
            self.cut / math.sqrt(2)
        )
        limit = self.cut * self.std
        return (torch.erfinv(u) * (math.sqrt(2) * self.std)).clamp(-limit, limit).float()


class LeCun(Initializer):
    """n·Var(w) = 1 with n the fan-in: keeps the variance of a linear unit
    (LeCun, Bottou, Orr, Müller 1998, "Efficient BackProp", equation 16)."""

    def __init__(self, distribution: Distribution = "normal", *, zero_residual: bool = False):
        super().__init__(zero_residual=zero_residual)
        self.distribution = distribution

    def weight(self, layer: Layer, rng: torch.Generator) -> Tensor:
        return draw(layer.weight.shape, 1 / Fans.of(layer).fan_in, self.distribution, rng)


class Xavier(Initializer):
    """Var(w) = gain²·2/(fan_in + fan_out): a compromise between keeping activations' and gradients' variance
    (Glorot & Bengio 2010, equation 12; uniform: equation 16)."""

    def __init__(self, distribution: Distribution = "uniform", gain: Positive = 1.0, *, zero_residual: bool = False):
        super().__init__(zero_residual=zero_residual)
        self.distribution = distribution
        self.gain = gain

    def weight(self, layer: Layer, rng: torch.Generator) -> Tensor:
        fans = Fans.of(layer)
        variance = 2 * self.gain**2 / (fans.fan_in + fans.fan_out)
        return draw(layer.weight.shape, variance, self.distribution, rng)


class He(Initializer):
    """Var(w) = 2/((1 + a²)·fan): makes up for the half that a rectifier of negative slope a cuts off
    (He et al. 2015, "Delving Deep into Rectifiers", equations 10, 14 and 15).

    Args:
        mode: which fan; `fan_in` keeps the variance of activations, `fan_out` that of gradients.
        distribution: of the weights; the paper's is normal.
        negative_slope: a; 0 is ReLU.
        zero_residual: see `Initializer`.
    """

    def __init__(
        self,
        mode: Literal["fan_in", "fan_out"] = "fan_out",
        distribution: Distribution = "normal",
        negative_slope: NonNegative = 0.0,
        *,
        zero_residual: bool = False,
    ):
        super().__init__(zero_residual=zero_residual)
        self.mode = mode
        self.distribution = distribution
        self.negative_slope = negative_slope

    def weight(self, layer: Layer, rng: torch.Generator) -> Tensor:
        fans = Fans.of(layer)
        fan = fans.fan_in if self.mode == "fan_in" else fans.fan_out
        return draw(layer.weight.shape, 2 / ((1 + self.negative_slope**2) * fan), self.distribution, rng)


class Orthogonal(Initializer):
    """Each group's weight, as a matrix (rows, columns·kernel), is `gain` times orthonormal rows, or columns
    where there are more rows (Saxe, McClelland, Ganguli 2014, "Exact solutions", section 3).

    A uniformly random orthogonal matrix: Q of the QR decomposition of a normal matrix, with the signs of R's
    diagonal (Mezzadri 2007, section 5).
    """

    def __init__(self, gain: Positive = 1.0, *, zero_residual: bool = False):
        super().__init__(zero_residual=zero_residual)
        self.gain = gain

    def weight(self, layer: Layer, rng: torch.Generator) -> Tensor:
        groups, rows, columns, kernel = grouped_view(layer)
        return self.gain * orthonormal(groups, rows, columns * kernel, rng).reshape(layer.weight.shape)


def orthonormal(batch: int, rows: int, columns: int, rng: torch.Generator) -> Tensor:
    """(batch, rows, columns) float32 with orthonormal rows, or columns where rows > columns."""
    # In float64, so that the float32 result is orthogonal to its last digit.
    matrix = torch.randn(batch, max(rows, columns), min(rows, columns), generator=rng).double()
    q, r = torch.linalg.qr(matrix)
    q = q * torch.diagonal(r, dim1=1, dim2=2).sign()[:, None, :]
    return (q if rows >= columns else q.transpose(1, 2)).float()


class Delta(Initializer):
    """A kernel whose only non-zero tap is its centre: there the identity, or a random orthogonal matrix
    (Xiao et al. 2018, "Dynamical Isometry and a Mean Field Theory of CNNs", section 2.4, delta-orthogonal).

    The identity passes input channel i to output channel i of its group, as far as both exist. A linear
    layer is a kernel with one tap.

    Args:
        gain: scale of the matrix.
        orthogonal: a random orthogonal matrix instead of the identity.
        zero_residual: see `Initializer`.
    """

    def __init__(self, gain: Positive = 1.0, orthogonal: bool = False, *, zero_residual: bool = False):
        super().__init__(zero_residual=zero_residual)
        self.gain = gain
        self.orthogonal = orthogonal

    def weight(self, layer: Layer, rng: torch.Generator) -> Tensor:
        groups, rows, columns, _ = grouped_view(layer)
        if self.orthogonal:
            matrix = orthonormal(groups, rows, columns, rng)
        else:
            matrix = torch.eye(rows, columns).expand(groups, rows, columns)
        weight = torch.zeros(layer.weight.shape)
        centre = weight
        for size in weight.shape[2:]:
            centre = centre.select(2, size // 2)
        centre.copy_(self.gain * matrix.reshape(groups * rows, columns))
        return weight
