"""AlexNet: Krizhevsky, Sutskever and Hinton 2012, and its one-GPU form (Krizhevsky 2014, arXiv 1404.5997)."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cnnlab.blocks import ActivationFactory, DropRate, NormFactory
from cnnlab.models.blocks import (
    FeatureModule,
    Pool,
    Poolings,
    Stem,
    choose_stem,
    divided,
    downsampler,
    require_size,
    scaled,
    stem_note,
)
from cnnlab.models.norm import local_response
from cnnlab.protocols import Features
from cnnlab.schema import Positive

_GEOMETRY = {1: (11, 4, 2), 2: (5, 1, 2)}
"""Kernel, stride and padding of the convolutions that are not 3x3."""
_PLACES = ("0", "3", "6", "8", "10")
"""torchvision's names of the five convolutions; each one's activation has the next number."""
_POOLS = {1: "2", 2: "5", 5: "12"}
"""The convolutions, counted from 1, that a pooling follows, and its name."""


@dataclass(frozen=True)
class _Plan:
    """The five convolutions of a variant. Numbers in `grouped` and `responses` count them from 1."""

    channels: tuple[int, ...]
    grouped: tuple[int, ...] = ()
    """In two groups: the paper's two GPUs saw half of the channels each."""
    responses: tuple[int, ...] = ()
    """Whose activation gets a local response normalization."""


_PLANS = {
    "torchvision": _Plan((64, 192, 384, 256, 256)),
    "paper": _Plan((96, 256, 384, 384, 256), grouped=(2, 4, 5), responses=(1, 2)),
}


class _ConvStack(nn.Sequential):
    """The convolutional part. Called, it returns `Features`.

    Norm layers have names of their own, so that they do not change torchvision's numbers of the others.
    """

    def forward(self, x: Tensor) -> Features:  # type: ignore[override]
        stages, poolings = [], Poolings()
        for name, layer in self.named_children():
            if name in _POOLS.values():
                stages.append(x)
            x = poolings.through(layer, x)
        return poolings.features(*stages, x)


def _conv_stack(
    plan: _Plan,
    channels: tuple[int, ...],
    poolings: int,
    in_channels: int,
    pool: Pool,
    norm: NormFactory | None,
    activation: ActivationFactory,
    *,
    small: bool,
) -> _ConvStack:
    """Only the first `poolings` act; `norm=None` leaves the plan's own normalization."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (place, out_channels) in enumerate(zip(_PLACES, channels, strict=True), start=1):
        kernel, stride, padding = (3, 1, 1) if small else _GEOMETRY.get(number, (3, 1, 1))
        groups = 2 if number in plan.grouped else 1
        layers[place] = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups)
        if norm is not None:
            layers[f"norm{number}"] = norm(out_channels)
        layers[str(int(place) + 1)] = activation()
        if norm is None and number in plan.responses:
            layers[f"norm{number}"] = local_response(out_channels)
        if number in _POOLS:
            acts = list(_POOLS).index(number) < poolings
            padding = 1 if small else 0
            pooling = downsampler(pool, out_channels, 3, 2, padding, return_indices=True) if acts else nn.Identity()
            layers[_POOLS[number]] = pooling
        in_channels = out_channels
    return _ConvStack(layers)


class AlexNet(FeatureModule):
    """Five convolutions, three overlapping poolings and three linear layers.

    The feature stages are the maps before each pooling and the last pooled one; `indices` and `sizes` are those of
    the max-poolings.

    Args:
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        image_size: (height, width) of the images, in pixels.
        activation: factory of the activations; `None` is ReLU.
        norm: factory of the norm layers between convolution and activation; `None` is the variant's own:
            none, or in the paper's variant local response normalization after the first two activations.
        dropout: rate in the classifier; `None` is 0.5.
        variant: `torchvision` is the one-GPU network of 2014 (64, 192, 384, 256, 256 channels) with its keys;
            `paper` is that of 2012 (96, 256, 384, 384, 256), with the second, fourth and fifth convolution in
            two groups, and dropout after instead of before the first two linear layers.
        width: multiplier of all channels and hidden units.
        stem: `imagenet` starts with 11x11/4; `small` has 3x3/1 convolutions and padded poolings, the last of
            which are left out where three would leave less than 4x4; `auto` is small below 64 pixels.
        pool: 3x3/2 maximum, average, or strided convolution.

    Raises:
        ValueError: images below `min_size`.
    """

    own_init: dict[str, Any] = {"_target_": "cnnlab.init.He", "mode": "fan_in", "distribution": "normal"}
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
        dropout: DropRate | None = None,
        variant: Literal["torchvision", "paper"] = "torchvision",
        width: Positive = 1.0,
        stem: Stem = "auto",
        pool: Pool = "max",
    ) -> None:
        super().__init__()
        activation = nn.ReLU if activation is None else activation
        rate = 0.5 if dropout is None else dropout
        self.stem = choose_stem(stem, image_size)
        self.notes = [stem_note(self.stem, image_size)]
        small = self.stem == "small"
        self.min_size = 4 if small else 63
        require_size(image_size, self.min_size, "AlexNet", "model.stem=small takes 4x4 and more")
        poolings = 3
        grid = (6, 6)
        if small:
            # of the poolings, as many act as leave the classifier a map of 4x4 or more, as 32x32 images do
            poolings = min(3, (min(image_size) // 4).bit_length() - 1)
            left = divided(image_size, 2**poolings)
            grid = (min(6, left[0]), min(6, left[1]))
            self.notes.append(f"{poolings} of 3 poolings, the classifier sees {grid[0]}x{grid[1]} (paper: 6x6)")
        if variant == "paper":
            self.own_init = {"_target_": "cnnlab.init.PaperAlexNet"}
        plan = _PLANS[variant]
        channels = tuple(2 * scaled(count // 2, width) for count in plan.channels)  # even: two groups
        self.features = _conv_stack(plan, channels, poolings, in_channels, pool, norm, activation, small=small)
        self.stage_channels = (channels[0], channels[1], channels[4], channels[4])
        self.pool_channels = self.stage_channels[:poolings] if pool == "max" else ()
        self.avgpool = nn.AdaptiveAvgPool2d(grid)
        hidden = scaled(4096, width)
        linear = [nn.Linear(channels[4] * grid[0] * grid[1], hidden), nn.Linear(hidden, hidden)]
        layers: list[nn.Module] = []
        for layer in linear:
            parts: list[nn.Module] = [layer, activation()]
            layers += [nn.Dropout(rate), *parts] if variant == "torchvision" else [*parts, nn.Dropout(rate)]
        self.classifier = nn.Sequential(*layers, nn.Linear(hidden, num_classes))

    def classify(self, features: Features) -> dict[str, Tensor]:
        pooled = torch.flatten(self.avgpool(features.stages[-1]), 1)
        return {"logits": self.classifier(pooled)}
