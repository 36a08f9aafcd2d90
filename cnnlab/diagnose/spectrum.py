"""Eigenvalues, trace and spectral density of a symmetric operator of which only products are known.

Products come from `Objective.products`; nothing here knows of networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cnnlab import rng
from cnnlab.train.objective import Objective

BASIS_BYTES = 1 << 30
"""Memory for the basis of a Krylov space, at most (a network of 11 M weights: 22 vectors in fp32)."""
BASIS = 40
"""Vectors in it, at most."""
T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 15: 2.13, 31: 2.04}
"""Student's t at 97.5 %, by degrees of freedom."""

Told = Callable[[str, int, int], None]


def quiet(what: str, done: int, total: int) -> None:
    """Progress that nobody sees."""


@dataclass
class Operator:
    """v -> A·v on flat vectors (size,) of one device and dtype, counting its products."""

    product: Callable[[Tensor], Tensor]
    size: int
    device: torch.device
    dtype: torch.dtype
    products: int = 0

    def __call__(self, vector: Tensor) -> Tensor:
        self.products += 1
        return self.product(vector)

    def probe(self, seed: int, number: int, *, signs: bool = False) -> Tensor:
        """A random vector, (size,): normal, or of ±1 (Rademacher)."""
        generator = rng.generator(seed, "landscape", number)
        if signs:
            drawn = torch.randint(0, 2, (self.size,), generator=generator).double() * 2 - 1
        else:
            drawn = torch.randn(self.size, generator=generator, dtype=torch.float64)
        return drawn.to(self.device, self.dtype)

    def basis(self, wanted: int) -> int:
        """How many vectors a Krylov space may have."""
        room = BASIS_BYTES // (self.size * torch.finfo(self.dtype).bits // 8 + 1)
        return max(1, min(wanted, BASIS, self.size, max(8, room)))


def hessian_of(objective: Objective) -> Operator:
    """The Hessian of an objective at its weights, on flat vectors; one micro-batch's graph at a time."""
    like = objective.parameters
    size = sum(p.numel() for p in like)

    def product(vector: Tensor) -> Tensor:
        return flat(objective.hessian_vector(unflat(vector, like)))

    return Operator(product, size, like[0].device, like[0].dtype)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """One vector of a list of tensors."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def unflat(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The vector in the shapes of `like`."""
    parts = vector.split([t.numel() for t in like])
    return [part.view(t.shape) for part, t in zip(parts, like, strict=True)]


# ---- extreme eigenvalues ----


@dataclass(frozen=True)
class Eigenpairs:
    """The extreme eigenpairs of an operator: `values[i]` with the unit vector `vectors[i]` (size,) and the residual
    `residuals[i]` = ‖A·v - λ·v‖, measured by a product of its own, within which an eigenvalue surely lies. The `top`
    largest come first, in falling order, the `bottom` smallest after them, in rising order."""

    values: list[float]
    vectors: list[Tensor]
    residuals: list[float]
    top: int
    converged: bool
    products: int

    @property
    def largest(self) -> float:
        return self.values[0]

    @property
    def smallest(self) -> float:
        return self.values[self.top] if len(self.values) > self.top else self.values[-1]

    @property
    def smallest_vector(self) -> Tensor:
        return self.vectors[self.top] if len(self.vectors) > self.top else self.vectors[-1]

    @property
    def smallest_residual(self) -> float:
        return self.residuals[self.top] if len(self.residuals) > self.top else self.residuals[-1]


def extremes(
    operator: Operator,
    *,
    top: int = 1,
    bottom: int = 1,
    tolerance: float = 1e-3,
    most: int = 100,
    seed: int = 0,
    start: Tensor | None = None,
    told: Told = quiet,
) -> Eigenpairs:
    """The largest and smallest eigenvalues by Lanczos with full orthogonalization and thick restarts (Wu & Simon 2000).

    A Ritz value's error is about its residual squared over the gap to the next one, so a tolerance of 1e-3 gives
    about six digits.

    Args:
        tolerance: largest residual as a part of |λ|, or of the largest |λ| / 100 where |λ| is below that.
        most: products, at most.
        start: (size,) of the Krylov space; `None` draws one.
    """
    wanted = top + bottom
    space = operator.basis(max(4 * wanted, 24))
    v = torch.zeros(space + 1, operator.size, device=operator.device, dtype=operator.dtype)
    t = torch.zeros(space, space, dtype=torch.float64)
    v[0] = _unit(operator.probe(seed, 0) if start is None else start)
    began, done, converged = operator.products, 0, False
    while True:
        beta, j = 0.0, done
        for j in range(done, space):
            w = operator(v[j])
            told("eigenvalues", operator.products - began, most)
            overlap = torch.zeros(j + 1, dtype=torch.float64)
            for _ in range(2):  # once is not enough in finite precision (Giraud et al. 2005)
                part = v[: j + 1] @ w
                w = w - part @ v[: j + 1]
                overlap += part.double().cpu()
            t[: j + 1, j] = t[j, : j + 1] = overlap
            beta = float(torch.linalg.vector_norm(w))
            values, ritz = torch.linalg.eigh(t[: j + 1, : j + 1])
            scale = max(float(values.abs().max()), 1e-300)
            spent = operator.products - began >= most
            exact = beta <= 4 * torch.finfo(operator.dtype).eps * scale or j + 1 >= operator.size
            ends = _ends(len(values), top, bottom)
            bound = [tolerance * max(abs(float(values[i])), scale / 100) for i in ends]
            converged = exact or (
                j + 1 > wanted and all(beta * abs(float(ritz[-1, i])) <= b for i, b in zip(ends, bound))
            )
            if converged or spent:
                return _pairs(operator, v, values, ritz, ends, min(top, len(values)), converged, began)
            v[j + 1] = w / beta
        keep = _ends(space, *_kept(space, top, bottom))
        chosen = ritz[:, keep].to(operator.device, operator.dtype)
        v[: len(keep)] = chosen.T @ v[:space]
        v[len(keep)] = v[space]
        t.zero_()
        t[range(len(keep)), range(len(keep))] = values[keep]
        done = len(keep)


