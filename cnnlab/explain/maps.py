"""A map over an image, and whether there is anything in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

Evidence = Literal["", "not finite", "all zero", "all negative", "the same everywhere"]
"""Why a map shows nothing; empty where it shows something."""
_LEVEL = 1e-5
"""Of the largest magnitude: a map that varies less is rounding."""


@dataclass
class Map:
    """Maps of N images by one method.

    `values` (N, H, W) float32 on the CPU, of the images' size, not scaled: what speaks for the score is above 0; of
    methods that are not `signed`, how much a place matters either way.
    """

    method: str
    values: Tensor
    signed: bool
    evidence: list[Evidence]
    layer: str | None = None
    coarse: bool = False
    """Whether it was enlarged from a layer's maps."""
    grid: tuple[int, int] | None = None
    """(h, w) of those maps."""

    @property
    def title(self) -> str:
        return self.method if self.layer is None else f"{self.method} {self.layer}"


def evidence(values: Tensor) -> list[Evidence]:
    """Of maps (N, H, W) before anything is cut off."""
    return [_evidence(each) for each in values]


def _evidence(values: Tensor) -> Evidence:
    if not values.isfinite().all():
        return "not finite"
    low, high = values.min().item(), values.max().item()
    if low == high == 0:
        return "all zero"
    if high <= 0:
        return "all negative"
    if high - low <= _LEVEL * max(abs(low), abs(high)):
        return "the same everywhere"
    return ""


def over_image(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (N, h, w) enlarged to (N, H, W), bilinearly, as Grad-CAM's paper shows them."""
    return interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def cpu(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.float32)
