"""VGG networks: Simonyan and Zisserman 2014, "Very Deep Convolutional Networks" (arXiv 1409.1556)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from cnnlab.blocks import ActivationFactory, DropRate, NormFactory
from cnnlab.models.blocks import (
    FeatureModule,
    Pool,
    Poolings,
    Stem,
    choose_stem,
    downsampler,
    require_size,
    require_spatial,
    scaled,
    stem_note,
)
from cnnlab.models.norm import no_norm
from cnnlab.protocols import Features
from cnnlab.schema import Positive

# table 1, columns A, B, D and E: convolutions in each of the five stages
_CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_CHANNELS = (64, 128, 256, 512, 512)


class _ConvStack(nn.Sequential):
    """The convolutional part, numbered as torchvision's `features`. Called, it returns `Features`.

    `pools` are the positions at which a stage ends.
    """

    def __init__(self, layers: list[nn.Module], pools: list[int]) -> None:
        super().__init__(*layers)
        self.pools = frozenset(pools)

    def forward(self, x: Tensor) -> Features:  # type: ignore[override]
        stages, poolings = [], Poolings()
        for position, layer in enumerate(self):
            if position in self.pools:
                stages.append(x)
            x = poolings.through(layer, x)
        return poolings.features(*stages, x)


def _conv_stack(
    convolutions: tuple[int, ...],
    channels: tuple[int, ...],
    poolings: int,
    in_channels: int,
    pool: Pool,
    norm: NormFactory,
    activation: ActivationFactory,
) -> _ConvStack:
    """Stages of `convolutions` layers of `channels`; all but the last `poolings` end without pooling."""
    layers: list[nn.Module] = []
    ends = []
    for stage, (count, out_channels) in enumerate(zip(convolutions, channels, strict=True)):
        for _ in range(count):
            layers.append(nn.Conv2d(in_channels, out_channels, 3, padding=1))
            normalizer = norm(out_channels)
            if not isinstance(normalizer, nn.Identity):  # torchvision numbers no layer for it
                layers.append(normalizer)
            layers.append(activation())
            in_channels = out_channels
        ends.append(len(layers))
        if stage < len(channels) - poolings:
            layers.append(nn.Identity())
        elif pool == "max":
            layers.append(downsampler(pool, out_channels, 2, 2, return_indices=True))
        else:
            layers.append(downsampler(pool, out_channels, 2, 2))
    return _ConvStack(layers, ends)


class VGG(FeatureModule):
    """Five stages of 3x3 convolutions, each ended by a 2x2 pooling, and three linear layers (table 1).

    The feature stages are the five maps before pooling and the last pooled one; `indices` and `sizes` are
    those of the max-poolings, for an unpooling decoder. Keys are those of torchvision's `vggNN`, and with
    norm=batch those of its `vggNN_bn`.

    Args:
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        image_size: (height, width) of the images, in pixels.
        activation: factory of the activations; `None` is ReLU.
        norm: factory of the norm layers between convolution and activation; `None` is none, as in the paper.
        dropout: rate in the classifier; `None` is the paper's 0.5, and 0 with the small stem, whose
            classifier is too small to need it.
        depth: layers with weights.
        width: multiplier of all channels and hidden units.
        stem: `imagenet` has the paper's classifier on a 7x7 map; `small` has a global average pooling and one
            linear layer, and leaves out the first poolings where five are too many; `auto` is small below
            64 pixels.
        pool: how the stages end: 2x2/2 maximum, average, or strided convolution.

    Raises:
        ValueError: an unknown depth or images below `min_size`.
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
        depth: Literal[11, 13, 16, 19] = 11,
        width: Positive = 1.0,
        stem: Stem = "auto",
        pool: Pool = "max",
    ) -> None:
        super().__init__()
        if depth not in _CONVOLUTIONS:
            raise ValueError(
                f"expected a depth of {', '.join(map(str, _CONVOLUTIONS))}, received {depth}; "
                f"model=vgg16 is the common one"
            )
        norm = no_norm if norm is None else norm
        activation = nn.ReLU if activation is None else activation
        self.stem = choose_stem(stem, image_size)
        self.notes = [stem_note(self.stem, image_size)]
        self.min_size = 32 if self.stem == "imagenet" else 8
        require_size(image_size, self.min_size, f"VGG-{depth}", "model.stem=small takes 8x8 and more")
        poolings = min(5, min(image_size).bit_length() - 1)
        smallest = (image_size[0] >> (poolings - 1), image_size[1] >> (poolings - 1))
        require_spatial(norm, smallest, f"VGG-{depth}", "larger images")
        if poolings < 5:
            self.notes.append(f"the first {5 - poolings} of 5 poolings are left out, so that five stages fit")

        channels = tuple(scaled(count, width) for count in _CHANNELS)
        stack = _conv_stack(_CONVOLUTIONS[depth], channels, poolings, in_channels, pool, norm, activation)
        self.features = stack
        self.stage_channels = (*channels, channels[-1])
        self.pool_channels = channels[5 - poolings :] if pool == "max" else ()
        if self.stem == "imagenet":
            rate, hidden = 0.5 if dropout is None else dropout, scaled(4096, width)
            self.avgpool = nn.AdaptiveAvgPool2d(7)
            self.classifier = nn.Sequential(
                nn.Linear(channels[-1] * 7 * 7, hidden),
                activation(),
                nn.Dropout(rate),
                nn.Linear(hidden, hidden),
                activation(),
                nn.Dropout(rate),
                nn.Linear(hidden, num_classes),
            )
        else:
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.classifier = nn.Sequential(nn.Dropout(dropout or 0.0), nn.Linear(channels[-1], num_classes))

    def classify(self, features: Features) -> dict[str, Tensor]:
        pooled = torch.flatten(self.avgpool(features.stages[-1]), 1)
        return {"logits": self.classifier(pooled)}
