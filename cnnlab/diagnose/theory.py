"""Mean-field theory of any network: its moments and its gradients' moments, place by place, followed through a forward
pass.

Of each value the theory knows what it would be on average over random weights: second moments at each place of each
input (zero padding so counts where it is), and the inner product with the next input. A convolution of independent
weights of mean 0 maps second moments by the weights' own, E w² at each entry of the kernel (Xiao et al. 2018,
arXiv 1806.05393, eq. 2.5); those are read from the weights, so that the theory holds for any init, one of a stranger's
included. Backwards each step is the adjoint, with E φ'² in the activation's place, as if the weights of the way back
were drawn anew (Schoenholz et al. 2017, section 3, eq. 12). A norm layer divides by what the theory says that it sees
(Yang et al. 2019, arXiv 1902.08129); the share of it that is a channel's own mean is read from the pass, and so are the
moments behind a pooling. Where it cannot follow (attention, gates) it begins anew at the values measured there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cnnlab.diagnose.gaussian import Activation, Moments, activated, slope_at_largest

Adjoint = Callable[[Tensor], Tensor]
"""(N, 1, ...) second moments of the gradient at an output, to those at an input."""

_CERTAIN = 25.0
"""A mean of the weights is none of chance where its square is so many times what chance gives."""
_ROUNDING = 1e-30


@dataclass
class Value:
    """A tensor of the pass as the theory has it.

    `followed` is false where the theory begins anew, at moments that were measured. `gradient` is (N, 1, ...), the
    second moment of the loss's gradient, once `propagate_back` has come here; `arrived` is the measured one, of
    a tensor that something reads which the theory does not know. `at_largest` says, behind an activation, by how much
    more of the gradient passes at the largest of so many places than at any.
    """

    moments: Moments
    followed: bool
    axis: int = 1
    before: list[tuple[Value, Adjoint]] = field(default_factory=list)
    gradient: Tensor | None = None
    arrived: Tensor | None = None
    watched: bool = False
    at_largest: Callable[[float], Tensor] | None = None

    def note_gradient(self, gradient: Tensor) -> None:
        """For a hook on the tensor: what really arrives there."""
        square = gradient.detach().double().square().movedim(self.axis, 1).mean(1, keepdim=True)
        self.arrived = square if self.arrived is None else self.arrived + square


def propagate_back(values: Sequence[Value]) -> None:
    """Fills in `gradient`, from the measured ones at the ends, once the backward pass is done.

    Args:
        values: in the order in which they came to be.
    """
    for value in reversed(values):
        if value.watched:
            value.gradient = value.arrived
        if value.gradient is None:
            continue
        for before, adjoint in value.before:
            part = adjoint(value.gradient)
            before.gradient = part if before.gradient is None else before.gradient + part


# ---- what each operation does to moments; `None` where the theory has no word for it ----


def through_activation(activation: Activation, before: Value) -> Value | None:
    """Behind an activation that acts on each element by itself."""
    try:
        moments, slope = activated(activation, before.moments)
    except (RuntimeError, ValueError, TypeError, IndexError):  # one that wants a map of channels
        return None

    def at_largest(count: float) -> Tensor:
        return torch.where(slope > 0, slope_at_largest(activation, before.moments, count) / slope, 1.0)

    return Value(moments, True, before.axis, [(before, lambda g: g * slope)], at_largest=at_largest)


def through_weights(
    operation: Callable[..., Tensor], before: Value, weight: Tensor, bias: Tensor | None, **geometry: Any
) -> Value | None:
    """Behind a convolution, transposed or not; `operation` is the function that computes it."""
    transposed = "output_padding" in geometry
    groups = geometry.pop("groups", 1)
    square = _second_moment(weight)
    if square is None:
        return None
    kernel = square[None, None]
    if transposed:  # (in, out/groups, ...)
        terms, reached = weight.shape[0] / groups, weight.shape[1]
    else:  # (out, in/groups, ...)
        terms, reached = weight.shape[1], weight.shape[0] / groups
    added = _mean_square(bias)

    def run(x: Tensor) -> Tensor:
        return operation(x, kernel, None, **geometry)

    m = before.moments
    second, cross = run(m.second) * terms + added, run(m.cross) * terms + added
    found = Moments(torch.zeros_like(second), second, cross)
    return Value(found, True, 1, [(before, _adjoint_of(run, m.second, reached))])


def through_linear(before: Value, weight: Tensor, bias: Tensor | None) -> Value | None:
    """Behind a linear layer over the last axis."""
    square = _second_moment(weight)
    if square is None:
        return None
    m, added, (outputs, inputs) = before.moments, _mean_square(bias), weight.shape
    second, cross = m.second * (square * inputs) + added, m.cross * (square * inputs) + added
    found = Moments(torch.zeros_like(second), second, cross)
    return Value(found, True, before.axis, [(before, lambda g: g * (square * outputs))])


def _second_moment(weight: Tensor) -> Tensor | None:
    """E w² at each entry of the kernel; `None` for weights whose mean is none of chance: they are not random."""
    w = weight.detach().double()
    square, mean = w.square().mean((0, 1)), w.mean((0, 1))
    chance = (square - mean.square()).clamp_min(0).sum() / (w.shape[0] * w.shape[1])
    if not bool(torch.isfinite(square).all()) or bool(mean.square().sum() > _CERTAIN * chance + _ROUNDING):
        return None
    return square


def _mean_square(parameter: Tensor | None) -> float:
    return 0.0 if parameter is None else float(parameter.detach().double().square().mean())


def _adjoint_of(run: Callable[[Tensor], Tensor], like: Tensor, factor: float) -> Adjoint:
    """`factor` times the adjoint of a linear map of places."""

    def adjoint(gradient: Tensor) -> Tensor:
        with torch.enable_grad():
            x = torch.zeros_like(like).requires_grad_()
            (found,) = torch.autograd.grad(run(x), x, gradient)
        return found * factor

    return adjoint


class Subtracted:
    """What a norm layer takes away, measured: of its input as shares of the mean square, `own` of each input's,
    `shared` of the product of two inputs'; of the gradient on its way back all but `left`, which has neither a mean nor
    a part along the normalized values (Ioffe & Szegedy 2015, section 3).

    Args:
        groups: arranges a tensor in the groups that share moments, (groups, members).
        x: the layer's input.
    """

    def __init__(self, groups: Callable[[Tensor], Tensor], x: Tensor):
        self._groups = groups
        self._x = x.detach()
        values, following = groups(self._x).double(), groups(self._x.roll(-1, 0)).double()
        square = float(values.square().mean())
        mean, other = values.mean(1), following.mean(1)
        self.own = float(mean.square().mean()) / square if square else 0.0
        self.shared = float((mean * other).mean()) / square if square else 0.0
        self.left = 1.0

    def note_gradient(self, gradient: Tensor) -> None:
        """For a hook on the layer's output."""
        arriving, values = self._groups(gradient.detach()).double(), self._groups(self._x).double()
        values = values - values.mean(1, keepdim=True)
        values = values / values.square().mean(1, keepdim=True).sqrt().clamp_min(_ROUNDING)
        taken = arriving.mean(1).square() + (arriving * values).mean(1).square()
        square = float(arriving.square().mean())
        self.left = max(0.0, 1 - float(taken.mean()) / square) if square else 1.0


