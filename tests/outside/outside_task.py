"""A task from outside: classification that also counts a label among the `k` best guesses as a hit."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cnnlab.protocols import Batch, DataSpec, Loss, Outputs
from cnnlab.schema import PositiveInt
from cnnlab.tasks.classification import Classification


class TopK(Classification):
    """Adds the metric `top{k}_accuracy`."""

    def __init__(self, loss: Loss, spec: DataSpec, k: PositiveInt = 3):
        super().__init__(loss, spec)
        if k > spec.num_classes:
            raise ValueError(f"expected k of at most {spec.num_classes} classes, received {k}")
        self.k = k

    def measure(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        best = outputs["logits"].topk(self.k, 1).indices
        hits = (best == batch["label"][:, None]).any(1).sum()
        return {**super().measure(outputs, batch), "top_hits": hits}

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        share = (sums["top_hits"] / sums["confusion"].sum()).item()
        return {**super().metrics(sums), f"top{self.k}_accuracy": share}
