"""Networks for the tests of signals: as wide as theory likes them, as small as the tests' time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cnnlab.diagnose.signal import Signals, measured
from cnnlab.protocols import Outputs

IMAGES = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def plain(
    activation: Callable[[], nn.Module] | None = nn.ReLU,
    *,
    norm: bool = False,
    depth: int = 30,
    width: int = 64,
) -> nn.Sequential:
    """Convolutions 3x3 with biases, the average over places, a linear layer."""
    found: list[nn.Module] = []
    channels = 3
    for _ in range(depth):
        found.append(nn.Conv2d(channels, width, 3, padding=1))
        found += [nn.BatchNorm2d(width)] if norm else []
        found += [] if activation is None else [activation()]
        channels = width
    return nn.Sequential(*found, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))


def cross_entropy(outputs: Outputs) -> Tensor:
    logits = outputs["logits"]
    return nn.functional.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1], reduction="none")


def signals(model: nn.Module, images: Tensor = IMAGES) -> Signals:
    return measured(model, images, cross_entropy)
