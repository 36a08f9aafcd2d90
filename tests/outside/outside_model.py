"""A model from outside: LeNet's pattern with two convolutions, a plain `nn.Module`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from cnnlab.schema import PositiveInt


class TwoConvolutions(nn.Module):
    """(N, C, H, W) -> logits (N, classes). What the lab knows of the data comes by the parameters' names."""

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        activation: Callable[[], nn.Module] | None = None,
        channels: PositiveInt = 8,
        pool: Literal["max", "avg"] = "max",
    ):
        super().__init__()
        activation = activation or nn.ReLU
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, padding=1),
            activation(),
            nn.MaxPool2d(2) if pool == "max" else nn.AvgPool2d(2),
            nn.Conv2d(channels, 2 * channels, 3, padding=1),
            activation(),
            nn.AdaptiveAvgPool2d(1),
        )
        self.classifier = nn.Linear(2 * channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))