def through_norm(
    before: Value, subtracted: Subtracted, eps: float, weight: Tensor | None, bias: Tensor | None, *, by_input: bool
) -> Value:
    """Behind a norm layer.

    Args:
        by_input: it takes each input's own moments, rather than the batch's.
    """
    m, gain = before.moments, 1.0 if weight is None else _mean_square(weight)
    level = m.second.flatten(1).mean(1) if by_input else m.second.mean().expand(len(m.second))
    level = level.reshape(-1, *[1] * (m.second.ndim - 1))
    variance = (level * (1 - subtracted.own)).clamp_min(0)
    scale = gain / (variance + eps)
    # The mean falls on each place by how strong the place is: near a zero padding it takes less away.
    strength = torch.where(level > 0, m.second / level, 0.0).clamp_min(0).sqrt()
    second = (m.second - (2 * strength - 1) * level * subtracted.own).clamp_min(0)
    dims = list(range(1 if by_input else 0, second.ndim))
    second = second * torch.where(second > 0, variance / second.mean(dims, keepdim=True), 0.0)
    product = (level * level.roll(-1, 0)).sqrt() * subtracted.shared
    product = (strength + strength.roll(-1, 0) - 1) * product
    added = _mean_square(bias)
    found = Moments(
        torch.zeros_like(second) + (0.0 if bias is None else float(bias.detach().double().mean())),
        second * scale + added,
        (m.cross - product) * (scale * scale.roll(-1, 0)).sqrt() + added,
    )
    return Value(found, True, before.axis, [(before, lambda g: g * (scale * subtracted.left))])


