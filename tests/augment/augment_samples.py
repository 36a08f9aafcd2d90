"""Images, batches and draws that the tests of augmentation share."""

from __future__ import annotations

import torch
from torch import Tensor

from cnnlab.augment import Draws
from cnnlab.protocols import Batch, DataSpec


def spec(channels: int = 3, size: tuple[int, int] = (16, 20), targets: frozenset[str] = frozenset({"label"})):
    return DataSpec(channels, size, ("a", "b", "c", "d"), targets)


def pictures(count: int = 8, channels: int = 3, size: tuple[int, int] = (16, 20), seed: int = 0) -> Tensor:
    """(N, C, H, W) uint8: smooth waves with some noise, so that interpolation has something to follow."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    y = torch.linspace(0, 4, height)[:, None]
    x = torch.linspace(0, 5, width)[None, :]
    phase = torch.rand(count, channels, 1, 1, generator=generator) * 6
    waves = 0.5 + 0.35 * torch.sin(x + 0.7 * y + phase)
    noise = 0.1 * (torch.rand(count, channels, height, width, generator=generator) - 0.5)
    return ((waves + noise).clamp(0, 1) * 255).round().to(torch.uint8)


def batch_of(images: Tensor, **targets: Tensor) -> Batch:
    return {"image": images, "index": torch.arange(len(images)), **targets}


def draws_of(uniforms: list[list[float]] | Tensor, images: Tensor, epoch: int = 0) -> Draws:
    """Draws with given numbers, one row an image."""
    _, channels, height, width = images.shape
    mean = images.float().mean((2, 3)) / (1 if images.is_floating_point() else 255)
    return Draws(torch.as_tensor(uniforms), epoch, (height, width), channels, 4, mean)


class Images:
    """A split of given images (N, C, H, W) uint8."""

    fingerprint = "images"
    labels: Tensor | None = None

    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, index: Tensor) -> Batch:
        return {"image": self.images[index], "index": index}
