"""Averages of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

from torch import Tensor, nn

from cnnlab.protocols import Intervention
from cnnlab.schema import Range
from cnnlab.torch_private import foreach_copy_, foreach_lerp_


class Ema(Intervention):
    """Exponential moving average of parameters and floating-point buffers: a ← decay·a + (1 - decay)·w, with which the
    network is evaluated (Polyak & Juditsky 1992).

    The decay is warmed up as min(decay, (1 + t) / (10 + t)) with t updates done (as in the TensorFlow
    implementation of Polyak averaging), so that a short run is not held at its initialization.
    """

    def __init__(self, decay: Annotated[float, Range(above=0, below=1)] = 0.99):
        self.decay = decay
        self.updates = 0
        self._live: list[Tensor] = []
        self._average: list[Tensor] = []

    def attach(self, model: nn.Module, seed: int) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        self._live = [t.detach() for t in tensors if t.is_floating_point()]
        self._average = [t.clone() for t in self._live]

    def weights(self, step: int) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        foreach_lerp_(self._average, self._live, 1 - decay)

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """The network with the averages in place of its weights, for the block."""
        saved = [t.clone() for t in self._live]
        foreach_copy_(self._live, self._average)
        try:
            yield
        finally:
            foreach_copy_(self._live, saved)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": list(self._average)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        shapes = [tuple(t.shape) for t in state["average"]]
        if shapes != [tuple(t.shape) for t in self._average]:
            raise ValueError("expected the averages of this network's weights, received those of another")
        self.updates = state["updates"]
        foreach_copy_(self._average, [t.to(a.device) for t, a in zip(state["average"], self._average)])
