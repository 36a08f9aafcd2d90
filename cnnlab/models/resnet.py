"""Residual networks and their plain twins (He, Zhang, Ren and Sun 2015, arXiv 1512.03385)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnlab.blocks import ActivationFactory, DropRate, NormFactory, conv_norm
from cnnlab.models.blocks import (
    Pool,
    Poolings,
    Stem,
    StochasticDepth,
    choose_stem,
    divided,
    downsampler,
    linear_decay,
    require_size,
    require_spatial,
    stem_note,
)
from cnnlab.models.norm import batch
from cnnlab.models.recompute import CheckpointedSequential
from cnnlab.protocols import ConvNet, Features
from cnnlab.schema import PositiveInt

Projection = Literal["A", "B"]


class PaddedShortcut(nn.Module):
    """Option A of the paper: every `stride`-th pixel, and zeros for the new channels. No parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C + new_channels, ceil(H / stride), ceil(W / stride))."""
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.new_channels))


@dataclass(frozen=True)
class BlockOptions:
    """What all residual blocks of a network have in common."""

    norm: NormFactory
    activation: ActivationFactory
    shortcut: bool
    projection: Projection
    stride_first: bool
    """A bottleneck strides in its first 1x1, as the paper does, and not in its 3x3."""


@dataclass(frozen=True)
class Geometry:
    """How a block moves over its input."""

    stride: int = 1
    dilation: tuple[int, int] = (1, 1)
    """Of the convolution that strides, or would, and of those that follow."""


class _Block(nn.Module):
    """A residual block, y = act(branch(x) + shortcut(x)); its plain twin is act(branch(x))."""

    expansion: int
    """Output channels as a multiple of the block's `channels`."""
    residual_norm: str
    """The norm layer that ends the branch; at scale 0 the block starts as its shortcut."""
    downsample: nn.Module | None
    """The shortcut where the shape changes; elsewhere it is the identity."""

    def __init__(self, options: BlockOptions, drop: float) -> None:
        super().__init__()
        self.shortcut = options.shortcut
        self.drop = StochasticDepth(drop) if drop else None

    def connect(self, in_channels: int, out_channels: int, stride: int, options: BlockOptions) -> None:
        """Called last: parameters keep torchvision's order, in which the shortcut's follow the branch's."""
        if not options.shortcut or (stride == 1 and in_channels == out_channels):
            self.downsample = None
        elif options.projection == "A":
            self.downsample = PaddedShortcut(in_channels, out_channels, stride)
        else:
            self.downsample = nn.Sequential(*conv_norm(options.norm, in_channels, out_channels, 1, stride=stride))

    def join(self, x: Tensor, branch: Tensor) -> Tensor:
        if not self.shortcut:
            return branch
        if self.drop is not None:
            branch = self.drop(branch)
        return branch + (x if self.downsample is None else self.downsample(x))


