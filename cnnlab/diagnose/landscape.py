"""What the loss looks like around the weights: curvature, slope, noise, and what they mean for training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from cnnlab import measure
from cnnlab.diagnose import noise
from cnnlab.diagnose.landscape_verdicts import Verdict, verdicts
from cnnlab.diagnose.layers import Block, blocks
from cnnlab.diagnose.spectrum import (
    Density,
    Eigenpairs,
    Operator,
    Told,
    density,
    extremes,
    hessian_of,
    quiet,
    refined,
    unflat,
)
from cnnlab.diagnose.surface import BEYOND, Line, Path, filter_normalized, length, line, path, surface
from cnnlab.protocols import Batch
from cnnlab.torch_private import NormBase
from cnnlab.train.forward import pieces
from cnnlab.train.nonfinite import returned_rate
from cnnlab.train.objective import Mode, Objective
from cnnlab.train.run import Run

PARTS = ("eigenvalues", "density", "noise", "surface")
"""What is measured unasked."""
MORE = ("layers",)
"""What costs some ten products a layer, and is measured where it is asked for."""
LEVELS = (16, 4)
"""Lanczos begins on this part of the samples, and goes on on the next one: of ten products on all of them two are
left."""
NEAR_ZERO = 1e-4
"""Part of the largest |λ| below which an eigenvalue says nothing of the condition."""
QUANTILE = 0.9
"""Part of the eigenvalues below which the condition by spectral mass looks."""


@dataclass(frozen=True)
class Settings:
    """What is measured, on how many samples, and how exactly."""

    samples: int = 2000
    mode: Mode = Mode.train
    dtype: torch.dtype = torch.float32
    parts: tuple[str, ...] = PARTS
    top: int = 3
    """Largest eigenvalues, with their vectors."""
    tolerance: float = 1e-3
    products: int = 60
    """For the eigenvalues, at most."""
    probes: int = 4
    """Random vectors, of which the density is a mean."""
    steps: int = 20
    """Of Lanczos, for each of them."""
    points: int = 15
    """A side of the surface."""
    directions: Literal["eigen", "random"] = "eigen"


def batch_for(run: Run, samples: int) -> Batch:
    """The coming batches of the run, as training gets them, cut at `samples`; all of a smaller training set."""
    found: list[Batch] = []
    step = run.clock.step
    for batch, _ in run.loaders["train"].images.batches(run.clock.epoch):
        found.append(run.interventions.batch(batch, step))
        step += 1
        if sum(len(part["index"]) for part in found) >= samples:
            break
    return {name: torch.cat([part[name] for part in found])[:samples] for name in found[0]}


def objective_for(run: Run, settings: Settings) -> Objective:
    """What the run minimizes on `batch_for`'s samples, cut into micro-batches of its own batch size, over which batch
    statistics are taken."""
    batch = batch_for(run, settings.samples)
    count = len(batch["index"])
    own = max(1, run.trainer.batch_size // run.step.accumulate)
    stated = run.objective(batch, mode=settings.mode, dtype=settings.dtype)
    return replace(stated, accumulate=max(1, round(count / own)))


@dataclass(frozen=True)
class Landscape:
    """What was measured; `document()` as plain values."""

    samples: int
    parameters: int
    loss: float
    gradient_norm: float
    weight_norm: float
    mode: str
    norms: str
    dtype: str
    eigen: Eigenpairs | None
    angles: list[float]
    """Degrees between the gradient and each eigenvector of `eigen`, 0 to 90; 90 for no gradient."""
    down: Line | None
    """Along the eigenvector of the smallest eigenvalue."""
    spectrum: Density | None
    variances: list[noise.Variance]
    scale: noise.NoiseScale | None
    grid: dict[str, Any] | None
    layers: list[Block]
    """Where they were asked for."""
    path: Path | None
    """To other weights, where such were given."""
    sharpness: dict[str, Any] | None
    verdicts: list[Verdict]

    @property
    def condition(self) -> dict[str, float | None]:
        return condition(self.eigen, self.spectrum)

    def document(self) -> dict[str, Any]:
        eigen, spectrum = self.eigen, self.spectrum
        found: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("samples", "parameters", "loss", "gradient_norm", "weight_norm", "mode", "norms", "dtype")
        }
        if eigen is not None:
            found["eigenvalues"] = {
                "largest": eigen.values[: eigen.top],
                "smallest": eigen.smallest,
                "residuals": eigen.residuals,
                "converged": eigen.converged,
                "products": eigen.products,
                "angles_to_gradient": self.angles,
                "condition": self.condition,
            }
        if self.down is not None:
            found["along_smallest"] = {**asdict(self.down), "drop": self.down.drop, "even_drop": self.down.even_drop}
        if spectrum is not None:
            names = ("trace", "negative", "outliers")
            pairs = (spectrum.trace, *shares(spectrum))
            told = {name: {"value": v, "error": e} for name, (v, e) in zip(names, pairs, strict=True)}
            found["spectrum"] = {**told, "curve": spectrum.curve()}
        if self.scale is not None:
            found["noise_scale"] = {**asdict(self.scale), "suggestion": self.scale.suggestion}
        if self.variances:
            found["variance"] = [asdict(each) for each in self.variances]
            found["variance_exponent"] = noise.exponent(self.variances)
        if self.path is not None:
            found["path"] = {**asdict(self.path), "barrier": self.path.barrier}
        if self.layers:
            found["layers"] = [asdict(each) for each in self.layers]
        found["sharpness"], found["surface"] = self.sharpness, self.grid
        return {**found, "verdicts": [asdict(each) for each in self.verdicts]}


def landscape(
    run: Run, settings: Settings | None = None, told: Told = quiet, towards: Mapping[str, Tensor] | None = None
) -> Landscape:
    """Measures a run where it stands. Nothing of it is changed: not its weights, buffers, gradients, modes or random
    state.

    Args:
        towards: other weights of the network, by name: the straight line to them is measured, and the surface lies in
            the plane of it and of a random direction.

    Raises `ValueError` for a mode, dtype or part that there is not, and for weights of another network.
    """
    settings = settings or Settings()
    objective = objective_for(run, settings)
    value, gradient = objective.value_and_gradient()
    operator, weights = hessian_of(objective), length(objective)
    parts, seed = settings.parts, run.experiment.seed
    eigen = down = spectrum = grid = scale = None
    angles: list[float] = []
    found: list[noise.Variance] = []
    ahead = None if towards is None else ahead_of(objective, towards)
    way = None if ahead is None else path(objective, ahead, settings.points, told)
    if "eigenvalues" in parts or ("surface" in parts and ahead is None):
        eigen = eigenpairs(objective, operator, settings, seed, told)
        angles = [angle(gradient, unflat(vector, gradient)) for vector in eigen.vectors]
        down = line(objective, unflat(eigen.smallest_vector, gradient), weights)
    if "density" in parts:
        spectrum = density(operator, probes=settings.probes, steps=settings.steps, seed=seed, told=told)
    if "noise" in parts:
        own = run.batch_size if settings.mode is Mode.train else 1  # batch statistics are those of that size
        found, scale = noise.variances(objective, batch_sizes(run, len(objective.batch["index"])), told, own=own)
    if "surface" in parts and ahead is not None:
        grid = _between(objective, ahead, settings.points, seed, told)
    elif "surface" in parts and eigen is not None:
        grid = _surface(objective, eigen, weights, settings, seed, told)
    by_layer = blocks(objective, seed=seed, told=told) if "layers" in parts else []
    sharp = sharpness(run, eigen)
    norm = float(measure.total_norm(gradient))
    return Landscape(
        samples=len(objective.batch["index"]),
        parameters=operator.size,
        loss=float(value),
        gradient_norm=norm,
        weight_norm=weights,
        mode=settings.mode.value,
        norms=norms_in_words(run, settings.mode),
        dtype=str(settings.dtype).removeprefix("torch."),
        eigen=eigen,
        angles=angles,
        down=down,
        spectrum=spectrum,
        variances=found,
        scale=scale,
        grid=grid,
        layers=by_layer,
        path=way,
        sharpness=sharp,
        verdicts=verdicts(float(value), norm, eigen, down, condition(eigen, spectrum), sharp, scale, run.batch_size),
    )


def eigenpairs(objective: Objective, operator: Operator, settings: Settings, seed: int, told: Told) -> Eigenpairs:
    """The extreme eigenpairs of the whole objective (`operator`), from those on a part of its micro-batches: few
    products of the whole are left, and they measure the residuals."""
    wanted: dict[str, Any] = {"top": settings.top, "tolerance": settings.tolerance, "most": settings.products}
    found: Eigenpairs | None = None
    for level in LEVELS:
        count = objective.accumulate // level
        if count < 1:
            continue
        part = hessian_of(first_pieces(objective, count))
        found = (
            extremes(part, **wanted, seed=seed, told=told)
            if found is None
            else refined(part, found.vectors, **wanted, told=told)
        )
    if found is None:
        return extremes(operator, **wanted, seed=seed, told=told)
    return refined(operator, found.vectors, **wanted, told=told)


def first_pieces(objective: Objective, count: int) -> Objective:
    """The objective on its first `count` micro-batches, as they are."""
    kept = pieces(objective.batch, objective.accumulate)[:count]
    batch = {name: torch.cat([piece[name] for piece in kept]) for name in kept[0]}
    return replace(objective, batch=batch, count=None, accumulate=count)


def angle(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Degrees between two lines, 0 to 90; 90 where one of them is no line."""
    lengths = float(measure.total_norm(one)) * float(measure.total_norm(other))
    cosine = abs(float(measure.dot(one, other))) / lengths if lengths > 0 else 0.0
    return math.degrees(math.acos(min(1.0, cosine)))


