"""The methods by name, and `explain`, which runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cnnlab.errors import UsageError, did_you_mean
from cnnlab.explain import cam, gradients, library
from cnnlab.explain.layers import usual_layers
from cnnlab.explain.maps import Map, cpu, evidence, over_image
from cnnlab.explain.scores import Score
from cnnlab.explain.subject import Subject

AT_ONCE = 16
"""Images a pass."""


@dataclass(frozen=True)
class Method:
    """`compute(subject, images, score, layer)` gives (N, H, W): above 0 what speaks for the score, and for methods that
    are not `signed`, what matters. Of a `layered` one the ReLU, its last step, is left to the caller."""

    compute: Callable[[Subject, Tensor, Score, str], Tensor]
    signed: bool = False
    layered: bool = False
    rectified: bool = False
    """Whether what is below 0 is cut off at the end."""
    passes: int = 1
    """Forward and backward passes that a map takes, about."""
    says: str = ""


def _strongest(gradient: Tensor) -> Tensor:
    """(N, H, W): the largest magnitude over the channels (Simonyan et al. 2013, section 3.1)."""
    return gradient.abs().amax(1)


def _saliency(subject: Subject, images: Tensor, score: Score, layer: str) -> Tensor:
    return _strongest(gradients.gradient(subject, images, score))


def _smoothgrad(subject: Subject, images: Tensor, score: Score, layer: str) -> Tensor:
    return _strongest(gradients.smoothed(subject, images, score))


def _guided(subject: Subject, images: Tensor, score: Score, layer: str) -> Tensor:
    return _strongest(gradients.guided(subject, images, score))


def _integrated(subject: Subject, images: Tensor, score: Score, layer: str) -> Tensor:
    return library.integrated_gradients(subject, images, score).sum(1)


def _occlusion(subject: Subject, images: Tensor, score: Score, layer: str) -> Tensor:
    return library.occlusion(subject, images, score)


def _gradcam(subject: Subject, images: Tensor, score: Score, layer: str) -> Tensor:
    return cam.gradcam(*cam.maps_and_gradients(subject, images, score, layer))


def _gradcam_plus_plus(subject: Subject, images: Tensor, score: Score, layer: str) -> Tensor:
    return cam.gradcam_plus_plus(*cam.maps_and_gradients(subject, images, score, layer))


def _guided_gradcam(subject: Subject, images: Tensor, score: Score, layer: str) -> Tensor:
    """Selvaraju et al. 2017, section 3.2: the product of both."""
    coarse = over_image(_gradcam(subject, images, score, layer).clamp_min(0), _size(images))
    return _strongest(gradients.guided(subject, images, score) * coarse[:, None])


METHODS: dict[str, Method] = {
    "saliency": Method(_saliency, says="the gradient's magnitude"),
    "smoothgrad": Method(_smoothgrad, passes=gradients.SAMPLES, says="the mean gradient under noise"),
    "integrated_gradients": Method(_integrated, signed=True, passes=library.STEPS, says="from the mean image; Captum"),
    "occlusion": Method(
        _occlusion, signed=True, passes=(2 * library.PATCH) ** 2, says="what hiding a patch takes away; Captum"
    ),
    "gradcam": Method(_gradcam, layered=True, rectified=True, says="maps weighed by their mean gradient"),
    "gradcam++": Method(_gradcam_plus_plus, layered=True, rectified=True, says="maps weighed place by place"),
    "guided": Method(_guided, says="guided backpropagation; passes edges on, whatever the class"),
    "guided_gradcam": Method(_guided_gradcam, layered=True, passes=2, says="guided backpropagation times Grad-CAM"),
}
USUAL = ("saliency", "smoothgrad", "gradcam", "gradcam++")


def require_known(names: Sequence[str]) -> None:
    """Raises `UsageError` for a method that is not there."""
    for name in names:
        if name not in METHODS:
            raise UsageError(f"method {name!r}: expected {', '.join(METHODS)}{did_you_mean(name, METHODS)}")
    if {"integrated_gradients", "occlusion"} & set(names):
        library._attr()


def explain(
    subject: Subject, images: Tensor, score: Score, methods: Sequence[str] = USUAL, layers: Sequence[str] = ()
) -> list[Map]:
    """The maps of images by each method, and of those that look at a layer, for each layer.

    Args:
        images: (N, C, H, W) as the network gets them.
        layers: names of modules; none takes `usual_layers`.

    The network is left as it was (see `Subject.undisturbed`).

    Raises `UsageError` for unknown methods and layers, and for those that this network does not have.
    """
    require_known(methods)
    with subject.undisturbed():
        images = images.to(next((p.dtype for p in subject.model.parameters()), images.dtype))
        return [map_of(subject, images, score, *each) for each in wanted(subject, images, methods, layers)]


def wanted(
    subject: Subject, images: Tensor, methods: Sequence[str], layers: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """Each map that is asked for: its method and its layer, which is empty where the method looks at none."""
    if any(METHODS[name].layered for name in methods) and not layers:
        layers = usual_layers(subject, images[:1])
    return [(name, layer) for name in methods for layer in (layers if METHODS[name].layered else ("",))]


def map_of(subject: Subject, images: Tensor, score: Score, name: str, layer: str = "") -> Map:
    """The maps of one method, inside `Subject.undisturbed`."""
    method = METHODS[name]
    parts = [slice(first, first + AT_ONCE) for first in range(0, len(images), AT_ONCE)]
    raw = torch.cat([cpu(method.compute(subject, images[part], score.part(part), layer)) for part in parts])
    values = raw.clamp_min(0) if method.rectified else raw
    height, width = values.shape[1:]
    if (height, width) != _size(images):
        values = over_image(values, _size(images))
    grid = (height, width) if method.rectified else None
    return Map(name, values, method.signed, evidence(raw), layer or None, method.rectified, grid)


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]
