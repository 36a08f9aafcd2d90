"""Decoders that go up from a backbone's last map, stage by stage, to the logits of each pixel. They differ in how a map
is enlarged."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from cnnlab.blocks import ActivationFactory, DropRate, NormFactory
from cnnlab.heads.upsampling import Doubling, Size, doublings, interpolated, refine, repeated
from cnnlab.protocols import Features, Head
from cnnlab.schema import PositiveInt


class UnpoolDecoder(Head):
    """Undoes the backbone's max-poolings, last one first, with its indices (Badrinarayanan et al. 2015, SegNet).

    Each value returns to the place of its maximum, a convolution fills in what lies between. Where windows overlap
    (AlexNet) and share a maximum, their values are added there, as the gradient of the pooling is. What strided layers
    have halved between the poolings, and before the first one, is repeated.

    Args:
        stage_channels: of the backbone's stages.
        pool_channels: of the map before each pooling, in the backbone's order.
        image_size: (height, width) of the images, which the mask gets.
        mask_classes: how many a pixel may have.
        norm, activation: factories of the layers after each convolution; `None` is batch norm, and ReLU.

    Raises:
        ValueError: a backbone that hands on no pooling indices.
    """

    gives = ("mask",)

    def __init__(
        self,
        stage_channels: tuple[int, ...],
        pool_channels: tuple[int, ...],
        image_size: tuple[int, int],
        mask_classes: int,
        norm: NormFactory | None = None,
        activation: ActivationFactory | None = None,
    ):
        super().__init__()
        if not pool_channels:
            raise ValueError("this network hands on no max-pooling indices; type model=vgg, or head=nearest")
        self.size = image_size
        channels, last = stage_channels[-1], pool_channels[-1]
        self.bottleneck = nn.Identity() if channels == last else refine(channels, last, norm, activation)
        following = (*pool_channels[:-1][::-1], pool_channels[0])
        self.blocks = nn.ModuleList(
            refine(before, after, norm, activation)
            for before, after in zip(pool_channels[::-1], following, strict=True)
        )
        self.classifier = nn.Conv2d(pool_channels[0], mask_classes, 1)

    def forward(self, features: Features) -> dict[str, Tensor]:
        """`mask` (N, mask_classes, *image_size)."""
        x = self.bottleneck(features.stages[-1])
        for block, indices, size in zip(self.blocks, features.indices[::-1], features.sizes[::-1], strict=True):
            x = block(_unpool(repeated(x, (indices.shape[-2], indices.shape[-1])), indices, size))
        return {"mask": repeated(self.classifier(x), self.size)}


def _unpool(x: Tensor, indices: Tensor, size: Size) -> Tensor:
    """(N, C, h, w) -> (N, C, *size), zeros but where `indices` point.

    `max_unpool2d`, but without its refusal under `trainer.deterministic`, and with the sum where windows share a
    maximum, of which it would keep any one.
    """
    empty = x.new_zeros(*x.shape[:2], size[0] * size[1])
    return empty.scatter_add(2, indices.flatten(2), x.flatten(2)).unflatten(2, size)


class Pyramid(Head):
    """Enlarges maps up to each earlier stage's size, with a convolution after each step and, with `skips`, a sum with
    the stage's own map (the top-down path of Lin et al. 2017, Feature Pyramid Networks).

    Args:
        stage_channels: of the backbone's stages.
        image_size: (height, width) of the images, which the mask gets.
        mask_classes: how many a pixel may have.
        norm, activation: factories of the layers after each 3x3 convolution; `None` is batch norm, and ReLU.
        width: channels of the decoder.
        skips: whether the earlier stages' maps are added; without, the mask is made of the last one alone.
    """

    gives = ("mask",)

    def __init__(
        self,
        stage_channels: tuple[int, ...],
        image_size: tuple[int, int],
        mask_classes: int,
        norm: NormFactory | None = None,
        activation: ActivationFactory | None = None,
        width: PositiveInt = 64,
        skips: bool = True,
    ):
        super().__init__()
        self.size = image_size
        self.skips = skips
        self.laterals = nn.ModuleList(
            nn.Conv2d(channels, width, 1) if skips or number == len(stage_channels) else nn.Identity()
            for number, channels in enumerate(stage_channels, 1)
        )
        self.blocks = nn.ModuleList(refine(width, width, norm, activation) for _ in stage_channels)
        self.classifier = nn.Conv2d(width, mask_classes, 1)

    def enlarge(self, x: Tensor, size: Size, stage: int) -> Tensor:
        """(N, width, h, w) -> (N, width, *size), of `stage`; the logits are enlarged to the images' as stage -1."""
        raise NotImplementedError(f"{type(self).__name__} implements enlarge")

    def forward(self, features: Features) -> dict[str, Tensor]:
        """`mask` (N, mask_classes, *image_size)."""
        last = len(features.stages) - 1
        x = self.blocks[last](self.laterals[last](features.stages[last]))
        for stage in range(last - 1, -1, -1):
            own = features.stages[stage]
            x = self.enlarge(x, (own.shape[-2], own.shape[-1]), stage)
            x = self.blocks[stage](x + self.laterals[stage](own) if self.skips else x)
        return {"mask": self.enlarge(self.classifier(x), self.size, -1)}


class NearestDecoder(Pyramid):
    """Repeats values (see `Pyramid`)."""

    def enlarge(self, x: Tensor, size: Size, stage: int) -> Tensor:
        return repeated(x, size)


