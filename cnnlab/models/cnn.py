"""A small convolutional network whose every part is a knob."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cnnlab.blocks import ActivationFactory, DropRate, NormFactory, conv_norm
from cnnlab.models.blocks import Pool, Poolings, downsampler, require_size, require_spatial
from cnnlab.models.norm import batch
from cnnlab.protocols import ConvNet, Features
from cnnlab.schema import PositiveInt


class ConvBlock(nn.Module):
    """`depth` times convolution, norm and activation, at the resolution of the input."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        depth: int,
        norm: NormFactory,
        activation: ActivationFactory,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(depth):
            conv, normalizer = conv_norm(norm, in_channels, out_channels, kernel, padding=kernel // 2)
            layers += [conv, normalizer, activation()]
            in_channels = out_channels
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class CNN(ConvNet):
    """Blocks of convolutions with 2x2 pooling between them, global average pooling, one linear layer.

    The feature stages are the outputs of the blocks; `indices` and `sizes` are those of the max-poolings.

    Args:
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        image_size: (height, width) of the images, in pixels.
        activation: factory of the activations; `None` is ReLU.
        norm: factory of the norm layers; `None` is batch norm.
        dropout: rate before the classifier; `None` is 0.
        widths: channels of each block.
        depth: convolutions in each block.
        kernel: side of the convolutions' kernels, odd.
        pool: what halves the resolution between two blocks.

    Raises:
        ValueError: no block, an even kernel, or images that the poolings would leave nothing of.
    """

    own_init = {"_target_": "cnnlab.init.He", "mode": "fan_in", "distribution": "normal"}
    classifier_modules = ("classifier",)

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: tuple[int, int],
        activation: ActivationFactory | None = None,
        norm: NormFactory | None = None,
        dropout: DropRate | None = None,
        widths: tuple[PositiveInt, ...] = (32, 64, 128),
        depth: PositiveInt = 1,
        kernel: PositiveInt = 3,
        pool: Pool = "max",
    ) -> None:
        super().__init__()
        norm = batch if norm is None else norm
        activation = nn.ReLU if activation is None else activation
        widths = tuple(widths)
        if not widths:
            raise ValueError("expected at least one block, received model.widths=[]; model.widths=[32,64,128]")
        if kernel % 2 == 0:
            raise ValueError(
                f"expected an odd kernel, received {kernel}; model.kernel={kernel + 1} keeps the resolution"
            )
        self.stem = "small"
        self.notes: list[str] = []
        self.min_size = 2 ** (len(widths) - 1)
        advice = f"fewer model.widths (now {len(widths)}) or larger images fit"
        require_size(image_size, self.min_size, "this CNN", advice)
        smallest = (image_size[0] // self.min_size, image_size[1] // self.min_size)
        require_spatial(norm, smallest, "this CNN", "fewer model.widths")

        self.blocks = nn.ModuleList()
        self.pools = nn.ModuleList()
        for block, out_channels in enumerate(widths):
            if block > 0:
                self.pools.append(downsampler(pool, in_channels, 2, 2, return_indices=True))
            self.blocks.append(ConvBlock(in_channels, out_channels, kernel, depth, norm, activation))
            in_channels = out_channels
        self.stage_channels = widths
        self.pool_channels = widths[:-1] if pool == "max" else ()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout or 0.0), nn.Linear(widths[-1], num_classes))

    def features(self, x: Tensor) -> Features:
        stages: list[Tensor] = []
        poolings = Poolings()
        for number, block in enumerate(self.blocks):
            x = block(x if number == 0 else poolings.through(self.pools[number - 1], x))
            stages.append(x)
        return poolings.features(*stages)

    def classify(self, features: Features) -> dict[str, Tensor]:
        pooled = torch.flatten(self.avgpool(features.stages[-1]), 1)
        return {"logits": self.classifier(pooled)}
