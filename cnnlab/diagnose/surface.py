"""The loss along lines and over planes through the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cnnlab import measure, rng
from cnnlab.diagnose.spectrum import Told, quiet
from cnnlab.train.objective import Objective

LENGTHS = 9
"""Distances at which a line is measured on each side, by factors of two from 1/256 of the longest one on."""


@dataclass(frozen=True)
class Line:
    """f(θ + t·v) at the lengths t, with f(θ) at t = 0."""

    lengths: list[float]
    values: list[float]

    @property
    def drop(self) -> tuple[float, float]:
        """The largest fall below f(θ), and the t where it is; 0 at 0 where there is none."""
        here = self.values[self.lengths.index(0.0)]
        best = min(range(len(self.values)), key=lambda i: self.values[i])
        return (here - self.values[best], self.lengths[best]) if self.values[best] < here else (0.0, 0.0)

    @property
    def even_drop(self) -> tuple[float, float]:
        """The largest fall of the mean of f(θ + t·v) and f(θ - t·v) below f(θ), and its t: what the curvature gives,
        without the slope. 0 at 0 where there is none."""
        at = dict(zip(self.lengths, self.values, strict=True))
        falls = [(at[0.0] - (at[t] + at[-t]) / 2, t) for t in self.lengths if t > 0 and -t in at]
        return max([(fall, t) for fall, t in falls if fall > 0], default=(0.0, 0.0))


def line(objective: Objective, direction: Sequence[Tensor], longest: float) -> Line:
    """f along a direction of length 1, to `longest` on both sides."""
    sides = [longest / 2**i for i in range(LENGTHS)]
    lengths = [*(-t for t in sides), 0.0, *reversed(sides)]
    values = [float(objective.moved(direction, t).value()) if t else float(objective.value()) for t in lengths]
    return Line(lengths, values)


def filter_normalized(objective: Objective, seed: int, number: int) -> list[Tensor]:
    """A random direction in which each filter (first axis of a weight) has the norm of the network's own; biases and
    the weights of norm layers stay (Li et al. 2018, section 4)."""
    found = []
    for place, p in enumerate(objective.parameters):
        drawn = torch.randn(p.shape, generator=rng.generator(seed, "surface", number, place)).to(p)
        if p.ndim < 2:
            found.append(torch.zeros_like(drawn))
            continue
        rows, own = drawn.flatten(1), p.detach().flatten(1)
        scale = own.norm(dim=1, keepdim=True) / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
        found.append((rows * scale).view(p.shape))
    return found


@dataclass(frozen=True)
class Path:
    """f((1 - t)·θ + t·θ') at the places t, with θ at 0 and the other weights θ' at 1; `distance` is ‖θ' - θ‖.

    `barrier`: the most by which f exceeds, between them, the straight line from f(θ) to f(θ') (Frankle et al. 2020,
    "Linear mode connectivity and the lottery ticket hypothesis", section 2: its error barrier, of the loss); 0 where
    it nowhere does.
    """

    places: list[float]
    values: list[float]
    distance: float

    @property
    def barrier(self) -> float:
        at = dict(zip(self.places, self.values, strict=True))
        return max(0.0, *(at[t] - (1 - t) * at[0.0] - t * at[1.0] for t in self.places if 0 <= t <= 1))


BEYOND = 0.5
"""How far a path goes on at both ends, as a part of it."""


def path(objective: Objective, towards: Sequence[Tensor], points: int, told: Told = quiet) -> Path:
    """f on the straight line to other weights.

    Args:
        points: between both ends, with these; at least 3.
    """
    step = 1 / (points - 1)
    more = int(BEYOND / step)
    places = [0.0 if i == 0 else 1.0 if i == points - 1 else i * step for i in range(-more, points + more)]
    difference = measure.moved(towards, [p.detach() for p in objective.parameters], -1.0)
    values = []
    for number, t in enumerate(places):
        values.append(float(objective.moved(difference, t).value()))
        told("path", number + 1, len(places))
    return Path(places, values, float(measure.total_norm(difference)))


def surface(
    objective: Objective,
    across: Sequence[Tensor],
    along: Sequence[Tensor],
    ranges: tuple[tuple[float, float], tuple[float, float]],
    points: int,
    told: Told = quiet,
) -> dict[str, Any]:
    """`x` and `y` (points,) lengths along two directions, and `loss` (points, points), its rows those of `y`."""
    xs, ys = (torch.linspace(low, high, points, dtype=torch.float64).tolist() for low, high in ranges)
    loss = []
    for row, y in enumerate(ys):
        start = objective.moved(along, y)
        loss.append([float(start.moved(across, x).value()) for x in xs])
        told("surface", (row + 1) * points, points * points)
    return {"x": xs, "y": ys, "loss": loss}


def length(objective: Objective) -> float:
    """‖θ‖."""
    return float(measure.total_norm(objective.parameters))