class BasicBlock(_Block):
    """Two 3x3 convolutions (the paper's figure 5, left)."""

    expansion = 1
    residual_norm = "bn2"

    def __init__(self, in_channels: int, channels: int, geometry: Geometry, drop: float, options: BlockOptions) -> None:
        super().__init__(options, drop)
        norm, stride, (first, second) = options.norm, geometry.stride, geometry.dilation
        self.conv1, self.bn1 = conv_norm(norm, in_channels, channels, 3, stride=stride, padding=first, dilation=first)
        self.act1 = options.activation()
        self.conv2, self.bn2 = conv_norm(norm, channels, channels, 3, padding=second, dilation=second)
        self.connect(in_channels, channels, stride, options)
        self.act2 = options.activation()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.act1(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        return self.act2(self.join(x, branch))


class Bottleneck(_Block):
    """A 1x1, a 3x3 and a 1x1 convolution (figure 5, right)."""

    expansion = 4
    residual_norm = "bn3"

    def __init__(self, in_channels: int, channels: int, geometry: Geometry, drop: float, options: BlockOptions) -> None:
        super().__init__(options, drop)
        norm, out_channels = options.norm, channels * self.expansion
        stride, dilation = geometry.stride, geometry.dilation[1 if options.stride_first else 0]
        first, second = (stride, 1) if options.stride_first else (1, stride)
        self.conv1, self.bn1 = conv_norm(norm, in_channels, channels, 1, stride=first)
        self.act1 = options.activation()
        self.conv2, self.bn2 = conv_norm(
            norm, channels, channels, 3, stride=second, padding=dilation, dilation=dilation
        )
        self.act2 = options.activation()
        self.conv3, self.bn3 = conv_norm(norm, channels, out_channels, 1)
        self.connect(in_channels, out_channels, stride, options)
        self.act3 = options.activation()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.act1(self.bn1(self.conv1(x)))
        branch = self.act2(self.bn2(self.conv2(branch)))
        branch = self.bn3(self.conv3(branch))
        return self.act3(self.join(x, branch))


BlockType = type[BasicBlock] | type[Bottleneck]


class _ResidualNet(ConvNet):
    """A stem, stages of residual blocks (all but the first halve the resolution), and a linear classifier.

    The feature stages are the stem's output (before its pooling) and the output of each `layer`; `indices` and `sizes`
    are those of the stem's max-pooling.
    """

    own_init = {"_target_": "cnnlab.init.He", "mode": "fan_in", "distribution": "normal"}
    classifier_modules = ("dropout", "fc")
    unpools = False

    def __init__(
        self,
        *,
        block: BlockType,
        counts: tuple[int, ...],
        options: BlockOptions,
        width: int,
        num_classes: int,
        in_channels: int,
        image_size: tuple[int, int],
        dropout: float | None,
        stochastic_depth: float | None,
        stem: Stem,
        pool: Pool,
        checkpoint: bool,
        output_stride: int | None,
    ) -> None:
        super().__init__()
        rate = stochastic_depth or 0.0
        if rate and not options.shortcut:
            raise ValueError(
                f"expected regularization.stochastic_depth=0 for a plain network, received {rate}; "
                f"without a shortcut a dropped block passes nothing on (model.shortcut=true has one)"
            )
        self.stem = choose_stem(stem, image_size)
        self.notes = [stem_note(self.stem, image_size)]
        geometries = _geometries(len(counts), 4 if self.stem == "imagenet" else 1, output_stride)
        # one pixel must be left in the last stage: the stem divides by 4 or 1, each later stage by its stride
        self.min_size = math.prod(first.stride for first, _ in geometries) * (4 if self.stem == "imagenet" else 1)
        if output_stride is not None:
            self.notes.append(f"output stride {output_stride}")
        name = type(self).__name__
        require_size(image_size, self.min_size, name, "model.stem=small or larger images fit")
        smallest = divided(image_size, self.min_size)
        require_spatial(options.norm, smallest, name, "larger images")

        kernel, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        self.conv1, self.bn1 = conv_norm(options.norm, in_channels, width, kernel, stride=stride, padding=kernel // 2)
        self.act = options.activation()
        self.pool_channels = (width,) if self.stem == "imagenet" and pool == "max" else ()
        self.maxpool = (
            downsampler(pool, width, 3, 2, 1, return_indices=True) if self.stem == "imagenet" else nn.Identity()
        )

        drops = iter(linear_decay(rate, sum(counts)))
        channels = width
        self.layers = tuple(f"layer{number}" for number in range(1, len(counts) + 1))
        for number, (layer, count) in enumerate(zip(self.layers, counts, strict=True)):
            blocks = []
            for position in range(count):
                geometry = geometries[number][min(position, 1)]
                blocks.append(block(channels, width * 2**number, geometry, next(drops), options))
                channels = width * 2**number * block.expansion
            self.add_module(layer, CheckpointedSequential(*blocks) if checkpoint else nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout or 0.0)
        self.fc = nn.Linear(channels, num_classes)
        self.stage_channels = (width, *(width * 2**n * block.expansion for n in range(len(counts))))

    def features(self, x: Tensor) -> Features:
        x = self.act(self.bn1(self.conv1(x)))
        stages, poolings = [x], Poolings()
        x = poolings.through(self.maxpool, x)
        for layer in self.layers:
            x = getattr(self, layer)(x)
            stages.append(x)
        return poolings.features(*stages)

    def classify(self, features: Features) -> dict[str, Tensor]:
        pooled = torch.flatten(self.avgpool(features.stages[-1]), 1)
        return {"logits": self.fc(self.dropout(pooled))}


def _geometries(stages: int, stem: int, output_stride: int | None) -> list[tuple[Geometry, Geometry]]:
    """The geometry of each stage's first block, and of its others: all stages but the first halve the map until it is
    `output_stride` times smaller than the images, which the stem has made `stem` times smaller. From there on stages
    dilate their convolutions instead, and see as much of the image (Chen et al. 2017, arXiv 1706.05587, section 3.1).

    Raises:
        ValueError: a stride that the stem has gone beyond, or that these stages do not come to.
    """
    natural = stem * 2 ** (stages - 1)
    if output_stride is not None and not stem <= output_stride <= natural:
        raise ValueError(
            f"expected an output stride between {stem}, the stem's, and {natural}, this network's without dilation, "
            f"received {output_stride}; type model.output_stride={min(max(stem, output_stride), natural)}"
        )
    found, reached, dilation = [(Geometry(), Geometry())], stem, 1
    for _ in range(stages - 1):
        before, dilates = dilation, reached == output_stride
        stride = 1 if dilates else 2
        reached, dilation = reached * stride, dilation * (2 if dilates else 1)
        found.append((Geometry(stride, (before, dilation)), Geometry(1, (dilation, dilation))))
    return found


_IMAGENET: dict[int, tuple[BlockType, tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


class ResNet(_ResidualNet):
    """The ImageNet networks (table 1).

    Args:
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        image_size: (height, width) of the images, in pixels.
        activation: factory of the activations; `None` is ReLU.
        norm: factory of the norm layers; `None` is batch norm.
        dropout: rate before the classifier; `None` is 0.
        stochastic_depth: drop rate of the last block, from which it falls linearly to the first; `None` is 0.
        depth: layers with weights.
        width: channels of the first stage.
        variant: `torchvision` strides in a bottleneck's 3x3, `paper` in its first 1x1.
        stem: `imagenet` is 7x7/2 and a 3x3/2 pooling, `small` 3x3/1; `auto` is small below 64 pixels.
        pool: what the ImageNet stem pools by.
        shortcut: `False` gives the plain network of the same layers.
        projection: shortcuts that change the shape: `B` by a 1x1 convolution, `A` without parameters.
        checkpoint: trades computation for memory, see `CheckpointedSequential`.
        output_stride: how many times smaller than the images the last map is: stages that would go below it dilate
            their convolutions and keep their resolution (8 or 16, for masks); `None` dilates none.

    Raises:
        ValueError: an unknown depth, images below `min_size`, stochastic depth without shortcuts, or an output stride
            that the network does not come to.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: tuple[int, int],
        activation: ActivationFactory | None = None,
        norm: NormFactory | None = None,
        dropout: DropRate | None = None,
        stochastic_depth: DropRate | None = None,
        depth: Literal[18, 34, 50, 101, 152] = 18,
        width: PositiveInt = 64,
        variant: Literal["torchvision", "paper"] = "torchvision",
        stem: Stem = "auto",
        pool: Pool = "max",
        shortcut: bool = True,
        projection: Projection = "B",
        checkpoint: bool = False,
        output_stride: Literal[1, 2, 4, 8, 16, 32] | None = None,
    ) -> None:
        if depth not in _IMAGENET:
            raise ValueError(
                f"expected a depth of {', '.join(map(str, _IMAGENET))}, received {depth}; "
                f"model=resnet20 and its like take any depth 6n + 2"
            )
        block, counts = _IMAGENET[depth]
        super().__init__(
            block=block,
            counts=counts,
            options=BlockOptions(
                batch if norm is None else norm,
                nn.ReLU if activation is None else activation,
                shortcut,
                projection,
                stride_first=variant == "paper",
            ),
            width=width,
            num_classes=num_classes,
            in_channels=in_channels,
            image_size=image_size,
            dropout=dropout,
            stochastic_depth=stochastic_depth,
            stem=stem,
            pool=pool,
            checkpoint=checkpoint,
            output_stride=output_stride,
        )


class CifarResNet(_ResidualNet):
    """The CIFAR-10 networks (section 4.2): 6n + 2 layers in three stages of 16, 32 and 64 channels.

    At width 16 and 10 classes, depths 20, 32, 44, 56, 110 and 1202 have 0.27, 0.46, 0.66, 0.85, 1.7 and 19.4
    million parameters (table 6).

    Args:
        depth: layers with weights, 6n + 2.
        width: channels of the first stage.
        projection: `A`, the paper's for these nets, has no parameters; `B` is a 1x1 convolution.

    The others are those of `ResNet`.

    Raises:
        ValueError: another depth, images below `min_size`, or stochastic depth without shortcuts.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: tuple[int, int],
        activation: ActivationFactory | None = None,
        norm: NormFactory | None = None,
        dropout: DropRate | None = None,
        stochastic_depth: DropRate | None = None,
        depth: PositiveInt = 20,
        width: PositiveInt = 16,
        stem: Stem = "auto",
        pool: Pool = "max",
        shortcut: bool = True,
        projection: Projection = "A",
        checkpoint: bool = False,
        output_stride: Literal[1, 2, 4, 8, 16, 32] | None = None,
    ) -> None:
        if depth < 8 or depth % 6 != 2:
            below = max(8, depth - (depth - 2) % 6)
            raise ValueError(
                f"expected a depth of 6n + 2 (8, 14, 20, ...), received {depth}; "
                f"model.depth={below} or model.depth={below + 6} are near"
            )
        super().__init__(
            block=BasicBlock,
            counts=((depth - 2) // 6,) * 3,
            options=BlockOptions(
                batch if norm is None else norm,
                nn.ReLU if activation is None else activation,
                shortcut,
                projection,
                stride_first=False,
            ),
            width=width,
            num_classes=num_classes,
            in_channels=in_channels,
            image_size=image_size,
            dropout=dropout,
            stochastic_depth=stochastic_depth,
            stem=stem,
            pool=pool,
            checkpoint=checkpoint,
            output_stride=output_stride,
        )
        if self.stem == "imagenet":
            self.notes.append("a CIFAR network on large images; resnet18 ... resnet152 are made for them")
