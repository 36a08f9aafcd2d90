"""An intervention from outside: weights that forget a little at each update, and count how often."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from cnnlab.protocols import Intervention
from cnnlab.schema import Probability


class Forgetting(Intervention):
    def __init__(self, share: Probability = 0.01):
        self.share = share
        self.updates = 0
        self._parameters: list[nn.Parameter] = []

    def attach(self, model: nn.Module, seed: int) -> None:
        self._parameters = list(model.parameters())

    @torch.no_grad()
    def weights(self, step: int) -> None:
        self.updates += 1
        torch._foreach_mul_(self._parameters, 1 - self.share)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates = state["updates"]
