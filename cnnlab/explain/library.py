"""Methods that Captum has: integrated gradients and occlusion. The extra `explain`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cnnlab.errors import UsageError
from cnnlab.explain.scores import Score
from cnnlab.explain.subject import Subject

STEPS = 50
"""Points of the path, as Captum's own default: the Gauss-Legendre rule."""
_AT_ONCE = 32
"""Images a pass."""
PATCH = 7
"""Patches a side; each moves by half its width."""


def installed() -> bool:
    from importlib.util import find_spec

    return find_spec("captum") is not None


def _attr() -> Any:
    try:
        from captum import attr
    except ImportError as error:
        raise UsageError(
            "integrated_gradients and occlusion come from Captum, which is not installed; type "
            "pip install 'cnnlab[explain]', or other --methods"
        ) from error
    return attr


def _function(subject: Subject, score: Score) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The score as a function of images and of what is repeated with them."""
    if score.region is None:
        return lambda x, number: score.of(subject.outputs(x), number), (score.number,)
    return lambda x, number, region: score.of(subject.outputs(x), number, region), (score.number, score.region)


def integrated_gradients(subject: Subject, images: Tensor, score: Score) -> Tensor:
    """(N, C, H, W): the image times the mean gradient on the way to it from 0, which is what normalization makes of the
    mean image (Sundararajan et al. 2017, equation 1). They sum to the score less that of the baseline, nearly."""
    function, repeated = _function(subject, score)
    found = (
        _attr()
        .IntegratedGradients(function)
        .attribute(
            images.detach().requires_grad_(),
            baselines=0.0,
            additional_forward_args=repeated,
            n_steps=STEPS,
            internal_batch_size=max(_AT_ONCE, len(images)),
        )
    )
    return found.detach()


def occlusion(subject: Subject, images: Tensor, score: Score) -> Tensor:
    """(N, H, W): by how much the score falls when a patch around the place is 0 in all channels, the mean over the
    patches that cover it (Zeiler & Fergus 2014, section 4.2)."""
    function, repeated = _function(subject, score)
    channels, height, width = images.shape[1:]
    patch = (channels, max(1, round(height / PATCH)), max(1, round(width / PATCH)))
    with torch.no_grad():
        found = (
            _attr()
            .Occlusion(function)
            .attribute(
                images.detach(),
                sliding_window_shapes=patch,
                strides=(channels, max(1, patch[1] // 2), max(1, patch[2] // 2)),
                baselines=0.0,
                additional_forward_args=repeated,
                perturbations_per_eval=max(1, _AT_ONCE // len(images)),
            )
        )
    return found[:, 0].detach()
