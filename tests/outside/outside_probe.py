"""A probe from outside: how many weights are as good as zero."""

from __future__ import annotations

import torch
from torch import Tensor

from cnnlab.observe.view import View
from cnnlab.protocols import Need, Probe
from cnnlab.schema import Positive, PositiveInt


class NearZero(Probe):
    """Share of each tensor's weights that are smaller than `threshold`."""

    needs: frozenset[Need] = frozenset({"gradients"})

    def __init__(self, every: PositiveInt | None = None, threshold: Positive = 1e-3):
        super().__init__(every)
        self.threshold = threshold

    def read(self, view: View) -> dict[str, Tensor]:
        shares = [(p.detach().abs() < self.threshold).float().mean() for p in view.parameters]
        return {"weight/near_zero": torch.stack(shares)}
