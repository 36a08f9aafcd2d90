"""Inception v3: Szegedy et al. 2015, "Rethinking the Inception Architecture" (arXiv 1512.00567)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnlab.blocks import ActivationFactory, DropRate, NormFactory, conv_norm
from cnnlab.models.blocks import (
    Pool,
    Poolings,
    Stem,
    choose_stem,
    divided,
    downsampler,
    require_size,
    require_spatial,
    scaled,
    stem_note,
)
from cnnlab.models.norm import batch
from cnnlab.protocols import ConvNet, Features
from cnnlab.schema import Positive


class BasicConv2d(nn.Module):
    """Convolution, norm, activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | tuple[int, int],
        *,
        norm: NormFactory,
        activation: ActivationFactory,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv, self.bn = conv_norm(norm, in_channels, out_channels, kernel, stride=stride, padding=padding)
        self.act = activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


Conv = Callable[..., BasicConv2d]
"""`BasicConv2d` with the network's norm and activation bound."""
Scale = Callable[[int], int]
"""The paper's channels to this network's."""


_NARROWEST = 32
"""The paper's smallest number of channels, which a width multiplier does not go below. Width 0.25 would leave 8
in the stem, too few to generalize from (digits held out, RMSProp, 10 epochs: 94 and 92 %; with 32: 97 and 97)."""


def _pool3(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1)


class InceptionA(nn.Module):
    """Figure 5: a 5x5 as two 3x3 ("double" 3x3), next to the 5x5 that the released network kept."""

    def __init__(self, inputs: int, pool_channels: int, conv: Conv, scale: Scale) -> None:
        super().__init__()
        self.branch1x1 = conv(inputs, scale(64), 1)
        self.branch5x5_1 = conv(inputs, scale(48), 1)
        self.branch5x5_2 = conv(scale(48), scale(64), 5, padding=2)
        self.branch3x3dbl_1 = conv(inputs, scale(64), 1)
        self.branch3x3dbl_2 = conv(scale(64), scale(96), 3, padding=1)
        self.branch3x3dbl_3 = conv(scale(96), scale(96), 3, padding=1)
        self.branch_pool = conv(inputs, scale(pool_channels), 1)
        self.out_channels = 2 * scale(64) + scale(96) + scale(pool_channels)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        branches = [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double]
        return torch.cat([*branches, self.branch_pool(_pool3(x))], 1)


class InceptionB(nn.Module):
    """Figure 10: halves the grid by convolution and by pooling side by side, without a bottleneck."""

    def __init__(self, inputs: int, conv: Conv, scale: Scale, pool: Pool, padding: int) -> None:
        super().__init__()
        self.branch3x3 = conv(inputs, scale(384), 3, stride=2, padding=padding)
        self.branch3x3dbl_1 = conv(inputs, scale(64), 1)
        self.branch3x3dbl_2 = conv(scale(64), scale(96), 3, padding=1)
        self.branch3x3dbl_3 = conv(scale(96), scale(96), 3, stride=2, padding=padding)
        self.pool = downsampler(pool, inputs, 3, 2, padding)
        self.out_channels = scale(384) + scale(96) + inputs

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, self.pool(x)], 1)


class InceptionC(nn.Module):
    """Figure 6: 7x7 factorized into 1x7 and 7x1, once and twice."""

    def __init__(self, inputs: int, channels7x7: int, conv: Conv, scale: Scale) -> None:
        super().__init__()
        c7, out = scale(channels7x7), scale(192)
        row, column = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = conv(inputs, out, 1)
        self.branch7x7_1 = conv(inputs, c7, 1)
        self.branch7x7_2 = conv(c7, c7, **row)
        self.branch7x7_3 = conv(c7, out, **column)
        self.branch7x7dbl_1 = conv(inputs, c7, 1)
        self.branch7x7dbl_2 = conv(c7, c7, **column)
        self.branch7x7dbl_3 = conv(c7, c7, **row)
        self.branch7x7dbl_4 = conv(c7, c7, **column)
        self.branch7x7dbl_5 = conv(c7, out, **row)
        self.branch_pool = conv(inputs, out, 1)
        self.out_channels = 4 * out

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_pool3(x))], 1)


