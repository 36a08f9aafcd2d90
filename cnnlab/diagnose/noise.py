"""How much a batch's gradient differs from the whole one, and the batch size that follows from it.

McCandlish, Kaplan, Amodei et al. 2018, "An empirical model of large-batch training", sections 2.2 and A.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cnnlab import measure
from cnnlab.diagnose.spectrum import Told, quantile_t, quiet
from cnnlab.torch_private import foreach_add_
from cnnlab.train.forward import pieces
from cnnlab.train.objective import Objective

GROUPS = 8
"""Of batches, one left out at a time, for the interval."""
MIN_BATCHES = 8
"""Of a size, for its variance to be told."""


@dataclass(frozen=True)
class Variance:
    """Of the gradients of `batches` batches of `batch` samples: their squared distance from the expected gradient,
    E‖g_b - G‖², and the half width of its 95 % interval."""

    batch: float
    batches: int
    variance: float
    error: float


@dataclass(frozen=True)
class NoiseScale:
    """`scale` = tr(Σ) / ‖G‖² (McCandlish et al. 2018, eq. 2.9), in samples: the batch size below which twice the batch
    is worth nearly two updates, and above which it is not.

    `low` and `high` are its 95 % interval (Fieller 1954, on a delete-a-group jackknife): infinite at the top where the
    gradient cannot be told from the noise. `trace` is tr(Σ), `squared_gradient` ‖G‖², both without bias.
    """

    scale: float
    low: float
    high: float
    trace: float
    squared_gradient: float
    batch: float
    batches: int

    @property
    def suggestion(self) -> int | None:
        """The batch size that it suggests, a power of two; `None` where it is not known."""
        if not (math.isfinite(self.scale) and self.scale > 0):
            return None
        return 2 ** max(0, round(math.log2(self.scale)))


def variances(
    objective: Objective, sizes: Sequence[int], told: Told = quiet, *, own: int = 1
) -> tuple[list[Variance], NoiseScale | None]:
    """The variance of the gradient at each batch size, measured on real batches of that size cut from the objective's
    batch, and the noise scale from the size that is nearest to `own`.

    Independent samples make it tr(Σ)/b; batch statistics, which tie them together, need not. Penalties have no noise,
    but are part of the gradient. A size of which there are fewer than `MIN_BATCHES` is left out.
    """
    count = len(objective.batch["index"])
    sizes = sorted({size for size in sizes if count // size >= MIN_BATCHES})
    total = sum(count // size for size in sizes)
    found: list[Variance] = []
    scale, done = None, 0
    for size in sizes:
        gathered = _Gathered(size)
        for gradient in _gradients(objective, size):
            gathered.add(gradient)
            done += 1
            told(f"gradients of {size} samples", done, total)
        found.append(gathered.variance())
        if size == min(sizes, key=lambda size: abs(math.log(size / own))):
            scale = gathered.noise_scale()
    return found, scale


def exponent(found: Sequence[Variance]) -> float | None:
    """The slope of log variance over log batch, by least squares: -1 where the samples are independent; `None` of
    fewer than two sizes, or where there is no variance."""
    pairs = [(math.log(each.batch), math.log(each.variance)) for each in found if each.variance > 0]
    if len(pairs) < 2:
        return None
    x, y = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    return sum((a - x) * (b - y) for a, b in pairs) / sum((a - x) ** 2 for a, _ in pairs)


def _gradients(objective: Objective, size: int) -> Iterator[list[Tensor]]:
    """The gradient of each whole batch of `size` samples, one after the other, each with dropout of its own."""
    count = len(objective.batch["index"])
    used = {name: tensor[: count - count % size] for name, tensor in objective.batch.items()}
    for number, piece in enumerate(pieces(used, count // size)):
        yield replace(objective, batch=piece, count=None, accumulate=1, number=objective.number + number).gradient()


class _Gathered:
    """Sums over batches of one size, in `GROUPS` groups: every group's sum and squared norms."""

    def __init__(self, size: int):
        self.size = size
        self.squares: list[list[float]] = [[] for _ in range(GROUPS)]
        self.sums: list[list[Tensor] | None] = [None] * GROUPS
        self.number = 0

    def add(self, gradient: list[Tensor]) -> None:
        group = self.number % GROUPS
        self.number += 1
        self.squares[group].append(float(measure.dot(gradient, gradient)))
        own = self.sums[group]
        if own is None:
            self.sums[group] = [g.clone() for g in gradient]
        else:
            foreach_add_(own, gradient)

    def moments(self) -> list[tuple[float, float]]:
        """(tr Σ, ‖G‖²), of all batches first, then without each group."""
        parts = [part for part in self.sums if part is not None]
        gram = torch.tensor([[float(measure.dot(a, b)) for b in parts] for a in parts], dtype=torch.float64)
        counts = [len(part) for part in self.squares if part]
        squares = [sum(part) for part in self.squares if part]
        found = []
        for left in (None, *range(len(parts))):
            kept = torch.tensor([float(i != left) for i in range(len(parts))], dtype=torch.float64)
            n = sum(c for i, c in enumerate(counts) if i != left)
            mean_square = sum(s for i, s in enumerate(squares) if i != left) / n
            square_mean = float(kept @ gram @ kept) / n**2
            variance = (mean_square - square_mean) * n / (n - 1)  # of one batch's gradient
            found.append((variance * self.size, square_mean - variance / n))
        return found

    def variance(self) -> Variance:
        (trace, _), *others = self.moments()
        deviation = _jackknife([t for t, _ in others], [t for t, _ in others])
        half = quantile_t(len(others) - 1) * math.sqrt(deviation)
        return Variance(self.size, self.number, trace / self.size, half / self.size)

    def noise_scale(self) -> NoiseScale:
        (trace, square), *others = self.moments()
        traces, squares = ([pair[i] for pair in others] for i in (0, 1))
        low, high = ratio_interval(
            trace,
            square,
            _jackknife(traces, traces),
            _jackknife(squares, squares),
            _jackknife(traces, squares),
            quantile_t(len(others) - 1),
        )
        scale = trace / square if square > 0 else math.inf
        return NoiseScale(scale, low, high, trace, square, self.size, self.number)


def _jackknife(one: Sequence[float], other: Sequence[float]) -> float:
    """The (co)variance of two estimates from their values without each group (Quenouille 1956)."""
    n = len(one)
    a, b = sum(one) / n, sum(other) / n
    return (n - 1) / n * sum((x - a) * (y - b) for x, y in zip(one, other, strict=True))


def ratio_interval(
    above: float, below: float, var_above: float, var_below: float, covariance: float, t: float
) -> tuple[float, float]:
    """The interval of above/below for two estimates that are normal (Fieller 1954): the ratios r for which
    above - r·below does not differ from 0 by more than t deviations. 0 and infinity where they have no bound."""
    a = below**2 - t**2 * var_below
    b = above * below - t**2 * covariance
    c = above**2 - t**2 * var_above
    root = math.sqrt(max(0.0, b * b - a * c))
    if below > 0 and a > 0:
        return max(0.0, (b - root) / a), (b + root) / a
    # The denominator may be 0: all ratios above one, if the numerator may not.
    return ((b - root) / a if a < 0 < c else 0.0), math.inf