def through_sum(values: Sequence[Value]) -> Value:
    """Behind a sum of independent values, such as a branch and its shortcut."""
    left, right = (value.moments for value in values)
    found = Moments(
        left.mean + right.mean,
        left.second + right.second + 2 * left.mean * right.mean,
        left.cross + right.cross + left.mean * right.mean.roll(-1, 0) + right.mean * left.mean.roll(-1, 0),
    )
    return Value(found, _all_followed(values), values[0].axis, [(value, _same) for value in values])


def through_joining(values: Sequence[Value], channels: Sequence[int]) -> Value:
    """Behind a concatenation of channels: their mean, each by its share of them."""
    total = sum(channels)

    def mean(name: str) -> Tensor:
        parts = [getattr(v.moments, name) * (c / total) for v, c in zip(values, channels, strict=True)]
        return torch.stack(parts).sum(0)

    found = Moments(mean("mean"), mean("second"), mean("cross"))
    return Value(found, _all_followed(values), 1, [(value, _same) for value in values])


def through_scaling(before: Value, factor: float) -> Value:
    """Behind a multiplication by a number."""
    m, square = before.moments, factor * factor
    found = Moments(m.mean * factor, m.second * square, m.cross * square)
    return Value(found, before.followed, before.axis, [(before, lambda g: g * square)])


def through_places(before: Value, run: Callable[[Tensor], Tensor]) -> Value:
    """Behind an operation that takes some of the places (slices) and leaves the channels alone."""
    m = before.moments
    found = Moments(run(m.mean), run(m.second), run(m.cross))
    return Value(found, before.followed, before.axis, [(before, _adjoint_of(run, m.second, 1.0))])


def through_empty_channels(before: Value, share: float) -> Value:
    """Behind new channels of zeros; `share` of all channels are the ones before."""
    m = before.moments
    found = Moments(m.mean * share, m.second * share, m.cross * share)
    return Value(found, before.followed, before.axis, [(before, _same)])


def through_flattening(before: Value) -> Value:
    """Behind (N, C, ...) -> (N, C·...)."""
    m, shape = before.moments, before.moments.second.shape

    def flat(x: Tensor) -> Tensor:
        return x.flatten(1).mean(1, keepdim=True)

    found = Moments(flat(m.mean), flat(m.second), flat(m.cross))
    ones = [1] * (len(shape) - 2)
    return Value(found, before.followed, 1, [(before, lambda g: g.reshape(-1, 1, *ones).expand(shape))])


def through_pooling(
    before: Value, pooled: Tensor, average: Callable[[Tensor], Tensor], window: float, *, maximum: bool
) -> Value:
    """Behind a pooling: the moments are those measured, since they depend on how places go together; gradients are
    followed, of an average to all places of its window, of a maximum to one of them.

    Args:
        average: the average pooling of the same windows.
        window: its places.
    """
    like = before.moments.second
    back = _adjoint_of(average, like, 1.0 if maximum else 1 / window)
    if not maximum or before.at_largest is None:
        return Value(Moments.measured(pooled), False, 1, [(before, back)])
    more = before.at_largest(window)
    return Value(Moments.measured(pooled), False, 1, [(before, lambda g: back(g) * more)])


def _same(gradient: Tensor) -> Tensor:
    return gradient


def _all_followed(values: Sequence[Value]) -> bool:
    return all(value.followed for value in values)


def root(gradient: Tensor | None) -> float:
    """The root of the mean of second moments; NaN where there are none."""
    return math.nan if gradient is None else math.sqrt(float(gradient.mean()))