def refined(
    operator: Operator,
    start: Sequence[Tensor],
    *,
    top: int = 1,
    bottom: int = 1,
    tolerance: float = 1e-3,
    most: int = 100,
    told: Told = quiet,
) -> Eigenpairs:
    """`extremes` for who has vectors near the wanted ones: Rayleigh-Ritz on their span, which the residuals of what has
    not converged extend (Davidson 1975, without a preconditioner: from one vector it is the Krylov space). Vectors that
    are eigenvectors already are taken as the extreme ones: what lies at a right angle to all of `start` is not looked
    for.

    Args:
        start: (size,) vectors; at least as many products are made.
        tolerance, most: see `extremes`.
    """
    room = max(operator.basis(max(4 * (top + bottom), 24)), 2 * (top + bottom))
    began = operator.products
    vectors: list[Tensor] = []
    images: list[Tensor] = []
    coming = _orthonormal(start, vectors)[: operator.size]
    while True:
        for vector in coming:
            vectors.append(vector)
            images.append(operator(vector))
            told("eigenvalues", operator.products - began, most)
        v, w = torch.stack(vectors), torch.stack(images)
        t = (v.double() @ w.double().T).cpu()
        values, ritz = torch.linalg.eigh((t + t.T) / 2)
        ends = _ends(len(values), top, bottom)
        scale = max(float(values.abs().max()), 1e-300)
        found, along, apart = [], [], []
        for i in ends:
            mix = ritz[:, i].to(operator.device, operator.dtype)
            along.append(mix @ v)
            apart.append(mix @ w - float(values[i]) * along[-1])
            found.append(float(values[i]))
        residuals = [float(torch.linalg.vector_norm(r)) for r in apart]
        bounds = [tolerance * max(abs(value), scale / 100) for value in found]
        open_ones = [r for r, size, bound in zip(apart, residuals, bounds, strict=True) if size > bound]
        left = most - (operator.products - began)
        if len(vectors) + len(open_ones) > room:
            keep = _ends(len(values), *_kept(len(values), top, bottom))
            mix = ritz[:, keep].T.to(operator.device, operator.dtype)
            vectors, images = list(mix @ v), list(mix @ w)
        coming = _orthonormal(open_ones[: max(left, 0)], vectors)
        if not coming or len(vectors) >= operator.size:
            return Eigenpairs(found, along, residuals, min(top, len(values)), not open_ones, operator.products - began)


def _orthonormal(vectors: Sequence[Tensor], against: Sequence[Tensor]) -> list[Tensor]:
    """Unit vectors of what each adds to the span of those before it; none for what adds nothing."""
    found: list[Tensor] = []
    for vector in vectors:
        size = torch.linalg.vector_norm(vector)
        if not bool(size > 0):
            continue
        rest = vector / size
        basis = [*against, *found]
        if basis:
            matrix = torch.stack(basis)
            for _ in range(2):
                rest = rest - (matrix @ rest) @ matrix
        size = torch.linalg.vector_norm(rest)
        if bool(size > 32 * torch.finfo(vector.dtype).eps):
            found.append(rest / size)
    return found


def _ends(count: int, top: int, bottom: int) -> list[int]:
    """Places of the largest, falling, and of the smallest, rising, among `count` rising values; none twice."""
    high = list(range(count - 1, max(count - 1 - top, -1), -1))
    return high + [i for i in range(min(bottom, count)) if i not in high]


