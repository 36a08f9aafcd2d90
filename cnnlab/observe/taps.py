"""Taps: where activations and their gradients are read, in the network before it is compiled.

A tap is a forward hook on a layer. It writes the moments of a few samples' activations into a bank of device
tensors, and passes the activations on through an identity whose backward returns the moments of the gradient as
the gradient of a dummy slot: no `.item()`, no side effect in the backward, hence no graph break and no
synchronization. Nothing is renamed, no parameter is added, and the numbers of the run stay what they were.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

COLUMNS = ("mean", "std", "zeros", "saturated", "pre_std")
"""What a tap reads of the activations, one row a layer: mean, standard deviation, share of exact zeros, share
within 1.5 % of the activation's own bounds (tanh: |y| > .97), and the standard deviation of the layer's input to
the activation (the pre-activation z)."""

DEAD_AFTER = 4
"""Sampled steps in a row without any activity before a channel counts as dead."""

_ACTIVATIONS = tuple(
    getattr(nn, name)
    for name in (
        "ReLU ReLU6 LeakyReLU PReLU RReLU ELU CELU SELU GELU SiLU Mish Sigmoid LogSigmoid Tanh Softplus Softsign "
        "Hardswish Hardsigmoid Hardtanh Hardshrink Softshrink Tanhshrink Threshold"
    ).split()
)
_LINEAR = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)


class _GradientTap(torch.autograd.Function):
    """Identity; the gradient of `slot` is (Σg, Σg², count) over the first `samples` samples' gradient g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Tensor, samples: int) -> Tensor:
        ctx.samples = samples
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        part = gradient[: ctx.samples].float()
        count = torch.full((), float(part.numel()), device=part.device)
        return gradient, torch.stack([part.sum(), part.square().sum(), count]), None


def bounds_of(module: nn.Module) -> tuple[float, float] | None:
    """The activation's own range where it has both bounds (tanh: (-1, 1)), found by asking it; else `None`."""
    with torch.no_grad():
        try:
            device = next((p.device for p in module.parameters()), torch.device("cpu"))
            far = torch.tensor([-1e4, 1e4, -1e5, 1e5], device=device)
            low, high, lower, higher = module(far).tolist()
        except (RuntimeError, ValueError, TypeError, IndexError):
            return None
    bounded = low < high and abs(low - lower) < 1e-3 and abs(high - higher) < 1e-3
    return (low, high) if bounded else None


def tapped_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers worth watching, in the order of registration: the activations; where a network has fewer than
    two activation modules (it calls functions instead), its convolutions and linear layers."""
    leaves = [(name, m) for name, m in model.named_modules() if not any(m.children()) and name]
    activations = [(name, m) for name, m in leaves if isinstance(m, _ACTIVATIONS)]
    marked = [(name, m) for name, m in leaves if getattr(m, "is_activation", False)]
    found = activations + [pair for pair in marked if pair not in activations]
    return found if len(found) >= 2 else [(name, m) for name, m in leaves if isinstance(m, _LINEAR)]


class Taps:
    """The taps of one network and the bank they write to.

    `always` keeps them open on every step, as a compiled or captured program needs; otherwise `open` says, step
    by step, whether they read, and a closed tap costs one Python call.
    """

    def __init__(self, model: nn.Module, samples: int, device: torch.device, *, gradients: bool, always: bool):
        self.always = always
        self.open = always
        self.samples = samples
        layers = tapped_layers(model)
        self.names = tuple(name for name, _ in layers)
        self.values = torch.zeros(len(layers), len(COLUMNS), device=device)
        self.slots = [torch.zeros(3, device=device, requires_grad=True) for _ in layers] if gradients else []
        self.active: list[Tensor | None] = [None] * len(layers)
        self._idle: list[Tensor | None] = [None] * len(layers)
        self._device = device
        self._handles = [
            module.register_forward_hook(_Tap(self, row, bounds_of(module)))
            for row, (_, module) in enumerate(layers)
        ]

    def __len__(self) -> int:
        return len(self.names)

    def start(self) -> None:
        """Before the forward of a sampled step."""
        self.open = True
        for slot in self.slots:
            slot.grad = None

    def stop(self) -> None:
        self.open = self.always

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def gradient_std(self) -> Tensor:
        """Standard deviation of the activation gradients since `start`: (layers,), NaN where none arrived."""
        nothing = torch.full((3,), float("nan"), device=self._device)
        rows = torch.stack([s.grad if s.grad is not None else nothing for s in self.slots])
        total, squares, count = rows.unbind(1)
        return (squares / count - (total / count).square()).clamp_min(0).sqrt()

    def dead(self) -> Tensor:
        """Share of channels without activity in the last `DEAD_AFTER` sampled steps: (layers,). Call it once a
        sampled step: it moves the count on."""
        shares = []
        for row, active in enumerate(self.active):
            if active is None:
                shares.append(torch.full((), float("nan"), device=self._device))
                continue
            idle = self._idle[row]
            if idle is None or idle.shape != active.shape:
                idle = torch.zeros_like(active, dtype=torch.int32)
            idle = torch.where(active, torch.zeros_like(idle), idle + 1)
            self._idle[row] = idle
            shares.append((idle >= DEAD_AFTER).float().mean())
        return torch.stack(shares)

    def state_dict(self) -> dict[str, Any]:
        return {"idle": [None if idle is None else idle.cpu() for idle in self._idle]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._idle = [None if idle is None else idle.to(self._device) for idle in state["idle"]]


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
        with torch.no_grad():
            taps.values[self.row].copy_(self._moments(inputs[0][: taps.samples], output[: taps.samples]))
        if taps.slots and output.requires_grad:
            return _GradientTap.apply(output, taps.slots[self.row], taps.samples)
        return None

    def _moments(self, before: Tensor, after: Tensor) -> Tensor:
        before, after = before.detach().float(), after.detach().float()
        std, mean = torch.std_mean(after, correction=0)
        silent = after == 0
        self.taps.active[self.row] = ~silent.transpose(0, 1).flatten(1).all(dim=1)
        if self.bounds is None:
            saturated = torch.full_like(mean, float("nan"))
        else:
            low, high = self.bounds
            margin = 0.015 * (high - low)
            saturated = ((after < low + margin) | (after > high - margin)).float().mean()
        return torch.stack([mean, std, silent.float().mean(), saturated, before.std(correction=0)])