class BilinearDecoder(Pyramid):
    """Interpolates values between their neighbours (see `Pyramid`)."""

    def enlarge(self, x: Tensor, size: Size, stage: int) -> Tensor:
        return interpolated(x, size)


class TransposedDecoder(Pyramid):
    """Transposed convolutions, an upsampling that is learned (Long et al. 2015, "Fully Convolutional Networks",
    sections 3.3 and 4.2; see `Pyramid`).

    Args:
        stage_sizes: (height, width) of the backbone's stages.
        kernel: side of the transposed convolutions. With 3, which is no multiple of their stride, they make a
            checkerboard that training must even out; see `Doubling`.
        start: `bilinear` starts them as an interpolation, whatever the experiment's `init`; `random` as that says.

    The others are those of `Pyramid`.
    """

    def __init__(
        self,
        stage_channels: tuple[int, ...],
        stage_sizes: tuple[tuple[int, int], ...],
        image_size: tuple[int, int],
        mask_classes: int,
        norm: NormFactory | None = None,
        activation: ActivationFactory | None = None,
        width: PositiveInt = 64,
        skips: bool = True,
        kernel: Literal[2, 3, 4] = 4,
        start: Literal["bilinear", "random"] = "bilinear",
    ):
        super().__init__(stage_channels, image_size, mask_classes, norm, activation, width, skips)
        steps = zip(stage_sizes[1:], stage_sizes, strict=False)
        self.ups = nn.ModuleList(
            nn.ModuleList(Doubling(width, kernel, start) for _ in range(doublings(before, after)))
            for before, after in steps
        )
        # with a bias, which begins with what the loss wants the logits to begin with
        count = doublings(stage_sizes[0], image_size)
        self.up = nn.ModuleList(Doubling(mask_classes, kernel, start, bias=True) for _ in range(count))

    def enlarge(self, x: Tensor, size: Size, stage: int) -> Tensor:
        ups: list[Doubling] = list(self.up if stage < 0 else self.ups[stage])  # type: ignore[arg-type, call-overload]
        for number, up in enumerate(ups, 1):
            x = up.enlarge(x, size if number == len(ups) else None)
        return interpolated(x, size)


class UNetDecoder(Head):
    """Goes up by interpolation; at each earlier stage its own map is put beside the enlarged one, and two convolutions
    mix them (Ronneberger et al. 2015, "U-Net", figure 1, with interpolation in the place of its up-convolution).

    Args:
        stage_channels: of the backbone's stages.
        image_size: (height, width) of the images, which the mask gets.
        mask_classes: how many a pixel may have.
        norm, activation: factories of the layers after each 3x3 convolution; `None` is batch norm, and ReLU.
        width: channels at the first stage; each later one has twice as many, but no more than the backbone's own.
    """

    gives = ("mask",)

    def __init__(
        self,
        stage_channels: tuple[int, ...],
        image_size: tuple[int, int],
        mask_classes: int,
        norm: NormFactory | None = None,
        activation: ActivationFactory | None = None,
        width: PositiveInt = 32,
    ):
        super().__init__()
        self.size = image_size
        outs = [min(channels, width * 2**stage) for stage, channels in enumerate(stage_channels)]
        below = [*outs[1:-1], stage_channels[-1]] if len(outs) > 1 else []
        self.blocks = nn.ModuleList(
            nn.Sequential(
                refine(channels + under, out, norm, activation),
                refine(out, out, norm, activation),
            )
            for channels, under, out in zip(stage_channels, below, outs, strict=False)
        )
        self.classifier = nn.Conv2d(outs[0] if below else stage_channels[0], mask_classes, 1)

    def forward(self, features: Features) -> dict[str, Tensor]:
        """`mask` (N, mask_classes, *image_size)."""
        *earlier, x = features.stages
        for block, own in zip(list(self.blocks)[::-1], earlier[::-1], strict=True):
            x = block(torch.cat([own, interpolated(x, (own.shape[-2], own.shape[-1]))], 1))
        return {"mask": interpolated(self.classifier(x), self.size)}


class FullyConvolutional(Head):
    """One convolution on the last map, and its logits interpolated to the images' size (Long et al. 2015, "Fully
    Convolutional Networks", FCN-32s; the head of torchvision's `fcn_resnet50`).

    As fine as the backbone's last map: for one that keeps its resolution, such as model=resnet50 model.output_stride=8.

    Args:
        stage_channels: of the backbone's stages; the last one is read.
        image_size: (height, width) of the images, which the mask gets.
        mask_classes: how many a pixel may have.
        norm, activation: factories of the layers after the 3x3 convolution; `None` is batch norm, and ReLU.
        dropout: rate before the logits; `None` is torchvision's 0.1.
        width: channels of the convolution; `None` is a quarter of the map's.
    """

    gives = ("mask",)

    def __init__(
        self,
        stage_channels: tuple[int, ...],
        image_size: tuple[int, int],
        mask_classes: int,
        norm: NormFactory | None = None,
        activation: ActivationFactory | None = None,
        dropout: DropRate | None = None,
        width: PositiveInt | None = None,
    ):
        super().__init__()
        self.size = image_size
        channels = stage_channels[-1]
        width = max(1, channels // 4) if width is None else width
        self.block = refine(channels, width, norm, activation)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.classifier = nn.Conv2d(width, mask_classes, 1)

    def forward(self, features: Features) -> dict[str, Tensor]:
        """`mask` (N, mask_classes, *image_size)."""
        return {"mask": interpolated(self.classifier(self.dropout(self.block(features.stages[-1]))), self.size)}
