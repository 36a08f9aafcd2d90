"""A way to fine-tune from outside: before the head, biases and norms alone train (Ben Zaken et al. 2021, "BitFit")."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from cnnlab.interventions import Finetune
from cnnlab.interventions.finetuning import parted
from cnnlab.schema import Positive


class BitFit(Finetune):
    def __init__(self, backbone_lr: Positive = 0.5):
        super().__init__()
        self.backbone_lr = backbone_lr

    def standing(self, model: nn.Module) -> list[str]:
        backbone, _ = parted(model)
        return [name for _, names in backbone for name in names if model.get_parameter(name).ndim > 1]

    def rates(self, model: nn.Module) -> Mapping[str, float]:
        backbone, _ = parted(model)
        return {title: self.backbone_lr for title, _ in backbone}
