"""Class activation maps: which places of a layer's maps speak for a score."""

from __future__ import annotations

import torch
from torch import Tensor

from cnnlab.errors import UsageError
from cnnlab.explain.layers import kept, last_of, layer
from cnnlab.explain.scores import Score
from cnnlab.explain.subject import Subject


def maps_and_gradients(subject: Subject, images: Tensor, score: Score, name: str) -> tuple[Tensor, Tensor]:
    """The maps A (N, K, h, w) of a layer, and the gradient of each image's score with respect to them.

    Raises `UsageError` where the layer has no maps, or none that the score depends on.
    """
    with kept(layer(subject, name)) as calls:
        value = score.of(subject.outputs(images.detach().requires_grad_()))
    maps = last_of(calls, name)
    found = torch.autograd.grad(value.sum(), maps, allow_unused=True)[0] if value.requires_grad else None
    if found is None:
        raise UsageError(f"layer {name!r}: {', '.join(sorted(set(score.names)))} does not depend on it; name another")
    return maps.detach(), found


def gradcam(maps: Tensor, gradients: Tensor) -> Tensor:
    """(N, h, w), before the ReLU: sum over k of alpha_k A_k, alpha_k the mean gradient of the map k
    (Selvaraju et al. 2017, equations 1 and 2)."""
    return (gradients.mean((2, 3), keepdim=True) * maps).sum(1)


def gradcam_plus_plus(maps: Tensor, gradients: Tensor) -> Tensor:
    """(N, h, w), before the ReLU: Chattopadhyay et al. 2018, equations 10 and 19, for Y = exp(score), whose derivatives
    are powers of the score's gradient times Y; Y itself, one factor an image, is left out."""
    square, cube = gradients**2, gradients**3
    below = 2 * square + maps.sum((2, 3), keepdim=True) * cube
    alpha = torch.where(below != 0, square / torch.where(below != 0, below, 1), 0)
    weights = (alpha * gradients.clamp_min(0)).sum((2, 3), keepdim=True)
    return (weights * maps).sum(1)
