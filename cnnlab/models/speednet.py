"""A network for short trainings of 32-pixel images: Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU"
(arXiv 2404.00498), section 3, after Page 2018, "How to train your ResNet"."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from cnnlab.blocks import ActivationFactory, NormFactory, conv_norm
from cnnlab.models.blocks import Poolings, require_size, require_spatial
from cnnlab.models.norm import batch
from cnnlab.protocols import ConvNet, Features
from cnnlab.schema import Positive, PositiveInt


class _Block(nn.Module):
    """3x3 convolution, 2x2 max-pooling, norm, activation; 3x3 convolution, norm, activation.

    Pooling before the norm layer does its work, and the second convolution's, on a quarter of the pixels.
    """

    def __init__(
        self, channels: int, out_channels: int, pooled: bool, norm: NormFactory, activation: ActivationFactory
    ):
        super().__init__()
        self.conv1, self.norm1 = conv_norm(norm, channels, out_channels, 3, padding=1)
        self.pool = nn.MaxPool2d(2, return_indices=True) if pooled else nn.Identity()
        self.act1 = activation()
        self.conv2, self.norm2 = conv_norm(norm, out_channels, out_channels, 3, padding=1)
        self.act2 = activation()

    def forward(self, x: Tensor, poolings: Poolings) -> Tensor:
        x = self.act1(self.norm1(poolings.through(self.pool, self.conv1(x))))
        return self.act2(self.norm2(self.conv2(x)))


class SpeedNet(ConvNet):
    """A 2x2 convolution, three blocks of two convolutions, global max-pooling, one linear layer without bias.

    The first layer has 2·4·in_channels filters, so that `init=whitening` can fill it with the whitening
    transform of the training images' 2x2 patches and its negative. Feature stages are the outputs of the blocks;
    `indices` and `sizes` are those of their max-poolings.

    Args:
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        image_size: (height, width) of the images, in pixels.
        activation: factory of the activations; `None` is GELU, as in the paper.
        norm: factory of the norm layers; `None` is batch norm.
        widths: channels of the three blocks; the paper's are 64, 256, 256.
        scale: factor of the logits; `None` is 1 over the classifier's inputs, as in the released code that trains
            with Muon (the paper, with SGD and smaller weights in the classifier: 1/9).

    Raises:
        ValueError: no block, or images below 3 pixels.
    """

    own_init = {"_target_": "cnnlab.init.PaperSpeedNet"}
    classifier_modules = ("classifier",)
    unpools = False

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: tuple[int, int],
        activation: ActivationFactory | None = None,
        norm: NormFactory | None = None,
        widths: tuple[PositiveInt, ...] = (64, 256, 256),
        scale: Positive | None = None,
    ) -> None:
        super().__init__()
        norm = batch if norm is None else norm
        activation = nn.GELU if activation is None else activation
        if not widths:
            raise ValueError("expected at least one block, received model.widths=[]; model.widths=[64,256,256]")
        self.stem = "small"
        self.notes: list[str] = []
        self.min_size = 3
        poolings = min(len(widths), (min(image_size) - 1).bit_length() - 1)
        if poolings < len(widths):
            self.notes.append(f"the first {len(widths) - poolings} of {len(widths)} poolings are left out")
        require_size(image_size, self.min_size, "this SpeedNet", "larger images fit")
        smallest = ((image_size[0] - 1) >> poolings, (image_size[1] - 1) >> poolings)
        require_spatial(norm, smallest, "this SpeedNet", "larger images do")
        self.scale = 1 / widths[-1] if scale is None else scale
        stem = 2 * 4 * in_channels
        self.whiten = nn.Conv2d(in_channels, stem, 2)
        self.act = activation()
        channels = (stem, *widths)
        self.blocks = nn.ModuleList(
            _Block(before, after, number >= len(widths) - poolings, norm, activation)
            for number, (before, after) in enumerate(pairwise(channels))
        )
        self.stage_channels = tuple(widths)
        self.pool_channels = tuple(widths[len(widths) - poolings :])
        self.maxpool = nn.AdaptiveMaxPool2d(1)
        self.classifier = nn.Linear(widths[-1], num_classes, bias=False)

    def features(self, x: Tensor) -> Features:
        x = self.act(self.whiten(x))
        stages, poolings = [], Poolings()
        for block in self.blocks:
            x = block(x, poolings)
            stages.append(x)
        return poolings.features(*stages)

    def classify(self, features: Features) -> dict[str, Tensor]:
        pooled = torch.flatten(self.maxpool(features.stages[-1]), 1)
        return {"logits": self.classifier(pooled) * self.scale}
