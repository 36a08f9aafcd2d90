"""Networks of other libraries, torchvision's and timm's, as networks of the laboratory."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cnnlab.errors import did_you_mean
from cnnlab.models.parts import ActivationFactory, DropRate
from cnnlab.models.norm import NormFactory
from cnnlab.protocols import ConvNet, Features


def _refuse_swaps(activation: ActivationFactory | None, norm: NormFactory | None) -> None:
    for group, given in (("activation", activation), ("norm", norm)):
        if given is not None:
            raise ValueError(
                f"expected {group}=auto for a network that is built elsewhere, received another {group}; "
                f"model=resnet18, vgg16, inception_v3 and the like take any"
            )


class _External(ConvNet):
    """A foreign network, whole: it computes the logits itself, and its feature stages when a head asks for them."""

    own_init = {"_target_": "cnnlab.init.Default"}
    stem = "its own"
    min_size = 1
    network: nn.Module

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return as_mapping(self.network(x)) if self.head is None else self.head(self.features(x))


def as_mapping(returned: Any) -> dict[str, Tensor]:
    """`logits`, and `aux` where the network has auxiliary classifiers (the mean of them, where there are two)."""
    if isinstance(returned, Tensor):
        return {"logits": returned}
    fields = returned if isinstance(returned, Mapping) else returned._asdict()
    auxiliary = [value for name, value in fields.items() if name.startswith("aux") and value is not None]
    outputs = {"logits": fields["logits"]}
    if auxiliary:
        outputs["aux"] = sum(auxiliary[1:], auxiliary[0]) / len(auxiliary)
    return outputs
