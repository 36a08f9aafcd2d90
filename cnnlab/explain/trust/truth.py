"""Ground truth by intervention: what each part of an image does to the network's answer, known by rendering the image
again without it (as FunnyBirds does, Hesse et al., ICCV 2023), and whether a map says the same."""

from __future__ import annotations

import torch
from torch import Tensor

from cnnlab.explain.maps import Map
from cnnlab.explain.scores import Score
from cnnlab.explain.subject import Subject
from cnnlab.explain.trust.statistics import spearman

_LEAST = 3
"""Parts that an image must have for ranks to mean something."""
_SEEN = 4
"""Pixels, for a part to be one."""
_AT_ONCE = 64


def effects(subject: Subject, images: Tensor, without: Tensor, score: Score) -> Tensor:
    """(N, P) float64: by how much the score falls when a part is taken away; below 0 where the part spoke against it.

    Args:
        images: (N, C, H, W) as the network gets them.
        without: (N, P, C, H, W), the same without each part.
    """
    count, parts = without.shape[:2]
    number = score.number.repeat_interleave(parts)
    region = None if score.region is None else score.region.repeat_interleave(parts, 0)
    flat, found = without.flatten(0, 1), []
    with torch.no_grad():
        whole = torch.cat([score.part(p).of(subject.outputs(images[p])) for p in _pieces(count)]).double().cpu()
        for part in _pieces(len(flat)):
            own = None if region is None else region[part]
            found.append(score.of(subject.outputs(flat[part]), number[part], own).double().cpu())
    return whole[:, None] - torch.cat(found).view(count, parts)


def _pieces(count: int) -> list[slice]:
    return [slice(first, first + _AT_ONCE) for first in range(0, count, _AT_ONCE)]


def attributed(values: Tensor, visible: Tensor) -> Tensor:
    """(N, P) float64: the sum of each map (N, H, W) over what is seen of each part (N, P, H, W); NaN for parts of which
    hardly anything is."""
    total = torch.einsum("nhw,nphw->np", values.double(), visible.double())
    return torch.where(visible.flatten(2).sum(2) >= _SEEN, total, torch.nan)


def claimed(found: Map, effect: Tensor) -> Tensor:
    """What a map of its kind should show of the effects (N, P): a signed one all of them, one that is cut off below 0
    what speaks for the score, magnitudes their size."""
    if found.signed:
        return effect
    return effect.clamp_min(0) if found.coarse else effect.abs()


def agreement(values: Tensor, visible: Tensor, effect: Tensor) -> Tensor:
    """(N,) rank correlation over the parts of an image, between the sum of the map over each and its effect (N, P).

    NaN for images with fewer than three parts in sight, or whose map or effects do not vary over them.
    """
    sums = attributed(values, visible)
    enough = sums.isfinite().sum(1) >= _LEAST
    return torch.where(enough, spearman(sums, effect), torch.nan)
