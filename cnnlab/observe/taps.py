"""Taps: where activations and their gradients are read, in the network before it is compiled.

A tap is a forward hook on a layer. It writes the moments of a few samples' activations into a bank of device
tensors, and passes the activations on through an identity whose backward returns the moments of the gradient as
the gradient of a dummy slot: no `.item()`, no side effect in the backward, hence no graph break and no
synchronization. Nothing is renamed, no parameter is added, and the numbers of the run stay what they were.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cnnlab.machine.ranks import Ranks
from cnnlab.measure import merge_moments
from cnnlab.observe.overhead import Aside

DEAD_AFTER = 4
"""Sampled steps in a row without any activity before a channel counts as dead."""

_COLUMNS = 7  # of the bank: count, mean, std, zeros, saturated, and mean and std of the pre-activation

_ACTIVATIONS = tuple(
    getattr(nn, name)
    for name in (
        "ReLU ReLU6 LeakyReLU PReLU RReLU ELU CELU SELU GELU SiLU Mish Sigmoid LogSigmoid Tanh Softplus Softsign "
        "Hardswish Hardsigmoid Hardtanh Hardshrink Softshrink Tanhshrink Threshold"
    ).split()
)
_NOT_NEGATIVE = (nn.ReLU, nn.ReLU6)
_LINEAR = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)


@dataclass(frozen=True)
class Activity:
    """What the taps saw of a few samples of a step: (layers,) each, NaN for a layer that did not run."""

    mean: Tensor
    std: Tensor
    zeros: Tensor
    """Share of exact zeros."""
    saturated: Tensor
    """Share within 1.5 % of the activation's own bounds (tanh: |y| > .97); NaN where it has none."""
    pre_std: Tensor
    """Standard deviation of the layer's input (of the pre-activation z, where the layer is an activation); NaN for
    a layer that works in place."""
    dead: Tensor
    """Share of channels without any activity on all samples of the (first) micro-batch in the last `DEAD_AFTER` sampled
    steps."""
    gradient_std: Tensor
    """Standard deviation of the gradient of a sample's loss; NaN where it was not asked for."""