def _kept(space: int, top: int, bottom: int) -> tuple[int, int]:
    """How many Ritz vectors of each end begin the next space: what is wanted, and as many again as there is room."""
    more = max(0, space // 2 - top - bottom) // 2
    return (top + more if top else 0), (bottom + more if bottom else 0)


def _pairs(
    operator: Operator,
    v: Tensor,
    values: Tensor,
    ritz: Tensor,
    ends: Sequence[int],
    top: int,
    converged: bool,
    began: int,
) -> Eigenpairs:
    found, vectors, residuals = [], [], []
    for i in ends:
        vector = _unit(ritz[:, i].to(operator.device, operator.dtype) @ v[: len(values)])
        image = operator(vector)
        value = float(vector.double() @ image.double())
        residuals.append(float(torch.linalg.vector_norm(image - value * vector)))
        found.append(value)
        vectors.append(vector)
    return Eigenpairs(found, vectors, residuals, top, converged, operator.products - began)


def _unit(vector: Tensor) -> Tensor:
    return vector / torch.linalg.vector_norm(vector)


# ---- density ----


@dataclass(frozen=True)
class Density:
    """The spectrum as stochastic Lanczos quadrature sees it (Ghorbani et al. 2019; Lin, Saad & Yang 2016).

    `nodes[k]` and `weights[k]` are a probe's quadrature: λ and the share of the spectrum there (each sums to 1).
    """

    size: int
    nodes: list[Tensor]
    weights: list[Tensor]

    @property
    def trace(self) -> tuple[float, float]:
        """tr A and the half width of its 95 % interval (Hutchinson 1990: zᵀAz over random signs z), from the same
        products; the half width is infinite for a single probe."""
        return self._mean([float(w @ n) * self.size for n, w in self._probes()])

    def share(self, low: float = -math.inf, high: float = math.inf) -> tuple[float, float]:
        """Part of the eigenvalues in [low, high], and the half width of its 95 % interval."""
        return self._mean([float(w[(n >= low) & (n <= high)].sum()) for n, w in self._probes()])

    def quantile(self, part: float) -> float:
        """The least x for which `part` of the eigenvalues have |λ| <= x."""
        nodes, weights = torch.cat(self.nodes).abs(), torch.cat(self.weights) / len(self.nodes)
        order = nodes.argsort()
        at = int(torch.searchsorted(weights[order].cumsum(0), part).clamp_max(len(order) - 1))
        return float(nodes[order][at])

    def curve(self, points: int = 400, width: float = 0.01) -> dict[str, list[float]]:
        """`value`, the `density` there and the half width `error` of its 95 % interval over the probes, each (points,).

        Args:
            width: standard deviation of the Gaussian that smooths, as a part of the spectrum's extent.
        """
        low, high = min(float(n.min()) for n in self.nodes), max(float(n.max()) for n in self.nodes)
        extent = max(high - low, 1e-12 * max(abs(low), abs(high)), 1e-300)
        sigma = width * extent
        at = torch.linspace(low - 4 * sigma, high + 4 * sigma, points, dtype=torch.float64)
        each = torch.stack(
            [(torch.exp(-0.5 * ((at[:, None] - n) / sigma) ** 2) @ w) / (sigma * math.sqrt(2 * math.pi))
             for n, w in self._probes()]
        )  # fmt: skip
        mean, half = zip(*(self._mean(column.tolist()) for column in each.T))
        return {"value": at.tolist(), "density": list(mean), "error": list(half)}

    def _probes(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.nodes, self.weights, strict=True))

    def _mean(self, values: Sequence[float]) -> tuple[float, float]:
        return interval(values)


def density(operator: Operator, *, probes: int = 4, steps: int = 24, seed: int = 0, told: Told = quiet) -> Density:
    """Quadratures of `probes` random vectors of signs, each by `steps` of Lanczos with full orthogonalization."""
    space = operator.basis(steps)
    nodes, weights = [], []
    v = torch.zeros(space, operator.size, device=operator.device, dtype=operator.dtype)
    for number in range(probes):
        v[0] = _unit(operator.probe(seed, 1 + number, signs=True))
        alphas: list[float] = []
        betas: list[float] = []
        for j in range(space):
            w = operator(v[j])
            told("density", number * space + j + 1, probes * space)
            alphas.append(float(v[j].double() @ w.double()))
            for _ in range(2):
                w = w - (v[: j + 1] @ w) @ v[: j + 1]
            beta = float(torch.linalg.vector_norm(w))
            scale = max(map(abs, [*alphas, *betas]))
            if j + 1 == space or beta <= 4 * torch.finfo(operator.dtype).eps * scale:
                break
            betas.append(beta)
            v[j + 1] = w / beta
        values, vectors = torch.linalg.eigh(_tridiagonal(alphas, betas))
        nodes.append(values)
        weights.append(vectors[0].square())
    return Density(operator.size, nodes, weights)


def _tridiagonal(alphas: Sequence[float], betas: Sequence[float]) -> Tensor:
    t = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    if betas:
        off = torch.tensor(betas[: len(alphas) - 1], dtype=torch.float64)
        t += torch.diag(off, 1) + torch.diag(off, -1)
    return t


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the half width of its 95 % interval (Student); infinite for one value."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, math.inf
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, quantile_t(n - 1) * deviation / math.sqrt(n)


def quantile_t(degrees: int) -> float:
    """Student's t at 97.5 %; between the degrees that are listed, the larger one."""
    return T_95[max(known for known in T_95 if known <= degrees)]
