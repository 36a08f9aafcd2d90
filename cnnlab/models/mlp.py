"""A multilayer perceptron: what an image network is without convolution."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn

from cnnlab.blocks import ActivationFactory, DropRate, NormFactory
from cnnlab.models.blocks import require_spatial
from cnnlab.models.norm import no_norm
from cnnlab.protocols import ConvNet, Features
from cnnlab.schema import PositiveInt


class Dense(nn.Module):
    """Linear layer, norm, activation, dropout."""

    def __init__(
        self, inputs: int, outputs: int, norm: NormFactory, activation: ActivationFactory, dropout: float
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.norm = norm(outputs)
        self.act = activation()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs) -> (N, outputs)."""
        x = self.linear(x)
        x = self.norm(x[:, :, None, None])[:, :, 0, 0]  # norm layers take maps: here one of a single pixel
        return self.dropout(self.act(x))


class MLP(ConvNet):
    """Fully connected layers on the flattened image, of which `image_size` fixes the number of inputs.

    The feature stages are the hidden layers as maps (N, C, 1, 1).

    Args:
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        image_size: (height, width) of the images, in pixels.
        activation: factory of the activations; `None` is ReLU.
        norm: factory of the norm layers; `None` is none.
        dropout: rate after each hidden layer; `None` is 0.
        hidden: units of each hidden layer.

    Raises:
        ValueError: no hidden layer.
    """

    own_init = {"_target_": "cnnlab.init.He", "mode": "fan_in", "distribution": "normal"}
    classifier_modules = ("classifier",)
    spatial = False

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: tuple[int, int],
        activation: ActivationFactory | None = None,
        norm: NormFactory | None = None,
        dropout: DropRate | None = None,
        hidden: tuple[PositiveInt, ...] = (256, 256),
    ) -> None:
        super().__init__()
        norm = no_norm if norm is None else norm
        activation = nn.ReLU if activation is None else activation
        hidden = tuple(hidden)
        if not hidden:
            raise ValueError("expected at least one hidden layer, received model.hidden=[]; model.hidden=[256]")
        require_spatial(norm, (1, 1), "an MLP", "another model")
        self.stem = "none"
        self.notes: list[str] = []
        self.min_size = 1
        sizes = (in_channels * prod(image_size), *hidden)
        self.layers = nn.ModuleList(
            Dense(inputs, outputs, norm, activation, dropout or 0.0) for inputs, outputs in pairwise(sizes)
        )
        self.classifier = nn.Linear(hidden[-1], num_classes)
        self.stage_channels = hidden

    def features(self, x: Tensor) -> Features:
        x = torch.flatten(x, 1)
        stages = []
        for layer in self.layers:
            x = layer(x)
            stages.append(x[:, :, None, None])
        return Features(tuple(stages))

    def classify(self, features: Features) -> dict[str, Tensor]:
        return {"logits": self.classifier(torch.flatten(features.stages[-1], 1))}