def batch_sizes(run: Run, samples: int) -> list[int]:
    """Halves of the run's batch size and doubles of it, of which there are enough batches; else those of `samples`."""
    largest = max(1, min(2 * run.batch_size, samples // noise.MIN_BATCHES))
    return sorted({max(2, largest // 2**i) for i in range(4)})


def condition(eigen: Eigenpairs | None, spectrum: Density | None) -> dict[str, float | None]:
    """`number`: λmax/λmin, where λmin is positive and not nearly zero; `mass`: λmax over the |λ| that 90 % of the
    eigenvalues do not exceed, where the density is known. `None` else."""
    if eigen is None or eigen.largest <= 0:
        return {"number": None, "mass": None}
    least, bulk = eigen.smallest, None if spectrum is None else spectrum.quantile(QUANTILE)
    positive = least - eigen.smallest_residual > NEAR_ZERO * eigen.largest
    return {"number": eigen.largest / least if positive else None, "mass": eigen.largest / bulk if bulk else None}


def shares(spectrum: Density) -> tuple[tuple[float, float], tuple[float, float]]:
    """The parts of the eigenvalues that are below -|λ|max/100, and that are above |λ|max/10, each with its error.
    Nearer to zero, quadrature does not tell signs apart: few nodes stand for the bulk."""
    largest = spectrum.quantile(1.0)
    return spectrum.share(high=-largest / 100), spectrum.share(low=largest / 10)


def sharpness(run: Run, eigen: Eigenpairs | None) -> dict[str, Any] | None:
    """λmax beside the largest curvature at which the run's optimizer is stable at the highest rate to come: 2/lr for
    gradient descent, (2 + 2β)/lr with heavy-ball momentum, (2 + 2β)/(lr·(1 + 2β)) with Nesterov's (Cohen et al. 2021).

    `limit` is `None` for what preconditions. L2 decay in the optimizer adds its rate to every eigenvalue, and is
    counted."""
    if eigen is None:
        return None
    rate = highest_rate(run)
    limit, decay = stable_curvature(run.optimizer, rate)
    found: dict[str, Any] = {"lr": rate, "largest": eigen.largest, "limit": None, "ratio": None}
    if limit is None:
        return found
    own = eigen.largest + decay
    return {**found, "largest": own, "limit": limit, "ratio": own / limit}


def stable_curvature(optimizer: torch.optim.Optimizer, rate: float) -> tuple[float | None, float]:
    """The largest curvature at which gradient descent by this optimizer is stable (`None` for what preconditions, and
    without a rate), and what its decay adds to every eigenvalue."""
    if not isinstance(optimizer, torch.optim.SGD) or rate <= 0:
        return None, 0.0
    group = optimizer.param_groups[0]
    beta = group["momentum"]
    return (2 + 2 * beta) / rate / (1 + 2 * beta if group["nesterov"] else 1), float(group["weight_decay"])


def highest_rate(run: Run) -> float:
    """The base group's highest rate from the coming update on, by 256 of them; of a run that is over, its last."""
    begin, end = min(run.clock.step, run.total_steps - 1), run.total_steps - 1
    steps = {begin + round(i * (end - begin) / 255) for i in range(256)}
    base = float(run.optimizer.param_groups[0]["base_lr"])
    own = returned_rate(run.clock.returned)
    return base * own * max(run.schedule.factor(step, run.total_steps) for step in steps)


def norms_in_words(run: Run, mode: Mode) -> str:
    """What the norm layers do in that mode."""
    if not any(isinstance(m, NormBase) and m.track_running_stats for m in run.model.modules()):
        return "no layer with running moments"
    return "moments of each micro-batch" if mode is Mode.train else "running moments"


def ahead_of(objective: Objective, towards: Mapping[str, Tensor]) -> list[Tensor]:
    """Other weights in the order, dtype and place of the objective's own.

    Raises `ValueError` where they are another network's.
    """
    found = []
    for name, own in zip(objective.names, objective.parameters, strict=True):
        other = towards.get(name)
        if other is None or other.shape != own.shape:
            has = "none" if other is None else f"one of {tuple(other.shape)}"
            raise ValueError(
                f"expected other weights of the same network: {name} is {tuple(own.shape)}, there is {has}"
            )
        found.append(other.detach().to(own))
    return found


def _between(objective: Objective, ahead: Sequence[Tensor], points: int, seed: int, told: Told) -> dict[str, Any]:
    """The plane through both weights and a random direction, filter-normalized, at a right angle to the way."""
    way = measure.moved(ahead, [p.detach() for p in objective.parameters], -1.0)
    distance = float(measure.total_norm(way))
    aside = filter_normalized(objective, seed, 0)
    along = float(measure.dot(aside, way)) / max(distance, 1e-30) ** 2
    aside = measure.normalized(measure.moved(aside, way, -along))
    reach = max(distance, 1e-30) / 2
    found = surface(objective, way, aside, ((-BEYOND, 1 + BEYOND), (-reach, reach)), points, told)
    return {**found, "directions": ["from these weights (0) to the other ones (1)", "random, at a right angle to it"]}


def _surface(
    objective: Objective, eigen: Eigenpairs, weights: float, settings: Settings, seed: int, told: Told
) -> dict[str, Any]:
    if settings.directions == "random":
        across, along = (filter_normalized(objective, seed, number) for number in range(2))
        names, reach = ("random, filter-normalized", "another one"), (1.0, 1.0)
    else:
        like = objective.parameters
        across, along = unflat(eigen.vectors[0], like), unflat(eigen.smallest_vector, like)
        names = ("eigenvector of λmax", "eigenvector of λmin")
        reach = (_reach(eigen.largest, objective, weights), _reach(eigen.smallest, objective, weights))
    ranges = ((-reach[0], reach[0]), (-reach[1], reach[1]))
    found = surface(objective, across, along, ranges, settings.points, told)
    return {**found, "directions": list(names)}


def _reach(curvature: float, objective: Objective, weights: float) -> float:
    """How far ½·λ·t² changes the loss by about itself; no further than half of ‖θ‖."""
    here = abs(float(objective.value())) + 1e-12
    return min(math.sqrt(2 * here / max(abs(curvature), 1e-30)), weights / 2)
