"""The stateful objects of the loop, each of which a checkpoint holds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cnnlab.ranks import Ranks


class Clock:
    """Where the run is: `step` updates and `epoch` epochs are done, `batch` updates inside this epoch."""

    def __init__(self) -> None:
        self.step = 0
        self.epoch = 0
        self.batch = 0
        self.samples = 0
        self._earlier = 0.0
        self._began: float | None = None

    @property
    def seconds(self) -> float:
        """Wall time of the training so far, over all its sessions."""
        return self._earlier + (0.0 if self._began is None else time.perf_counter() - self._began)

    def start(self) -> None:
        self._began = time.perf_counter()

    def stop(self) -> None:
        self._earlier, self._began = self.seconds, None

    def advance(self, samples: int) -> None:
        self.step += 1
        self.batch += 1
        self.samples += samples

    def next_epoch(self) -> None:
        self.epoch += 1
        self.batch = 0

    def state_dict(self) -> dict[str, Any]:
        names = ("step", "epoch", "batch", "samples", "seconds")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]
        self.samples, self._earlier = state["samples"], state["seconds"]


class Totals:
    """Sums since the last record, on the device; nobody waits for them before they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, sums: Mapping[str, Tensor]) -> None:
        for name, value in sums.items():
            if name in self._sums:
                self._sums[name] += value
            else:
                self._sums[name] = value.detach().clone()

    def gather(self, ranks: Ranks) -> None:
        """Moves the sums of all ranks to rank 0."""
        ranks.sum_(list(self._sums.values()))
        if not ranks.is_main:
            self._sums = {}

    def take(self, ranks: Ranks) -> dict[str, Tensor]:
        """The sums over all ranks, on the CPU; starts again from nothing."""
        sums, self._sums = self._sums, {}
        ranks.sum_(list(sums.values()))
        return {name: value.cpu() for name, value in sums.items()}

    def __bool__(self) -> bool:
        return bool(self._sums)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value.cpu().clone() for name, value in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._sums = {name: value.clone() for name, value in state.items()}

    def to(self, device: torch.device) -> None:
        self._sums = {name: value.to(device) for name, value in self._sums.items()}


@dataclass
class Selection:
    """The best value of the monitored metric so far, and how many evaluations went without a better one."""

    metric: str
    direction: Literal["max", "min"]
    value: float | None = None
    epoch: int | None = None
    waited: int = 0

    def offer(self, value: float, epoch: int) -> bool:
        """Whether `value` is the best so far (the first counts; a NaN never does)."""
        sign = 1 if self.direction == "max" else -1
        better = value == value and (self.value is None or sign * value > sign * self.value)
        if better:
            self.value, self.epoch, self.waited = value, epoch, 0
        else:
            self.waited += 1
        return better

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value, self.epoch, self.waited = state["value"], state["epoch"], state["waited"]

    def as_record(self) -> dict[str, Any] | None:
        if self.value is None:
            return None
        return {"metric": f"val/{self.metric}", "value": self.value, "epoch": self.epoch}


class Ema:
    """Exponential moving average of parameters and floating-point buffers: a ← decay·a + (1 - decay)·w.

    The decay is warmed up as min(decay, (1 + t) / (10 + t)) with t updates done (as in the TensorFlow
    implementation of Polyak averaging), so that a short run is not held at its initialization.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.updates = 0
        tensors = [*model.parameters(), *model.buffers()]
        self._live = [t for t in tensors if t.is_floating_point()]
        self._average = [t.detach().clone() for t in self._live]

    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._average, [t.detach() for t in self._live], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network with the averages in place of its weights, for the block."""
        saved = [t.detach().clone() for t in self._live]
        with torch.no_grad():
            torch._foreach_copy_(self._live, self._average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._live, saved)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": list(self._average)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates = state["updates"]
        if len(state["average"]) != len(self._average):
            raise ValueError(f"expected {len(self._average)} averages, received {len(state['average'])}")
        torch._foreach_copy_(self._average, [t.to(a.device) for t, a in zip(state["average"], self._average)])
