"""A head from outside: a classifier with a hidden layer on the mean of each stage."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cnnlab.protocols import Features, Head
from cnnlab.schema import PositiveInt


class EveryStage(Head):
    """The means of all stages' maps, a hidden layer, the logits."""

    gives = ("logits",)
    needs_maps = False

    def __init__(self, stage_channels: tuple[int, ...], num_classes: int, hidden: PositiveInt = 16):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(sum(stage_channels), hidden), nn.ReLU(), nn.Linear(hidden, num_classes))

    def forward(self, features: Features) -> dict[str, Tensor]:
        means = [stage.mean((2, 3)) for stage in features.stages]
        return {"logits": self.layers(torch.cat(means, 1))}
