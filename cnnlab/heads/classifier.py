"""Classifiers of an image, in the place of a network's own."""

from __future__ import annotations

from torch import Tensor, nn

from cnnlab.blocks import DropRate
from cnnlab.protocols import Features, Head


class LinearClassifier(Head):
    """The mean of the last stage's map over its places, and one linear layer (Lin et al. 2013, "Network In Network",
    section 3.2).

    Args:
        stage_channels: of the backbone's stages.
        num_classes: of the image.
        dropout: rate before the linear layer; `None` is 0.
    """

    gives = ("logits",)
    needs_maps = False

    def __init__(self, stage_channels: tuple[int, ...], num_classes: int, dropout: DropRate | None = None):
        super().__init__()
        self.dropout = nn.Dropout(dropout or 0.0)
        self.fc = nn.Linear(stage_channels[-1], num_classes)

    def forward(self, features: Features) -> dict[str, Tensor]:
        """`logits` (N, num_classes)."""
        return {"logits": self.fc(self.dropout(features.stages[-1].mean((2, 3))))}