class InceptionD(nn.Module):
    """Halves the grid before the last stage, as figure 10 with a factorized 7x7 in one branch."""

    def __init__(self, inputs: int, conv: Conv, scale: Scale, pool: Pool, padding: int) -> None:
        super().__init__()
        c = scale(192)
        self.branch3x3_1 = conv(inputs, c, 1)
        self.branch3x3_2 = conv(c, scale(320), 3, stride=2, padding=padding)
        self.branch7x7x3_1 = conv(inputs, c, 1)
        self.branch7x7x3_2 = conv(c, c, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = conv(c, c, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = conv(c, c, 3, stride=2, padding=padding)
        self.pool = downsampler(pool, inputs, 3, 2, padding)
        self.out_channels = scale(320) + c + inputs

    def forward(self, x: Tensor) -> Tensor:
        long = self.branch7x7x3_2(self.branch7x7x3_1(x))
        long = self.branch7x7x3_4(self.branch7x7x3_3(long))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), long, self.pool(x)], 1)


class InceptionE(nn.Module):
    """Figure 7: 3x3 factorized into 1x3 and 3x1 side by side, which widens the coarsest grid."""

    def __init__(self, inputs: int, conv: Conv, scale: Scale) -> None:
        super().__init__()
        c = scale(384)
        row, column = {"kernel": (1, 3), "padding": (0, 1)}, {"kernel": (3, 1), "padding": (1, 0)}
        self.branch1x1 = conv(inputs, scale(320), 1)
        self.branch3x3_1 = conv(inputs, c, 1)
        self.branch3x3_2a = conv(c, c, **row)
        self.branch3x3_2b = conv(c, c, **column)
        self.branch3x3dbl_1 = conv(inputs, scale(448), 1)
        self.branch3x3dbl_2 = conv(scale(448), c, 3, padding=1)
        self.branch3x3dbl_3a = conv(c, c, **row)
        self.branch3x3dbl_3b = conv(c, c, **column)
        self.branch_pool = conv(inputs, scale(192), 1)
        self.out_channels = scale(320) + 4 * c + scale(192)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        wide = [self.branch3x3_2a(single), self.branch3x3_2b(single)]
        wide += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *wide, self.branch_pool(_pool3(x))], 1)


