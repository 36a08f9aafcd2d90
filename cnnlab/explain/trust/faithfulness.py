"""Faithfulness: does the network's answer fall where a map says that its evidence is removed?

The measure is the one of ROAD (Rong et al. 2022, arXiv 2202.00449): the most relevant cells are removed first, and the
least relevant ones first, and the two answers are compared. F-Fidelity (arXiv 2410.02970) first fine-tunes the network
on random masking, so that what is removed is nothing new to it; nothing is trained here, so the infill has to look like
data instead, and like it at most half of the image is removed, the same number of cells for all maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from cnnlab import rng
from cnnlab.explain.scores import Score
from cnnlab.explain.subject import Subject
from cnnlab.explain.trust.infill import filled

FRACTIONS = (0.1, 0.2, 0.3, 0.5)
"""Of the cells that are removed."""
_CELLS = 14
"""A side, of large images."""
_LEAST = 4
"""Pixels of a cell's side: one pixel alone is restored from its neighbours."""
_AT_ONCE = 64

Infill = Callable[[Tensor, Tensor], Tensor]
"""(images, what is removed) to images; see `filled`."""


def faithfulness(subject: Subject, images: Tensor, score: Score, maps: Tensor, *, infill: Infill = filled) -> Tensor:
    """(N,) in [-1, 1], higher is better: what is left of the answer where the least relevant cells are removed, less
    what is left where the most relevant are, the mean over `FRACTIONS`. Maps that know nothing have 0.

    The answer is the probability of the score's class (of a mask: its mean over the region); of a box's coordinate, by
    how far it did not move. NaN for maps that are not finite or do not vary.

    Args:
        images: (N, C, H, W) as the network gets them.
        maps: (N, H, W), more where more speaks for the score.
    """
    side = cell_side(images.shape[-2:])
    relevance = in_cells(maps, side).flatten(1)
    varies = maps.flatten(1).isfinite().all(1) & (relevance.amax(1) > relevance.amin(1))
    order = _order(torch.where(varies[:, None], relevance, 0))
    shape = in_cells(maps, side).shape[-2:]
    whole = answers(subject, images, score)
    total = torch.zeros(len(images), dtype=torch.float64)
    for fraction in FRACTIONS:
        count = max(1, round(fraction * order.shape[1]))
        left = []
        for cells in (order[:, -count:], order[:, :count]):  # the least relevant, the most relevant
            removed = over_pixels(_chosen(cells, shape), side, images.shape[-2:])
            left.append(kept(subject, infill(images, removed.to(images.device)), score, whole))
        total += left[0] - left[1]
    return torch.where(varies, total / len(FRACTIONS), torch.nan)


def answers(subject: Subject, images: Tensor, score: Score) -> Tensor:
    """(N,) float64 on the CPU: the probability of the score's class, or the box's coordinate."""
    found = []
    with torch.no_grad():
        for part in _parts(len(images)):
            outputs = subject.outputs(images[part])
            own = score.part(part)
            likely = own.probability(outputs)
            found.append((own.of(outputs) if likely is None else likely).double().cpu())
    return torch.cat(found)


def kept(subject: Subject, images: Tensor, score: Score, whole: Tensor) -> Tensor:
    """(N,): what is left of the answer `whole` (N,) in changed images."""
    found = answers(subject, images, score)
    return 1 - (found - whole).abs() if score.output == "box" else found


def _parts(count: int) -> Iterator[slice]:
    for first in range(0, count, _AT_ONCE):
        yield slice(first, first + _AT_ONCE)


def cell_side(size: tuple[int, int] | torch.Size) -> int:
    """Pixels of the cells' side, for images of (height, width)."""
    return max(_LEAST, round(min(size) / _CELLS))


def in_cells(maps: Tensor, side: int) -> Tensor:
    """(N, h, w): the mean of the map (N, H, W) in each cell; those at the far edges may be smaller."""
    return avg_pool2d(maps[:, None].double(), side, ceil_mode=True, count_include_pad=False)[:, 0]


def over_pixels(cells: Tensor, side: int, size: tuple[int, int] | torch.Size) -> Tensor:
    """(N, H, W) of (N, h, w)."""
    return cells.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, : size[0], : size[1]]


def _order(relevance: Tensor) -> Tensor:
    """(N, cells): the most relevant first, equal ones in an order that is drawn, the same for all maps."""
    draw = torch.randperm(relevance.shape[1], generator=rng.generator(0, "explain/ties"))
    return draw[relevance[:, draw].argsort(dim=1, descending=True, stable=True)]


def _chosen(cells: Tensor, shape: tuple[int, int] | torch.Size) -> Tensor:
    chosen = torch.zeros(len(cells), shape[0] * shape[1], dtype=torch.bool)
    return chosen.scatter_(1, cells, True).view(len(cells), *shape)
