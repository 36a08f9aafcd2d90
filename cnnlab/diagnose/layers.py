"""The Hessian layer by layer: the blocks on its diagonal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cnnlab.diagnose.spectrum import Operator, Told, extremes, flat, hessian_of, interval, quiet, unflat
from cnnlab.train.objective import Objective


@dataclass(frozen=True)
class Block:
    """The Hessian with respect to one layer's own weights (`parameters` of them).

    `largest` and `smallest`: its extreme eigenvalues, with the larger of their residuals, within which an eigenvalue
    surely lies. `trace` and the half width of its 95 % interval `trace_error` (Hutchinson, over the signs of the whole
    network at once: the blocks beside the diagonal add noise and no bias).
    """

    layer: str
    parameters: int
    largest: float
    smallest: float
    residual: float
    trace: float
    trace_error: float


def layers_of(objective: Objective) -> dict[str, list[int]]:
    """The places of each layer's own parameters among those that train, by module, in the network's order."""
    found: dict[str, list[int]] = {}
    for place, name in enumerate(objective.names):
        found.setdefault(name.rpartition(".")[0], []).append(place)
    return found


def blocks(
    objective: Objective,
    *,
    products: int = 12,
    probes: int = 4,
    tolerance: float = 1e-2,
    seed: int = 0,
    told: Told = quiet,
) -> list[Block]:
    """Every layer's block.

    Args:
        products: Hessian-vector products a layer, at most, each of which costs as much as one of the whole network.
        probes: random vectors of the traces.
    """
    whole, like = hessian_of(objective), objective.parameters
    traces = _traces(whole, like, probes, seed, told)
    groups = layers_of(objective)
    found = []
    for number, (layer, places) in enumerate(groups.items()):
        own = [like[place] for place in places]
        size = sum(p.numel() for p in own)

        def product(vector: Tensor, own: list[Tensor] = own, places: list[int] = places) -> Tensor:
            spread = [torch.zeros_like(p) for p in like]
            for place, part in zip(places, unflat(vector, own), strict=True):
                spread[place] = part
            image = unflat(whole(flat(spread)), like)
            return flat([image[place] for place in places])

        operator = Operator(product, size, whole.device, whole.dtype)
        eigen = extremes(operator, tolerance=tolerance, most=products, seed=seed)
        told("layers", number + 1, len(groups))
        trace, error = interval([float(sum(probe[place] for place in places)) for probe in traces])
        ends = (eigen.largest, eigen.smallest, max(eigen.residuals))
        found.append(Block(layer, size, *ends, trace, error))
    return found


def _traces(whole: Operator, like: list[Tensor], probes: int, seed: int, told: Told) -> list[list[float]]:
    """zᵀ(H·z) of each parameter, for each probe z of signs."""
    found = []
    for number in range(probes):
        signs = whole.probe(seed, 1 + number, signs=True)
        pairs = zip(unflat(signs, like), unflat(whole(signs), like), strict=True)
        found.append([float((z * image).sum(dtype=torch.float64)) for z, image in pairs])
        told("traces", number + 1, probes)
    return found
