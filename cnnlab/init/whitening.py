"""A first layer that whitens: the transform of the training images' own patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cnnlab.init.base import Layer, layers
from cnnlab.init.papers import Own
from cnnlab.schema import Positive

_MAX_PATCHES = 1 << 18


class Whitening(Own):
    """The model's own init, and in its first convolution the PCA whitening of the patches that it sees
    (Page 2018, "How to train your ResNet 8"; Jordan 2024, arXiv 2404.00498, section 3.2).

    With the eigenvalues λ_i and eigenvectors e_i of the patches' covariance, filter i is e_i / sqrt(λ_i + ε) and
    filter d + i its negative, so that a ReLU-like activation loses nothing; further filters keep their init. The
    layer's outputs on the training images are then uncorrelated, each of variance near 1.

    Args:
        epsilon: ε, in units of the normalized images; the paper's is 5e-4.
    """

    needs_batch = True

    def __init__(self, *, epsilon: Positive = 5e-4):
        super().__init__()
        self.epsilon = epsilon

    def validate(self, model: nn.Module) -> None:
        super().validate(model)
        _first_convolution(model)

    @torch.no_grad()
    def calibrate(self, model: nn.Module, images: Tensor) -> None:
        """Fills the first convolution from patches of `images` (N, C, H, W), as the network gets them."""
        layer = _first_convolution(model)
        height, width = (int(k) for k in layer.kernel_size)
        patches = functional.unfold(images.float(), (height, width)).transpose(1, 2).flatten(0, 1)
        patches = patches[:: -(-len(patches) // _MAX_PATCHES)].double()
        values, vectors = torch.linalg.eigh(torch.cov(patches.T, correction=0))
        filters = (vectors / (values + self.epsilon).sqrt()).T.flip(0)  # the strongest direction first
        both = torch.cat([filters, -filters]).view(-1, images.shape[1], height, width)
        layer.weight[: len(both)] = both.to(layer.weight)
        if layer.bias is not None:
            layer.bias.zero_()


def _first_convolution(model: nn.Module) -> nn.Conv2d:
    """The convolution that sees the images. Raises `ValueError` for a network in which it has too few filters."""
    first: Layer | None = next((layer for _, layer in layers(model)), None)
    if not isinstance(first, nn.Conv2d) or first.groups != 1:
        raise ValueError(
            "expected a network that begins with a convolution for init=whitening; type init=auto, or model=speednet"
        )
    entries = first.in_channels * int(first.kernel_size[0]) * int(first.kernel_size[1])
    if first.out_channels < 2 * entries:
        raise ValueError(
            f"expected a first convolution of at least {2 * entries} filters, two for each of the {entries} entries "
            f"of its patches, received {first.out_channels}; type init=auto, or model=speednet"
        )
    return first
