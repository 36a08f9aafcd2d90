"""Maps from the gradient of a score with respect to the pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from cnnlab import rng
from cnnlab.errors import UsageError
from cnnlab.explain.scores import Score
from cnnlab.explain.subject import Subject

SAMPLES = 25
NOISE = 0.15
"""Of SmoothGrad: the standard deviation as a part of the image's range; its paper finds 10 to 20 % good."""


def gradient(subject: Subject, images: Tensor, score: Score) -> Tensor:
    """(N, C, H, W): of each image's score. Simonyan et al. 2013, section 3, without the absolute value.

    Raises `UsageError` where nothing that the network computes comes from its input.
    """
    images = images.detach().requires_grad_()
    value = score.of(subject.outputs(images))
    found = torch.autograd.grad(value.sum(), images, allow_unused=True)[0] if value.requires_grad else None
    if found is None:
        raise UsageError("no gradient reaches the image: the network detaches it, or does not use it for this score")
    return found


def smoothed(
    subject: Subject,
    images: Tensor,
    score: Score,
    *,
    samples: int = SAMPLES,
    noise: float = NOISE,
    of: Callable[[Subject, Tensor, Score], Tensor] = gradient,
) -> Tensor:
    """(N, C, H, W): the mean of the maps `of` the image with Gaussian noise on it (Smilkov et al. 2017, SmoothGrad).

    The noise is a function of the sample's number alone: an image has the same map in any batch.
    """
    flat = images.flatten(1)
    spread = noise * (flat.max(1).values - flat.min(1).values)
    total = torch.zeros_like(images)
    for number in range(samples):
        drawn = torch.randn(images.shape[1:], generator=rng.generator(0, "explain/noise", number))
        total += of(subject, images + spread[:, None, None, None] * drawn.to(images), score)
    return total / samples


def guided(subject: Subject, images: Tensor, score: Score) -> Tensor:
    """(N, C, H, W): the gradient that lets through each ReLU, besides what its input lets through, only what is
    positive (Springenberg et al. 2014, guided backpropagation).

    It works on the call of the function: ReLUs that are used more than once, in place, or without a module, too.

    Raises `UsageError` for networks without ReLUs.
    """
    with _Guided() as mode:
        found = gradient(subject, images, score)
    if not mode.seen:
        raise UsageError(
            f"guided methods change the gradient of ReLUs, and {type(subject.model).__name__} has none; "
            "type --methods saliency,smoothgrad,gradcam"
        )
    return found


class _Guided(TorchFunctionMode):
    """Every ReLU that is called inside clips the gradient that it gets at 0."""

    functions = {
        *(functional.relu, functional.relu_, functional.relu6),
        *(torch.relu, torch.relu_, Tensor.relu, Tensor.relu_),
    }

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in self.functions and result.requires_grad:
            self.seen += 1
            result.register_hook(lambda gradient: gradient.clamp_min(0))
        return result
