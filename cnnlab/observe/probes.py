"""The laboratory's own probes. A user's probe is a class like these, named by a YAML
in a `probe/` folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnnlab import measure
from cnnlab.observe.view import View
from cnnlab.protocols import Probe
from cnnlab.schema import PositiveInt


class Activations(Probe):
    """Mean, std, zeros, saturation and dead channels of each layer's activations, over a few samples, and the std
    of the pre-activations."""

    needs = frozenset({"activations"})

    def read(self, view: View) -> dict[str, Tensor]:
        assert view.activity is not None
        columns = ("mean", "std", "zeros", "saturated", "pre_std", "dead")
        return {f"activation/{name}": getattr(view.activity, name) for name in columns}


class ActivationGradients(Probe):
    """Std of the gradient of a sample's loss at each layer's activations.

    It depends on neither the batch size, the accumulation nor the ranks. Its profile over depth is what shows
    vanishing: weight-gradient norms are blind to it, because in a bias-free ReLU net ⟨W_l, ∂L/∂W_l⟩ is the same
    for every layer.
    """

    needs = frozenset({"activation_gradients"})

    def supports(self, run: Any) -> str | None:
        if getattr(run.optimizer, "create_graph", False):
            return f"{type(run.optimizer).__name__} differentiates with respect to the weights alone"
        return None

    def read(self, view: View) -> dict[str, Tensor]:
        assert view.activity is not None
        return {"activation_gradient/std": view.activity.gradient_std}


class Gradients(Probe):
    """L2 norm of each weight tensor's gradient and of the whole."""

    needs = frozenset({"gradients"})

    def read(self, view: View) -> dict[str, Tensor]:
        each = measure.norms(measure.gradients_of(view.parameters))
        return {"gradient/norm": each, "gradient/global_norm": torch.linalg.vector_norm(each)}


class Updates(Probe):
    """Norm of each weight tensor, and ‖Δw‖/‖w‖ from the true change, whatever the optimizer (NaN where w is 0)."""

    needs = frozenset({"updates"})

    def read(self, view: View) -> dict[str, Tensor]:
        assert view.previous is not None
        return {
            "weight/norm": measure.norms(view.previous),
            "update/ratio": measure.update_ratios(view.previous, view.parameters),
        }


class Histograms(Probe):
    """Histograms of every weight tensor and its gradient: rows of (low, high, counts...)."""

    needs = frozenset({"gradients"})

    def __init__(self, every: PositiveInt | None = None, bins: PositiveInt = 64):
        super().__init__(every)
        self.bins = bins

    def read(self, view: View) -> dict[str, Tensor]:
        return {
            "histogram/weight": self._rows([p.detach() for p in view.parameters]),
            "histogram/gradient": self._rows(measure.gradients_of(view.parameters)),
        }

    def _rows(self, tensors: list[Tensor]) -> Tensor:
        rows = []
        for tensor in tensors:
            flat = tensor.detach().float().flatten()
            low, high = flat.aminmax()
            width = torch.where(high > low, high - low, torch.ones_like(low))
            bucket = ((flat - low) / width * self.bins).long().clamp(0, self.bins - 1)
            counts = torch.zeros(self.bins, device=flat.device).scatter_add_(0, bucket, torch.ones_like(flat))
            rows.append(torch.cat([torch.stack([low, high]), counts]))
        return torch.stack(rows)
