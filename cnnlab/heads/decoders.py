"""Decoders: from a backbone's features to the logits of each pixel."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from cnnlab.blocks import ActivationFactory, NormFactory, conv_norm
from cnnlab.protocols import Features, Head
from cnnlab.schema import PositiveInt


def _refine(
    in_channels: int, out_channels: int, norm: NormFactory | None, activation: ActivationFactory | None
) -> nn.Sequential:
    """A 3x3 convolution with norm and activation; batch norm and ReLU where the experiment chooses none."""
    conv, normalizer = conv_norm(norm or nn.BatchNorm2d, in_channels, out_channels, 3, padding=1)
    return nn.Sequential(conv, normalizer, (activation or nn.ReLU)())


class UnpoolDecoder(Head):
    """Undoes the backbone's max-poolings, last one first, with its indices (Badrinarayanan et al. 2015, SegNet).

    Each value returns to the place of its maximum, a convolution fills in what lies between.

    Args:
        stage_channels: of the backbone's stages; the last map, (N, channels, H, W), has the size that the last pooling
            left.
        pool_channels: of the map before each pooling, in the backbone's order.
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
        mask_classes: int,
        norm: NormFactory | None = None,
        activation: ActivationFactory | None = None,
    ):
        super().__init__()
        if not pool_channels:
            raise ValueError("this network hands on no max-pooling indices; type model=vgg, or head=nearest")
        channels, last = stage_channels[-1], pool_channels[-1]
        self.bottleneck = nn.Identity() if channels == last else _refine(channels, last, norm, activation)
        following = (*pool_channels[:-1][::-1], pool_channels[0])
        self.blocks = nn.ModuleList(
            _refine(before, after, norm, activation)
            for before, after in zip(pool_channels[::-1], following, strict=True)
        )
        self.classifier = nn.Conv2d(pool_channels[0], mask_classes, 1)

    def forward(self, features: Features) -> dict[str, Tensor]:
        """`mask` (N, mask_classes, H, W), of the size of the first pooling's input."""
        x = self.bottleneck(features.stages[-1])
        for block, indices, size in zip(self.blocks, features.indices[::-1], features.sizes[::-1], strict=True):
            x = block(_unpool(x, indices, size))
        return {"mask": self.classifier(x)}


def _unpool(x: Tensor, indices: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, C, h, w) -> (N, C, *size), zeros but where `indices` point.

    `max_unpool2d`, but without its refusal under `trainer.deterministic`: windows that do not overlap have no
    index twice.
    """
    empty = x.new_zeros(*x.shape[:2], size[0] * size[1])
    return empty.scatter(2, indices.flatten(2), x.flatten(2)).unflatten(2, size)


class NearestDecoder(Head):
    """Repeats values up to each earlier stage's size, with a convolution after each step and a sum with the
    stage's own map (the top-down path of Lin et al. 2017, Feature Pyramid Networks).

    Args:
        stage_channels: of the backbone's stages.
        image_size: (height, width) of the images, which the mask gets.
        mask_classes: how many a pixel may have.
        norm, activation: factories of the layers after each 3x3 convolution; `None` is batch norm, and ReLU.
        width: channels of the decoder.
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
    ):
        super().__init__()
        self.size = image_size
        self.laterals = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in stage_channels)
        self.blocks = nn.ModuleList(_refine(width, width, norm, activation) for _ in stage_channels)
        self.classifier = nn.Conv2d(width, mask_classes, 1)

    def forward(self, features: Features) -> dict[str, Tensor]:
        """`mask` (N, mask_classes, *image_size)."""
        maps = [lateral(stage) for lateral, stage in zip(self.laterals, features.stages, strict=True)]
        x = self.blocks[-1](maps[-1])
        for block, lateral in zip(list(self.blocks)[-2::-1], maps[-2::-1], strict=True):
            x = block(functional.interpolate(x, size=lateral.shape[-2:], mode="nearest") + lateral)
        return {"mask": functional.interpolate(self.classifier(x), size=self.size, mode="nearest")}
