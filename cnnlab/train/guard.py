"""Keeps an update whose loss or gradient is not finite out of the weights, without waiting for the device."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cnnlab import measure
from cnnlab.protocols import StepResult
from cnnlab.torch_private import BufferSlots, foreach_copy_, foreach_norm, found_overflows, skips_by_itself
from cnnlab.train.state import Arriving

LAG = 4
"""Updates after which the host reads what a device has found; always as many, so that all ranks learn it at the same
step, and a run is the same twice."""


@dataclass(frozen=True)
class Seen:
    """What update `number` (from 0) was made of: the mean loss of the whole batch, and the norm of its gradient (NaN
    where there was none to look at). `bad`: it was left out."""

    number: int
    bad: bool
    loss: float
    norm: float


class NotFinite(Exception):
    """Ends an optimizer's own evaluations of the loss before it has changed anything."""


class Unguarded:
    """Lets every update happen; the base of `Guard`."""

    bad = False

    prompt = True

    def resume(self, left_out: int) -> None:
        """Goes on after as many bad updates."""

    def before(self, model: nn.Module) -> None:
        """An update begins; the buffers are kept as they are."""

    def loss_of(self, result: StepResult, count: int) -> Tensor:
        """This rank's part of the loss that `judge` looks at, to be summed over the ranks."""
        return torch.zeros((), device=result.sample_loss.device)

    def judge(self, loss: Tensor, gradients: Sequence[Tensor] | None, optimizer: Any, scaler: Any = None) -> None:
        """Loss and gradients of all ranks are known (`None`: the optimizer makes its own)."""

    def update(self, apply: Callable[[], None], leave: Callable[[], None], optimizer: Any, scaler: Any = None) -> None:
        """Makes the update (`apply`), unless it is bad (`leave`)."""
        apply()

    def searching(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> Any:
        """The block is the step of an optimizer that evaluates the loss itself."""
        return _nothing()

    def kept(self, number: int, result: StepResult) -> StepResult:
        """Update `number` is over: its result as records and listeners take it."""
        return result

    def seen(self, *, last: bool) -> Iterator[Seen]:
        """What the host has learned meanwhile, in the order of the updates.

        Args:
            last: waits for that of the last update, too.
        """
        yield from ()


UNGUARDED = Unguarded()


class Guard(Unguarded):
    """An update whose loss or gradient is not finite changes neither weights nor buffers nor the optimizer.

    Where reading the device costs nothing (a CPU), the host decides. Elsewhere the device does: torch's fused
    optimizers take `found_inf`, as loss scaling hands it to them; of any other one weights and state are put back by
    `torch.where` (a state's count that is a Python number goes on counting). Under loss scaling an overflow is the
    scaler's affair as long as its scale is above 1.

    Args:
        allowed: bad updates that may be left out; from the next one on the weights stand still, so that the host finds
            them as they were.
        prompt: whether the host reads at once; `None`: on a CPU.
    """

    def __init__(self, device: torch.device, *, allowed: int = 0, prompt: bool | None = None):
        self.allowed = allowed
        self.prompt = device.type == "cpu" if prompt is None else prompt
        self._left_out = 0
        self._count, self._bad = torch.zeros((), device=device), torch.zeros((), device=device)
        self._figures: tuple[float, float] = (math.nan, math.nan)
        self._row = torch.zeros(2, device=device)
        self._slots: BufferSlots | None = None
        self._buffers: list[Tensor] = []
        self._saved: list[Tensor] = []
        self._before: _Snapshot | None = None
        self._trained = -1
        # Bounded, for who makes updates and reads nothing.
        self._coming: deque[tuple[int, Arriving]] = deque(maxlen=16 * LAG)
        self._here: deque[Seen] = deque(maxlen=16 * LAG)

    def resume(self, left_out: int) -> None:
        self._left_out = left_out
        self._count.fill_(left_out)

    def before(self, model: nn.Module) -> None:
        if self._slots is None or self._slots.model is not model:
            self._slots = BufferSlots(model)
        buffers = self._slots.tensors()
        if not self.prompt:
            self._before = _Snapshot(buffers)
        elif len(buffers) != len(self._buffers) or any(a is not b for a, b in zip(buffers, self._buffers)):
            self._buffers, self._saved = buffers, [buffer.detach().clone() for buffer in buffers]
        elif buffers:
            foreach_copy_(self._saved, buffers)

    def loss_of(self, result: StepResult, count: int) -> Tensor:
        terms = [result.sums[name] for name in ("data_loss", "penalty") if name in result.sums]
        return sum(terms[1:], terms[0]) / count if terms else super().loss_of(result, count)

    # ---- judging ----

    @torch.no_grad()
    def judge(self, loss: Tensor, gradients: Sequence[Tensor] | None, optimizer: Any, scaler: Any = None) -> None:
        if self.prompt:
            self._judge_here(float(loss), gradients, scaler)
            return
        norm = _largest(gradients) if gradients else torch.zeros_like(loss)
        overflow = ~norm.isfinite()
        if scaler is not None:
            overflow = overflow & (scaler._scale <= 1)
        bad = overflow | ~loss.isfinite()
        self._count += bad
        self._bad.copy_(bad | (self._count > self.allowed))
        self._row = torch.stack([loss.float(), norm.float()])
        for found in () if scaler is None else found_overflows(scaler, optimizer):
            found.copy_(torch.maximum(found, self._bad.to(found)))

    def _judge_here(self, loss: float, gradients: Sequence[Tensor] | None, scaler: Any) -> None:
        norm = math.nan
        if gradients is not None:
            norm = float(measure.total_norm(gradients)) if gradients else 0.0
            if not math.isfinite(norm):  # or the squares overflowed, and the gradients did not
                norm = float(_largest(gradients))
        overflow = gradients is not None and not math.isfinite(norm)
        if overflow and scaler is not None and scaler.get_scale() > 1:
            overflow = False
        self._decide(loss, norm, bad=overflow or not math.isfinite(loss))

    def _decide(self, loss: float, norm: float, *, bad: bool) -> None:
        self._left_out += bad
        self.bad = bad or self._left_out > self.allowed
        self._figures = (loss, norm)

    # ---- the update ----

    def update(self, apply: Callable[[], None], leave: Callable[[], None], optimizer: Any, scaler: Any = None) -> None:
        if self.prompt:
            if not self.bad:
                apply()
                return
            leave()
            self._put_back()
            return
        if scaler is not None:  # it has been told, and leaves the update out by itself
            apply()
        else:
            self._on_device(apply, leave, optimizer)
        assert self._before is not None, "`before` comes first"
        self._before.put_back(self._bad)

    def _on_device(self, apply: Callable[[], None], leave: Callable[[], None], optimizer: Any) -> None:
        weights = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if len(weights) != self._trained:  # the optimizer makes its state now, and must not make it of a bad gradient
            self._trained = len(weights)
            if bool(self._bad):
                leave()
                self._trained = -1
            else:
                apply()
        elif skips_by_itself(optimizer):
            optimizer.grad_scale, optimizer.found_inf = None, self._bad
            try:
                apply()
            finally:
                del optimizer.grad_scale, optimizer.found_inf
        else:
            held = _Snapshot([*weights, *_tensors(optimizer.state)])
            apply()
            held.put_back(self._bad)

    @contextmanager
    def searching(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> Iterator[None]:
        """The state of an optimizer that has come to weights which are not finite is forgotten: its curvature is of
        losses that are none."""
        before = [p.detach().clone() for p in parameters]
        try:
            yield
            if math.isfinite(float(measure.total_norm(parameters))):
                return
            self._decide(*self._figures, bad=True)
            optimizer.state.clear()
            with torch.no_grad():
                foreach_copy_([p.detach() for p in parameters], before)
        except NotFinite:
            pass
        self._put_back()

    def _put_back(self) -> None:
        if self._buffers:
            foreach_copy_(self._buffers, self._saved)

    # ---- what is told ----

    def kept(self, number: int, result: StepResult) -> StepResult:
        if self.prompt:
            self._here.append(Seen(number, self.bad, *self._figures))
            return _without(result, None) if self.bad and self.allowed else result
        self._coming.append((number, Arriving({"row": torch.cat([self._bad[None], self._row])})))
        return _without(result, self._bad > 0) if self.allowed else result

    def seen(self, *, last: bool) -> Iterator[Seen]:
        while self._coming and (last or len(self._coming) > LAG):
            number, row = self._coming.popleft()
            bad, loss, norm = row.wait()["row"].tolist()
            self._here.append(Seen(number, bad > 0, loss, norm))
        while self._here:
            yield self._here.popleft()


class _Snapshot:
    """The values of tensors as they are now, one flat copy a type and device: few kernels, however many tensors."""

    def __init__(self, tensors: Sequence[Tensor]):
        groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            groups.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
        self._parts = [(group, self._flat(group)) for group in groups.values()]

    @staticmethod
    def _flat(group: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensor.reshape(-1) for tensor in group])

    @torch.no_grad()
    def put_back(self, bad: Tensor) -> None:
        """Where `bad`, a scalar, is above 0."""
        for group, before in self._parts:
            chosen = torch.where((bad > 0).to(before.device), before, self._flat(group))
            parts = chosen.split([tensor.numel() for tensor in group])
            foreach_copy_(group, [part.view(tensor.shape) for part, tensor in zip(parts, group, strict=True)])


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _largest(gradients: Sequence[Tensor]) -> Tensor:
    """The largest magnitude, NaN if one is; a norm that overflows no earlier than the gradients do."""
    return torch.stack(foreach_norm([g.detach().float() for g in gradients], math.inf)).max()


def _without(result: StepResult, bad: Tensor | None) -> StepResult:
    """The result with sums of nothing where it is bad (`None`: it is)."""
    nothing = {
        name: torch.zeros_like(value) if bad is None else torch.where(bad, torch.zeros_like(value), value)
        for name, value in result.sums.items()
    }
    return StepResult(nothing, result.sample_loss, result.index)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those in nested dicts and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