class InceptionAux(nn.Module):
    """The auxiliary classifier on the last 17x17 grid (figure 8), which regularizes training."""

    _GRID = 17  # the smallest grid of which 5x5/3 average pooling leaves the 5x5 that `conv1` covers

    def __init__(self, inputs: int, num_classes: int, conv: Conv, scale: Scale) -> None:
        super().__init__()
        self.conv0 = conv(inputs, scale(128), 1)
        self.conv1 = conv(scale(128), scale(768), 5)
        self.fc = nn.Linear(scale(768), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, classes)."""
        fits = min(x.shape[-2:]) >= self._GRID
        x = F.avg_pool2d(x, 5, stride=3) if fits else F.adaptive_avg_pool2d(x, 5)
        x = F.adaptive_avg_pool2d(self.conv1(self.conv0(x)), 1)
        return self.fc(torch.flatten(x, 1))


class Inception(ConvNet):
    """Inception v3 (table 1) with batch norm also in the auxiliary classifier.

    The feature stages are the outputs of Conv2d_2b, Conv2d_4a, Mixed_5d, Mixed_6e and Mixed_7c; `indices` and `sizes`
    are those of the stem's max-poolings. In training the outputs have `aux` (N, classes) besides `logits`. Keys are
    those of torchvision's `inception_v3`.

    Args:
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        image_size: (height, width) of the images, in pixels.
        activation: factory of the activations; `None` is ReLU.
        norm: factory of the norm layers; `None` is batch norm with an epsilon of 0.001.
        dropout: rate before the classifier; `None` is 0.5.
        width: multiplier of the channels of all layers; none gets fewer than 32, the paper's narrowest.
        stem: `imagenet` is the paper's, which leaves 35 of 299 pixels; `small` is padded, and of its three
            strides only the last ones act, as many as leave a grid of 8 or more; `auto` is small below 75
            pixels.
        pool: what halves the grid next to convolutions.
        aux: whether there is the auxiliary classifier.

    Raises:
        ValueError: images below `min_size`.
    """

    own_init = {"_target_": "cnnlab.init.TruncatedNormal", "std": 0.1}
    classifier_modules = ("AuxLogits", "dropout", "fc")
    unpools = False

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: tuple[int, int],
        activation: ActivationFactory | None = None,
        norm: NormFactory | None = None,
        dropout: DropRate | None = None,
        width: Positive = 1.0,
        stem: Stem = "auto",
        pool: Pool = "max",
        aux: bool = True,
    ) -> None:
        super().__init__()
        norm = partial(batch, eps=0.001) if norm is None else norm
        activation = nn.ReLU if activation is None else activation
        self.stem = choose_stem(stem, image_size, imagenet_from=75)
        self.notes = [stem_note(self.stem, image_size)]
        self.min_size = 75 if self.stem == "imagenet" else 4
        require_size(image_size, self.min_size, "Inception v3", "model.stem=small takes 4x4 and more")
        conv = partial(BasicConv2d, norm=norm, activation=activation)

        def scale(channels: int) -> int:
            return max(_NARROWEST, scaled(channels, width))

        strides = self._add_stem(in_channels, image_size, conv, scale, pool)
        if self.stem == "small":
            self.notes.append(f"strides of the stem: {' '.join(map(str, strides))} (the paper's: 2 2 2)")
        # unpadded, the ImageNet network makes one pixel of up to 106; the auxiliary classifier always does
        stride = 106 if self.stem == "imagenet" else 4 * strides[0] * strides[1] * strides[2]
        smallest = (1, 1) if aux else divided(image_size, stride)
        require_spatial(norm, smallest, "Inception v3", "model.aux=false with larger images")

        padding = 0 if self.stem == "imagenet" else 1
        self.Mixed_5b = InceptionA(scale(192), 32, conv, scale)
        self.Mixed_5c = InceptionA(self.Mixed_5b.out_channels, 64, conv, scale)
        self.Mixed_5d = InceptionA(self.Mixed_5c.out_channels, 64, conv, scale)
        self.Mixed_6a = InceptionB(self.Mixed_5d.out_channels, conv, scale, pool, padding)
        self.Mixed_6b = InceptionC(self.Mixed_6a.out_channels, 128, conv, scale)
        self.Mixed_6c = InceptionC(self.Mixed_6b.out_channels, 160, conv, scale)
        self.Mixed_6d = InceptionC(self.Mixed_6c.out_channels, 160, conv, scale)
        self.Mixed_6e = InceptionC(self.Mixed_6d.out_channels, 192, conv, scale)
        middle = self.Mixed_6e.out_channels
        self.AuxLogits = InceptionAux(middle, num_classes, conv, scale) if aux else None
        self.Mixed_7a = InceptionD(middle, conv, scale, pool, padding)
        self.Mixed_7b = InceptionE(self.Mixed_7a.out_channels, conv, scale)
        self.Mixed_7c = InceptionE(self.Mixed_7b.out_channels, conv, scale)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.5 if dropout is None else dropout)
        self.fc = nn.Linear(self.Mixed_7c.out_channels, num_classes)
        early = (scale(64), scale(192), self.Mixed_5d.out_channels)
        self.stage_channels = (*early, middle, self.Mixed_7c.out_channels)

    def _add_stem(
        self,
        in_channels: int,
        image_size: tuple[int, int],
        conv: Conv,
        scale: Scale,
        pool: Pool,
    ) -> tuple[int, int, int]:
        """The layers before the first Inception block. Returns the strides of their three reductions."""
        if self.stem == "imagenet":
            strides, padding = (2, 2, 2), 0
        else:
            # each stride of 2 must leave a grid of 8, of which the later stages make 4 and 2
            acting = min(3, max(0, (min(image_size) // 8).bit_length() - 1))
            first, second, third = (2 if acting >= 3 - place else 1 for place in range(3))
            strides, padding = (first, second, third), 1
        self.Conv2d_1a_3x3 = conv(in_channels, scale(32), 3, stride=strides[0], padding=padding)
        self.Conv2d_2a_3x3 = conv(scale(32), scale(32), 3, padding=padding)
        self.Conv2d_2b_3x3 = conv(scale(32), scale(64), 3, padding=1)
        pools = [
            downsampler(pool, scale(channels), 3, 2, padding, return_indices=True) if stride == 2 else nn.Identity()
            for channels, stride in zip((64, 192), strides[1:], strict=True)
        ]
        self.pool_channels = tuple(
            scale(channels)
            for channels, stride in zip((64, 192), strides[1:], strict=True)
            if stride == 2 and pool == "max"
        )
        self.maxpool1 = pools[0]
        self.Conv2d_3b_1x1 = conv(scale(64), scale(80), 1)
        self.Conv2d_4a_3x3 = conv(scale(80), scale(192), 3, padding=padding)
        self.maxpool2 = pools[1]
        return strides

    def features(self, x: Tensor) -> Features:
        shallow = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        poolings = Poolings()
        stem = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(poolings.through(self.maxpool1, shallow)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(poolings.through(self.maxpool2, stem))))
        middle = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        middle = self.Mixed_6e(self.Mixed_6d(middle))
        last = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(middle)))
        return poolings.features(shallow, stem, x, middle, last)

    def classify(self, features: Features) -> dict[str, Tensor]:
        *_, middle, last = features.stages
        outputs = {}
        if self.AuxLogits is not None and self.training:
            outputs["aux"] = self.AuxLogits(middle)
        pooled = torch.flatten(self.avgpool(last), 1)
        outputs["logits"] = self.fc(self.dropout(pooled))
        return outputs
