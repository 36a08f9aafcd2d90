"""What stands in for removed pixels: their surroundings, with the image's own noise.

A black or grey patch is nothing that the network was trained on, and its answer to it says little of what the patch
hid. Rong et al. 2022 (ROAD, arXiv 2202.00449) interpolate from the neighbours by a sparse linear system an image, and
add noise; the interpolation here is by push and pull over a pyramid (Gortler et al. 1996, section 3.4.1), all images at
once, and the noise is as strong as the image's own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from cnnlab import rng

_OF_DETAIL = 8 / 9
"""Variance of independent noise less its 3x3 mean, as a part of the noise's."""
_MAD = 1.4826
"""Of a normal distribution: its standard deviation over the median magnitude."""


def filled(images: Tensor, removed: Tensor, number: int = 0) -> Tensor:
    """(N, C, H, W): the images with the pixels `removed` (N, H, W) bool interpolated from the others, which stay as
    they are, bit for bit. Where none is left, the image is its own mean.

    Args:
        number: of the draw of the noise, which an image gets in any batch.
    """
    gone = removed[:, None]
    smooth = _interpolated(images, gone)
    noise = torch.randn(images.shape[1:], generator=rng.generator(0, "explain/infill", number)).to(images)
    return torch.where(gone, smooth + noise_of(images) * noise, images)


def noise_of(images: Tensor) -> Tensor:
    """(N, C, 1, 1): the standard deviation of each channel's pixel noise, from the median of what a 3x3 mean takes
    away, which edges hardly change."""
    detail = images - avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    middle = detail.abs().flatten(2).median(2).values
    return (middle * _MAD / _OF_DETAIL**0.5)[:, :, None, None]


def _interpolated(images: Tensor, gone: Tensor) -> Tensor:
    known = (~gone).to(images.dtype)
    empty = known.flatten(1).sum(1) == 0
    if empty.any():
        mean = images.mean((2, 3), keepdim=True)
        images = torch.where(empty[:, None, None, None], mean, images)
        known = torch.where(empty[:, None, None, None], torch.ones_like(known), known)
    return _pulled(images, known)


def _pulled(values: Tensor, weight: Tensor) -> Tensor:
    """Values where `weight` is above 0, and elsewhere those of the next coarser level, itself without gaps."""
    if bool((weight > 0).all()):
        return values
    total = avg_pool2d(values * weight, 2, ceil_mode=True, count_include_pad=False)
    below = avg_pool2d(weight, 2, ceil_mode=True, count_include_pad=False)
    coarse = _pulled(total / torch.where(below > 0, below, 1), below)
    wide = interpolate(coarse, values.shape[-2:], mode="bilinear", align_corners=False)
    return torch.where(weight > 0, values, wide)
