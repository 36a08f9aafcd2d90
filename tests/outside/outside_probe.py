"""A probe from outside: how many weights are as good as zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnnlab.observe.view import View
from cnnlab.protocols import Need
from cnnlab.schema import Positive, PositiveInt


class NearZero:
    """Share of each tensor's weights that are smaller than `threshold`."""

    name = "near_zero"
    needs: frozenset[Need] = frozenset({"gradients"})

    def __init__(self, every: PositiveInt | None = None, threshold: Positive = 1e-3):
        self.every = every
        self.threshold = threshold

    def supports(self, run: Any) -> str | None:
        return None

    def read(self, view: View) -> dict[str, Tensor]:
        shares = [(p.detach().abs() < self.threshold).float().mean() for p in view.parameters]
        return {"weight/near_zero": torch.stack(shares)}
