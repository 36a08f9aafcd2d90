"""What a network does with signals at initialization: forwards, backwards, and from input to output.

Networks are measured as they train (batch statistics, auxiliary heads), without dropout and stochastic depth. Weights,
buffers, modes, gradients and the random state are as before afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cnnlab import rng
from cnnlab.diagnose.following import Followed, Site
from cnnlab.diagnose.gaussian import Moments
from cnnlab.diagnose.theory import propagate_back, root
from cnnlab.init.data_driven import training_without_noise
from cnnlab.measure import effective_rank
from cnnlab.protocols import Outputs, as_outputs
from cnnlab.torch_private import NormBase

JACOBIAN_IMAGES = 4
DIRECTIONS = 16
"""Of the outputs, at most, in which the Jacobian is taken."""

Objective = Callable[[Outputs], Tensor]
"""Outputs to the losses of the samples, (N,)."""


@dataclass(frozen=True)
class Level:
    """Figures of one layer; NaN where there is none.

    `pre_std` is the standard deviation of what goes into the activation, `std` of what comes out, over all units,
    places and inputs, `signal` the part of it that is between inputs (of each unit at each place, about its mean), by
    which they can be told apart; `gradient` the root mean square of the gradient of a sample's loss there; `angle` the
    mean angle between two inputs' activations, in degrees.
    """

    pre_std: float
    std: float
    signal: float
    gradient: float
    angle: float


@dataclass(frozen=True)
class Layer:
    """An activation (or, in a network without, a convolution or linear layer), measured and as theory has it.

    `theory` is `None` where the theory has nothing to say. `effective_rank` is that of the inputs' activations.
    """

    name: str
    kind: str
    measured: Level
    theory: Level | None
    effective_rank: float


@dataclass(frozen=True)
class Jacobian:
    """Of the input-output map, of `JACOBIAN_IMAGES` images: singular values, largest first, each the mean over images.

    `exact` says whether they are those of all the outputs, rather than of `DIRECTIONS` random directions among them.
    """

    output: str
    singular_values: tuple[float, ...]
    exact: bool

    @property
    def condition(self) -> float:
        smallest = self.singular_values[-1]
        return self.singular_values[0] / smallest if smallest > 0 else math.inf


@dataclass(frozen=True)
class Signals:
    """What was measured of a network."""

    layers: tuple[Layer, ...]
    outputs: tuple[Layer, ...]
    jacobian: Jacobian
    input_angle: float
    input_rank: float


def measured(model: nn.Module, images: Tensor, objective: Objective) -> Signals:
    """Follows images through a network and the gradient of their losses back.

    Args:
        images: (N, C, H, W) as the network gets them, on its device, N >= 2.
        objective: of the network's outputs.

    Raises:
        ValueError: fewer than two images.
        Whatever the network raises.
    """
    if len(images) < 2:
        raise ValueError(f"expected at least two images, received {len(images)}")
    with torch.enable_grad(), training_without_noise(model), _keeping_moments(model):
        followed, outputs = _followed(model, images, objective, linear=False)
        if len(followed.sites) < 2:
            followed, outputs = _followed(model, images, objective, linear=True)
        propagate_back(followed.values)
        layers = tuple(map(_layer, followed.sites))
        ends = tuple(map(_layer, outputs))
        for module in model.modules():
            if isinstance(module, NormBase) and module.track_running_stats:
                module.eval()
        jacobian = jacobian_of(model, images[:JACOBIAN_IMAGES])
    return Signals(layers, ends, jacobian, Moments.measured(images).angle, effective_rank(images.flatten(1)))


def _followed(model: nn.Module, images: Tensor, objective: Objective, *, linear: bool) -> tuple[Followed, list[Site]]:
    followed = Followed(model, linear=linear)
    leaf = images.detach().clone().requires_grad_()
    start = leaf + 0  # a network may begin in place, which a leaf does not allow
    with followed.watching(start):
        outputs = as_outputs(model(start))
    ends = followed.end(outputs)
    torch.autograd.grad(objective(outputs).sum(), leaf, allow_unused=True)
    return followed, ends


@contextmanager
def _keeping_moments(model: nn.Module) -> Iterator[None]:
    """Lets batch norms keep the last batch's moments, by which `eval` then normalizes."""
    kept: list[tuple[Any, Any]] = [(m, m.momentum) for m in model.modules() if isinstance(m, NormBase)]
    for module, _ in kept:
        module.momentum = 1.0
    try:
        yield
    finally:
        for module, momentum in kept:
            module.momentum = momentum


def _layer(site: Site) -> Layer:
    level = Level(site.pre.std, site.post.std, site.signal, site.gradient, site.post.angle)
    theory = None
    if site.before is not None and site.after is not None and site.before.followed:
        before, after = site.before.moments, site.after.moments
        theory = Level(before.std, after.std, after.signal, root(site.after.gradient), after.angle)
    return Layer(site.name, site.kind, level, theory, site.rank)


def jacobian_of(model: nn.Module, images: Tensor) -> Jacobian:
    """The Jacobian of the network's first output by its input, image by image. The images must not see each other:
    batch norms are in evaluation.

    Args:
        images: (N, C, H, W).
    """
    leaf = images.detach().clone().requires_grad_()
    name, output = next(iter(as_outputs(model(leaf + 0)).items()))
    flat = output.float().flatten(1)
    exact = flat.shape[1] <= DIRECTIONS
    directions = torch.eye(flat.shape[1])
    if not exact:
        draws = torch.randn(flat.shape[1], DIRECTIONS, generator=rng.generator(0, "jacobian"))
        directions = torch.linalg.qr(draws)[0].T
    rows = []
    for direction in directions.to(flat):
        (row,) = torch.autograd.grad((flat @ direction).sum(), leaf, retain_graph=True, materialize_grads=True)
        rows.append(row.flatten(1))
    jacobians = torch.stack(rows, 1).double().cpu()
    finite = bool(torch.isfinite(jacobians).all())
    values = torch.linalg.svdvals(jacobians) if finite else jacobians.new_full((1, len(rows)), math.nan)
    return Jacobian(name, tuple(values.mean(0).tolist()), exact)