class _GradientTap(torch.autograd.Function):
    """Identity; the gradient of `slot` is (Σg, Σg², count) over the first `samples` samples' gradient g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Tensor, samples: int, aside: Aside | None) -> Tensor:
        ctx.samples, ctx.dtype, ctx.aside = samples, slot.dtype, aside
        return x.detach()  # not a view for autograd: foreign networks go on in place (Dropout(inplace=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = gradients
        part = gradient[: ctx.samples]
        if ctx.aside is None:
            return gradient, _sums(part, ctx.dtype), None, None
        with ctx.aside(part.numel()):
            return gradient, _sums(part, ctx.dtype), None, None


def _sums(part: Tensor, dtype: torch.dtype) -> Tensor:
    """(Σg, Σg², count) of a gradient."""
    part = part.to(dtype)
    count = torch.full((), float(part.numel()), dtype=dtype, device=part.device)
    return torch.stack([part.sum(), torch.linalg.vector_norm(part).square(), count])


def bounds_of(module: nn.Module) -> tuple[float, float] | None:
    """The values that the activation saturates at, found by asking it (tanh: (-1, 1)); `None` without two bounds.

    A lower bound of 0 that it reaches exactly (ReLU6) is inactivity, not saturation, and given as -inf.
    """
    with torch.no_grad():
        try:
            device = next((p.device for p in module.parameters()), torch.device("cpu"))
            asked = torch.tensor([-1e4, 1e4, -1e5, 1e5, -10.0], device=device)
            low, high, lower, higher, off = module(asked).tolist()
        except (RuntimeError, ValueError, TypeError, IndexError):
            return None
    if not (low < high and abs(low - lower) < 1e-3 and abs(high - higher) < 1e-3):
        return None
    return (-math.inf if low == 0 == off else low, high)


def tapped_layers(model: nn.Module, only: Collection[str] | None = None) -> list[tuple[str, nn.Module]]:
    """The layers worth watching, in the order of registration: the activations; where a network has fewer than
    two activation modules (it calls functions instead), its convolutions and linear layers.

    Args:
        only: names of the modules that run; `None` for all.
    """
    named = [(name, module) for name, module in model.named_modules() if only is None or name in only]
    leaves = [(name, m) for name, m in named if not any(m.children()) and name]
    found = [(name, m) for name, m in leaves if isinstance(m, _ACTIVATIONS) or getattr(m, "is_activation", False)]
    return found if len(found) >= 2 else [(name, m) for name, m in leaves if isinstance(m, _LINEAR)]


class Taps:
    """The taps of one network and the bank they write to.

    Args:
        samples: of the whole batch that are looked at; each of `ranks` looks at its part of them.
        gradients: whether activation gradients are asked for.
        always: keeps the taps open on every step, as a compiled or captured program needs; otherwise they read
            between `start` and `stop` only, and a closed tap costs one Python call.
        only: names of the modules that run in training, where not all of them do.

    Of several micro-batches the first is looked at, the last where a CUDA graph runs them all. A layer that is used
    several times in a forward pass reports its last use (its gradient: all uses).
    """

    def __init__(
        self,
        model: nn.Module,
        samples: int,
        device: torch.device,
        *,
        gradients: bool,
        always: bool,
        ranks: Ranks | None = None,
        only: Collection[str] | None = None,
    ):
        self.ranks = ranks or Ranks()
        self.always = always
        self.open = always
        self.aside = Aside(device)
        # Rank r has the samples r, r + world, ... of the batch.
        self.samples = len(range(self.ranks.rank, samples, self.ranks.world))
        layers = tapped_layers(model, only)
        self.names = tuple(name for name, _ in layers)
        self.bank = torch.zeros(len(layers), _COLUMNS, device=device)
        self.active: list[Tensor | None] = [None] * len(layers)
        """Of each channel 1 where any sample of the micro-batch has an activation that is not zero, else 0."""
        self._idle: list[Tensor | None] = [None] * len(layers)
        self._seen: tuple[Tensor, Tensor, list[Tensor | None]] | None = None
        # Squares of vanishing gradients underflow in float32 from 1e-19 on.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._gradients = torch.zeros(len(layers), 3, dtype=dtype, device=device)
        self.slots: list[Tensor] = []
        for row in self._gradients if gradients else []:
            slot = torch.zeros(3, dtype=dtype, device=device, requires_grad=True)
            slot.grad = row  # the backward pass adds to the bank, in place: a CUDA graph needs one address
            self.slots.append(slot)
        self._handles = [
            module.register_forward_hook(_Tap(self, row, bounds_of(module))) for row, (_, module) in enumerate(layers)
        ]

    def __len__(self) -> int:
        return len(self.names)

    def keep_open(self, always: bool) -> None:
        """Whether the taps stay open on every step; see `always`."""
        self.always = self.open = always

    def start(self) -> None:
        """Before the forward of a sampled step."""
        self.open = True
        self._seen = None
        self.bank.zero_()
        self._gradients.zero_()
        for active in self.active:
            if active is not None:
                active.zero_()

    def stop(self) -> None:
        """After the first micro-batch. What taps that stay open see from here on is left alone."""
        self.open = self.always
        if self._seen is None:
            active = [None if counts is None else counts.clone() for counts in self.active]
            self._seen = self.bank.clone(), self._gradients.clone(), active

    def remove(self) -> None:
        """Takes the taps out of the network."""
        for handle in self._handles:
            handle.remove()

    def read(self, scale: Tensor | float = 1.0) -> Activity:
        """What was seen between `start` and `stop`, by all ranks. Once a sampled step: it counts idle channels.

        Args:
            scale: factor from the gradient that was propagated to that of a sample's loss.
        """
        assert self._seen is not None, "read follows stop"
        own, gradients, active = self._seen
        bank = self.ranks.stack(own)
        count = bank[..., 0]
        mean, std = merge_moments(count, bank[..., 1], bank[..., 2])
        _, pre_std = merge_moments(count, bank[..., 5], bank[..., 6])
        shares = torch.where(count[..., None] > 0, bank[..., 3:5], 0.0)
        zeros, saturated = ((count[..., None] * shares).sum(0) / count.sum(0)[:, None]).unbind(1)
        sums = self.ranks.stack(gradients).sum(0)
        average, square = sums[:, 0] / sums[:, 2], sums[:, 1] / sums[:, 2]
        gradient_std = (square - average.square()).clamp_min(0).sqrt() * scale
        return Activity(mean, std, zeros, saturated, pre_std, self._dead(active), gradient_std)

    def _dead(self, active: list[Tensor | None]) -> Tensor:
        nothing = torch.full((), float("nan"), device=self.bank.device)
        known = [
            torch.zeros_like(idle) if counts is None and idle is not None else counts
            for counts, idle in zip(active, self._idle, strict=True)
        ]
        self.ranks.sum_([counts for counts in known if counts is not None])
        shares = []
        for row, counts in enumerate(known):
            if counts is None:
                shares.append(nothing)
                continue
            idle = self._idle[row]
            if idle is None or idle.shape != counts.shape:
                idle = torch.zeros_like(counts)
            idle = torch.where(counts > 0, 0, idle + 1)
            self._idle[row] = idle
            shares.append((idle >= DEAD_AFTER).float().mean())
        return torch.stack(shares)

    def state_dict(self) -> dict[str, Any]:
        return {"idle": [None if idle is None else idle.cpu() for idle in self._idle]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["idle"]) != len(self._idle):
            raise ValueError(f"expected {len(self._idle)} tapped layers, received {len(state['idle'])}")
        for name, idle in zip(self.names, state["idle"], strict=True):
            if idle is not None and (idle.ndim != 1 or idle.dtype != torch.float32 or not bool((idle >= 0).all())):
                raise ValueError(f"expected of {name} a count of each channel, in float32")
        self._idle = [None if idle is None else idle.to(self.bank.device) for idle in state["idle"]]


class _Tap:
    """The hook of one layer."""

    def __init__(self, taps: Taps, row: int, bounds: tuple[float, float] | None):
        self.taps = taps
        self.row = row
        self.bounds = bounds

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        taps = self.taps
        if not (taps.open and module.training):
            return None
        before = None if getattr(module, "inplace", False) or not inputs else inputs[0]
        aside = None if torch.compiler.is_compiling() else taps.aside  # the compiler makes one loop of it all
        if aside is None:
            self._look(module, before, output)
        else:
            with aside(output.numel()):
                self._look(module, before, output)
        if taps.slots and output.requires_grad:
            return _GradientTap.apply(output, taps.slots[self.row], taps.samples, aside)
        return None

    @torch.no_grad()
    def _look(self, module: nn.Module, before: Tensor | None, output: Tensor) -> None:
        self._note_activity(output if isinstance(module, _NOT_NEGATIVE) else output.abs())
        self.taps.bank[self.row].copy_(self._moments(before, output[: self.taps.samples].float()))

    def _note_activity(self, size: Tensor) -> None:
        """Which channels are active, of all samples: a sum of numbers that are not negative is 0 only if each is. On a
        CPU it takes a twentieth of the time of a maximum."""
        channel = size.ndim - 1 if size.ndim == 3 else 1  # (N, C, ...), or tokens (N, T, C)
        active = (size.sum([d for d in range(size.ndim) if d != channel]) != 0).float()
        known = None if torch.compiler.is_compiling() else self.taps.active[self.row]
        if known is None or known.shape != active.shape:
            self.taps.active[self.row] = active
        else:  # a CUDA graph goes on writing to the tensor that it found, also after an uneven batch without it
            known.copy_(active)

    def _moments(self, before: Tensor | None, after: Tensor) -> Tensor:
        """One row of the bank."""
        count = torch.full((), float(after.numel()), device=after.device)
        unknown = torch.full_like(count, float("nan"))
        saturated, pre = unknown, (unknown, unknown)
        if self.bounds is not None:
            low, high = self.bounds
            margin = 0.015 * (high - low if math.isfinite(low) else high)
            saturated = ((after < low + margin) | (after > high - margin)).float().mean()
        if before is not None:
            pre = _moments(before[: self.taps.samples].float())
        mean, std = _moments(after)
        zeros = torch.where(
            mean.isnan(), unknown, 1 - after.sign().abs().sum() / count
        )  # six times as fast as counting
        return torch.stack([count, mean, std, zeros, saturated, *pre])


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, in two passes: 20 times faster on the CPU than `std_mean`, and as exact."""
    mean = x.mean()
    return mean, torch.linalg.vector_norm(x - mean) / math.sqrt(x.numel())
