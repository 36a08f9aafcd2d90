"""What a landscape's figures mean, in words; every verdict with its evidence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cnnlab.diagnose.noise import NoiseScale
from cnnlab.diagnose.spectrum import Eigenpairs
from cnnlab.diagnose.surface import Line

FLAT = 1e-3
"""Part of the loss that a step of 1/|λ|max along the gradient gains at most, where the slope counts as none."""
NEGATIVE = 1e-3
"""Part of λmax by which λmin must be negative, to be one."""
CERTAIN = 0.1
"""Largest residual of λmin, as a part of it, for a verdict on its sign."""
SEEN = 1e-6
"""Part of the loss that a drop must have, to be more than rounding."""
ILL = 1e3


@dataclass(frozen=True)
class Verdict:
    """`name`: minimum, saddle, slope, undecided, ill-conditioned, edge, noise; `text` says why, with the figures."""

    name: str
    text: str


def verdicts(
    loss: float,
    gradient_norm: float,
    eigen: Eigenpairs | None,
    down: Line | None,
    condition: Mapping[str, float | None],
    sharpness: Mapping[str, Any] | None,
    scale: NoiseScale | None,
    batch_size: int,
) -> list[Verdict]:
    """The verdicts that the figures allow, the kind of point first."""
    found = []
    if eigen is not None and down is not None:
        found.append(_point(loss, gradient_norm, eigen, down))
    found += _conditioned(condition)
    if sharpness is not None and sharpness["limit"] is not None:
        found.append(_edge(sharpness))
    if scale is not None:
        found.append(_noise(scale, batch_size))
    return found


def _point(loss: float, slope: float, eigen: Eigenpairs, down: Line) -> Verdict:
    largest, least = eigen.largest, eigen.smallest
    size = max(abs(largest), abs(least))
    gain = slope**2 / (2 * size) if size > 0 else math.inf if slope > 0 else 0.0
    flat = gain <= FLAT * abs(loss) or gain < 1e-12
    certain = eigen.smallest_residual <= max(CERTAIN * abs(least), NEGATIVE * size)
    bends_down = certain and least < -NEGATIVE * size
    drop, at = down.even_drop
    falls = drop > SEEN * abs(loss)
    seen = f"λmin = {least:.3g} (residual {eigen.smallest_residual:.1g}), λmax = {largest:.3g}"
    step = f"a step of 1/|λ|max along the gradient gains {gain:.2g} of a loss of {loss:.4g}"
    fell = f"along ±v the loss falls by {drop:.2g} at |t| = {at:.2g}, the slope left out"
    if not certain:
        return Verdict(
            "undecided", f"λmin has not converged: {seen}, after {eigen.products} products; give it more (--products)"
        )
    if flat and bends_down and falls:
        return Verdict("saddle", f"no slope ({step}), and a way down: {seen}; {fell}")
    if flat and bends_down:
        return Verdict("undecided", f"no slope ({step}); {seen}, but no drop of the loss was measured along ±v")
    if flat:
        return Verdict("minimum", f"no slope ({step}), and no way down among the samples: {seen}")
    if bends_down:
        more = fell if falls else "no drop of the loss was measured along ±v"
        return Verdict("slope", f"on a slope ({step}) that also bends down: {seen}; {more}")
    return Verdict("slope", f"on a slope ({step}) that bends up in all directions: {seen}")


def _conditioned(condition: Mapping[str, float | None]) -> list[Verdict]:
    number, mass = condition["number"], condition["mass"]
    kappa = number if number is not None else mass
    if kappa is None or kappa < ILL:
        return []
    what = "λmax/λmin" if number is not None else "λmax over the |λ| of 90 % of the weights"
    root = math.sqrt(kappa)
    beta = ((root - 1) / (root + 1)) ** 2
    return [
        Verdict(
            "ill-conditioned",
            f"{what} = {kappa:.2g}: plain gradient descent needs about {kappa:.2g} updates to forget a flat direction "
            f"to 1/e², momentum of {beta:.4g} about {root:.2g} (Polyak 1964); a preconditioner (optim=adamw, muon, "
            "newton_cg) makes them more alike",
        )
    ]


def _edge(sharpness: Mapping[str, Any]) -> Verdict:
    ratio = sharpness["ratio"]
    seen = f"λmax = {sharpness['largest']:.3g}, and the rate of {sharpness['lr']:.3g} is stable up to "
    seen += f"{sharpness['limit']:.3g}"
    if ratio > 1.2:
        return Verdict("edge", f"too sharp for the rate, so it will oscillate or leave: {seen}")
    if ratio > 0.8:
        return Verdict("edge", f"at the edge of stability: {seen}")
    return Verdict("edge", f"the rate could be about {1 / ratio:.2g} times as large, if the curvature stays: {seen}"
                   if ratio > 0 else f"no curvature limits the rate: {seen}")  # fmt: skip


def _noise(scale: NoiseScale, batch_size: int) -> Verdict:
    if not math.isfinite(scale.scale):
        return Verdict("noise", f"the gradient cannot be told from its noise in {scale.batches} batches; measure more")
    high = f"to {scale.high:.2g}" if math.isfinite(scale.high) else "up, without a bound"
    seen = f"noise scale {scale.scale:.3g} samples (95 %: {scale.low:.2g} {high})"
    if batch_size < scale.low:
        words = f"below it, a batch of {batch_size} can be doubled for nearly half as many updates"
    elif batch_size > scale.high:
        words = f"above it, a batch of {batch_size} buys little for its samples"
    else:
        words = f"a batch of {batch_size} is within it"
    return Verdict("noise", f"{seen}: {words}; it suggests {scale.suggestion}")
