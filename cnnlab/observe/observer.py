"""The observer: decides what is due, pays for it once, and hands the figures over a step later."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnnlab.machine.copies import Arriving
from cnnlab.observe.overhead import Aside, Overhead, mark_for
from cnnlab.observe.taps import Taps
from cnnlab.observe.view import View
from cnnlab.protocols import Probe

MAX_FIGURES = 8_000_000
"""Figures that a run records at most, about 64 MB of `stats.jsonl`: a thousand layers are sampled more rarely."""

MIN_SAMPLES = 50
"""Sampled steps of a run that states no cadence, if it has so many steps."""
MAX_EVERY = 50
"""Steps between the samples of a run that states no cadence, at most."""

_TAPPED = frozenset({"activations", "activation_gradients"})


class Look:
    """A step that nobody watches: every phase is a no-op. The base of the sampled step's look."""

    def __enter__(self) -> Look:
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes the taps, whatever happened."""

    def forward_done(self) -> None:
        """The first micro-batch went forward and backward."""

    def restart(self) -> None:
        """What went forward so far does not count: it begins again."""

    def gradients(self, count: int, scale: Tensor | float = 1.0) -> None:
        """The gradients of a batch of `count` samples are complete: accumulated, unscaled, reduced over ranks,
        not clipped. What was propagated through the activations is `scale` times as large."""

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
        self._taps = observer.taps if self._needs & _TAPPED else None
        self._view = View(step, 0, observer.model, observer.tensors, observer.parameters)
        self._figures: dict[str, Tensor] = {}
        self._aside = observer.aside

    def __enter__(self) -> Look:
        self.restart()
        return self

    def __exit__(self, *exception: object) -> None:
        self.forward_done()
        if exception[0] is None:
            with self._aside():
                self._observer.publish(self._view.step, self._figures)

    def restart(self) -> None:
        if self._taps is not None:
            with self._aside():
                self._taps.start()

    def forward_done(self) -> None:
        if self._taps is not None:
            with self._aside():
                self._taps.stop()

    @torch.no_grad()
    def gradients(self, count: int, scale: Tensor | float = 1.0) -> None:
        self._view.count = count
        self.forward_done()
        if self._taps is not None:  # the loss is the mean over the batch, so a sample's gradient is `count` times it
            with self._aside():
                self._view.activity = self._taps.read(count / scale)
        self._read(updates=False)

    def before_update(self) -> None:
        if "updates" in self._needs:
            with self._aside(self._observer.elements):
                self._view.previous = [p.detach().clone() for p in self._observer.parameters]

    @torch.no_grad()
    def updated(self) -> None:
        self._read(updates=True)

    def _read(self, *, updates: bool) -> None:
        with self._aside(self._observer.elements):
            for probe in self._due:
                if ("updates" in probe.needs) is updates:
                    self._figures |= probe.read(self._view)


class Observer:
    """Watches a network on the steps that are due: the first update, and each whose number (from 1) is a multiple of
    the cadence, as those of the training records are.

    `receive` is told each record, `{"step", "layers", "tensors", tag: figures}`, a step late: as soon as the copy
    from the device has arrived.

    Args:
        every: steps between the readings of a probe that states no cadence of its own; `None` takes as many as give
            `MIN_SAMPLES` samples, and `MAX_EVERY` at most.
        total_steps: of the run.
        max_records: sampled steps at most, of the run and of each time that it is prolonged. All cadences are
            stretched by one whole factor when they would exceed this, or `MAX_FIGURES`.
        max_overhead: share of the run's time that the samples may cost; see `Overhead`.
    """

    def __init__(
        self,
        model: nn.Module,
        probes: Sequence[Probe],
        taps: Taps | None,
        *,
        every: int | None,
        total_steps: int,
        max_records: int,
        max_overhead: float | None = None,
        device: torch.device | None = None,
        receive: Callable[[dict[str, Any]], None] | None = None,
    ):
        self.model = model
        self.taps = taps
        self.receive = receive
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.tensors = tuple(name for name, _ in trained)
        self.parameters = [p for _, p in trained]
        self.elements = sum(p.numel() for p in self.parameters)
        self._stated = every is not None
        every = every or max(1, min(MAX_EVERY, total_steps // MIN_SAMPLES))
        self.probes = [(probe, probe.every or every) for probe in probes]
        self.stretch = 1
        device = device or torch.device("cpu")
        self.aside = Aside(device) if taps is None else taps.aside
        self.overhead = Overhead(max_overhead, mark_for(device))
        self._total_steps = total_steps
        self._max_records = max_records
        self._records = 0
        self._figures = 0
        self._pending: tuple[int, dict[str, torch.Size], Arriving] | None = None
        self._keep_to_bounds(0, 0)

    def drop_unsupported(self, run: Any) -> list[str]:
        """Asks each probe whether it can measure this run; leaves out those that cannot, and says why."""
        reasons = [(probe, probe.supports(run)) for probe, _ in self.probes]
        dropped = {id(probe) for probe, reason in reasons if reason is not None}
        self.probes = [pair for pair in self.probes if id(pair[0]) not in dropped]
        return [f"{probe.name} is not measured: {reason}" for probe, reason in reasons if reason is not None]

    def __call__(self, step: int) -> Look:
        """The look at the update that follows `step` ones: idle unless a probe is due."""
        number = step + 1
        if self.overhead.end():
            self.overhead.decide(
                self._total_steps,
                self._records,
                whole=lambda factor: self._coming(0, self.stretch * factor),
                coming=lambda factor: self._coming(step, self.stretch * factor),
            )
        due = [probe for probe, every in self.probes if number == 1 or number % (every * self.cadence) == 0]
        if number > 1 and not self._stated and not self.overhead.may_begin():
            due = []
        if due or self._arrived():
            self.drain()
        self.overhead.begin(bool(due))
        return _SampledLook(self, number, due) if due else IDLE

    @property
    def cadence(self) -> int:
        """Factor of all probes' cadences: what keeps the records bounded, times what keeps them cheap."""
        return self.stretch * self.overhead.slowdown

    def pause(self) -> None:
        """Something other than an update comes next."""
        self.overhead.pause()

    def describe(self) -> dict[str, Any]:
        """What was taken and what it cost: `samples`, `seconds`, `every` (steps), `overhead` (share of the time),
        `sample_in_steps` (a sample's cost as a multiple of a step); `None` for what is not known."""
        step, spent = self.overhead.step_seconds, self.overhead.spent(self._records)
        if spent is None and self._records:  # nothing to compare with: what the host's clock says of it
            spent = self.aside.seconds + self.overhead.charged
        ratio = None if not step or spent is None or not self._records else spent / self._records / step
        every = min((every for _, every in self.probes), default=None)
        return {
            "samples": self._records,
            "seconds": None if spent is None else round(spent, 3),
            "every": None if every is None else every * self.cadence,
            "overhead": None if ratio is None or every is None else round(ratio / (every * self.cadence), 5),
            "sample_in_steps": None if ratio is None else round(ratio, 3),
        }

    def publish(self, step: int, figures: Mapping[str, Tensor]) -> None:
        """Starts one copy of all figures to the host."""
        if not figures:
            return
        self.drain()
        shapes = {tag: tensor.shape for tag, tensor in figures.items()}
        packed = torch.cat([tensor.detach().float().flatten() for tensor in figures.values()])
        self._records += 1
        self._figures += packed.numel()
        self._keep_to_bounds(step, packed.numel())
        self._pending = (step, shapes, Arriving({"figures": packed}))

    def _arrived(self) -> bool:
        """Whether figures are there that can be handed over without waiting."""
        return self._pending is not None and self._pending[2].ready()

    def drain(self) -> None:
        """Hands over the figures of the last sampled step, waiting for their copy if it is still under way."""
        if self._pending is None:
            return
        step, shapes, figures = self._pending
        self._pending = None
        if self.receive is None:
            return
        packed = figures.wait()["figures"]
        with self.overhead.charging():
            self.receive(self._record(step, shapes, packed))

    def _record(self, step: int, shapes: Mapping[str, torch.Size], packed: Tensor) -> dict[str, Any]:
        record: dict[str, Any] = {"step": step}
        if self.taps is not None:
            record["layers"] = list(self.taps.names)
        record["tensors"] = list(self.tensors)
        parts = packed.split([shape.numel() for shape in shapes.values()])
        for (tag, shape), part in zip(shapes.items(), parts, strict=True):
            record[tag] = part.view(shape).tolist()
        return record

    def _keep_to_bounds(self, step: int, size: int) -> None:
        """Stretches the cadences until the records after update `step`, of `size` figures each, fit."""
        left = self._max_records - self._records
        if size:
            left = min(left, (MAX_FIGURES - self._figures) // size)
        if left <= 0:
            self.stretch = self._total_steps + 1
        distinct = self._distinct()
        if distinct and left > 0:  # no smaller factor can do, so the search begins there
            self.stretch = max(self.stretch, (self._total_steps - step) // ((left + 1) * min(distinct)))
        while left > 0 and self._coming(step, self.cadence) > left:
            self.stretch += 1

    def _distinct(self) -> list[int]:
        """The cadences that are no multiple of another one."""
        cadences = {every for _, every in self.probes}
        return [every for every in cadences if not any(every % c == 0 for c in cadences - {every})]

    def _coming(self, step: int, factor: int) -> int:
        """Samples after update `step` when all cadences are `factor` times as long."""
        distinct = self._distinct()
        first = step == 0 and bool(distinct) and 1 not in [c * factor for c in distinct]
        return first + sum(self._total_steps // (c * factor) - step // (c * factor) for c in distinct)

    def state_dict(self) -> dict[str, Any]:
        counts = {"records": self._records, "figures": self._figures, "total_steps": self._total_steps}
        return {"stretch": self.stretch, **counts, "overhead": self.overhead.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with the cadences of the run that is resumed."""
        for name in ("stretch", "records", "figures"):
            if state[name] < (name == "stretch"):
                raise ValueError(f"expected {name} of {int(name == 'stretch')} or more, received {state[name]}")
        self.stretch = state["stretch"]
        self.overhead.load_state_dict(state["overhead"])
        if state["total_steps"] == self._total_steps:
            self._records, self._figures = state["records"], state["figures"]
