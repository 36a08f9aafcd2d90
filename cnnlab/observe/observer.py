"""The observer: decides what is due, pays for it once, and hands the figures over a step later."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnnlab.observe.taps import Taps
from cnnlab.observe.view import View
from cnnlab.protocols import Probe


class Look:
    """A step that nobody watches: every phase is a no-op. The base of the sampled step's look."""

    def __enter__(self) -> Look:
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes the taps, whatever happened."""

    def forward_done(self) -> None:
        """After the first micro-batch's forward and backward."""

    def gradients(self, count: int, scale: Tensor | float = 1.0) -> None:
        """The gradients are complete: accumulated, unscaled, reduced over ranks, not clipped."""

    def before_update(self) -> None:
        """The weights are about to change."""

    def updated(self) -> None:
        """The weights have changed."""


IDLE = Look()


class _SampledLook(Look):
    """Opens the taps for one step and lets each due probe read at the phase that has what it needs."""

    def __init__(self, observer: Observer, step: int, due: Sequence[Probe]):
        self._observer = observer
        self._due = due
        self._needs = frozenset().union(*(probe.needs for probe in due))
        self._view = View(step, 0, observer.model, observer.tensors, observer.parameters, observer.taps)
        self._figures: dict[str, Tensor] = {}

    def __enter__(self) -> Look:
        if self._observer.taps is not None and self._needs & {"activations", "activation_gradients"}:
            self._observer.taps.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.forward_done()
        if exception[0] is None:
            self._observer.publish(self._view.step, self._figures)

    def forward_done(self) -> None:
        if self._observer.taps is not None:
            self._observer.taps.stop()

    def _read(self, *, updates: bool) -> None:
        with torch.no_grad():
            for probe in self._due:
                if ("updates" in probe.needs) is updates:
                    self._figures |= probe.read(self._view)

    def gradients(self, count: int, scale: Tensor | float = 1.0) -> None:
        self._view.count, self._view.scale = count, scale
        self._read(updates=False)

    def before_update(self) -> None:
        if "updates" in self._needs:
            self._view.previous = [p.detach().clone() for p in self._observer.parameters]

    def updated(self) -> None:
        if "updates" in self._needs:
            self._read(updates=True)


class Observer:
    """Watches a network on the steps that are due.

    A run of `total_steps` takes at most `max_records` samples: past that, each probe's cadence is stretched.
    `receive` is told each record, `{"step", "layers", "tensors", tag: figures}`, one sampled step late, when the
    copy from the device has long arrived.
    """

    def __init__(
        self,
        model: nn.Module,
        probes: Sequence[Probe],
        taps: Taps | None,
        *,
        every: int,
        total_steps: int,
        max_records: int,
        receive: Callable[[dict[str, Any]], None] | None = None,
    ):
        self.model = model
        self.taps = taps
        self.receive = receive
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.tensors = tuple(name for name, _ in trained)
        self.parameters = [p for _, p in trained]
        least = math.ceil(total_steps / max_records)
        self.probes = [(probe, max(probe.every or every, least)) for probe in probes]
        self._pending: tuple[int, dict[str, torch.Size], Tensor, Any] | None = None

    def __call__(self, step: int) -> Look:
        """The look at update `step`: idle unless a probe is due."""
        due = [probe for probe, every in self.probes if step % every == 0]
        if not due:
            return IDLE
        self.drain()
        return _SampledLook(self, step, due)

    def publish(self, step: int, figures: dict[str, Tensor]) -> None:
        """Starts one copy of all figures to the host."""
        if not figures:
            return
        self.drain()
        shapes = {tag: tensor.shape for tag, tensor in figures.items()}
        packed = torch.cat([tensor.detach().float().flatten() for tensor in figures.values()])
        event = None
        if packed.device.type == "cuda":
            host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            host.copy_(packed, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            packed = host
        self._pending = (step, shapes, packed, event)

    def drain(self) -> None:
        """Hands over the figures of the last sampled step, waiting for their copy if it is still under way."""
        if self._pending is None:
            return
        step, shapes, packed, event = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        record: dict[str, Any] = {"step": step}
        if self.taps is not None:
            record["layers"] = list(self.taps.names)
        record["tensors"] = list(self.tensors)
        offset = 0
        host = packed.cpu()
        for tag, shape in shapes.items():
            record[tag] = host[offset : offset + shape.numel()].reshape(shape).tolist()
            offset += shape.numel()
        if self.receive is not None:
            self.receive(record)
