"""The roofline (Williams et al. 2009): no layer is faster than its arithmetic, nor than its memory traffic.

Each layer takes at least max(FLOP / matmul rate, bytes / copy rate), with both rates measured on this machine; the sum
over the layers is the time that a training step cannot beat without fusing layers into one another. Small networks
are bound by the traffic, so their share of the peak FLOP rate says nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from cnnlab.inspect.summary import Layer

FLOP_PER_MULTIPLY_ADD = 2
PASSES = 3
"""Forward, and backward with respect to the input and to the weight, each as many multiply-adds."""
MASTER_BYTES = 4
"""Weights, gradients and the optimizer's state stay in float32 in mixed precision."""
REPEATS = 5


@dataclass(frozen=True)
class MachineRates:
    """What the machine reaches: matrix products in FLOP/s, copies in bytes/s (read and written)."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class LayerTime:
    """A layer's least time in one training step of the whole batch."""

    name: str
    type: str
    flops: float
    bytes: float
    seconds: float
    bound: str
    """`compute` or `memory`: which of the two limits it."""


def layer_flops(layer: Layer, batch: int) -> float:
    """FLOP of one training step."""
    return PASSES * FLOP_PER_MULTIPLY_ADD * layer.multiply_adds * batch


def layer_bytes(layer: Layer, batch: int, element_bytes: int) -> float:
    """Bytes that one training step must read and write, if nothing stays in a cache.

    Of a layer with inputs I and outputs O: forward reads I and writes O; backward reads the gradient of O and the
    kept I, and writes the gradient of I: 3 I + 2 O. A weight is read twice in the compute precision, and its gradient
    written once.
    """
    activations = (3 * layer.reads + 2 * layer.writes) * batch * element_bytes
    return activations + layer.parameters * (2 * element_bytes + MASTER_BYTES)


def update_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of one update: weights and the optimizer's state are read and written, gradients read."""
    weights = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    state = [t for held in optimizer.state.values() for t in held.values() if isinstance(t, torch.Tensor)]
    return 3 * sum(_nbytes(p) for p in weights) + 2 * sum(_nbytes(t) for t in state)


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def layer_times(
    layers: Iterable[Layer], rates: MachineRates, *, batch: int, element_bytes: int, update: int = 0
) -> list[LayerTime]:
    """The least time of each layer that does anything, and of the update, in the order of the forward pass.

    Args:
        batch: images a step.
        element_bytes: of an activation in the precision of the run.
        update: bytes of the optimizer's update.
    """
    timed = [
        _timed(layer.name, layer.type, layer_flops(layer, batch), layer_bytes(layer, batch, element_bytes), rates)
        for layer in layers
    ]
    timed.append(_timed("(update)", "optimizer", 0.0, float(update), rates))
    return [entry for entry in timed if entry.seconds > 0]


def _timed(name: str, kind: str, flops: float, moved: float, rates: MachineRates) -> LayerTime:
    compute, memory = flops / rates.flops, moved / rates.bytes
    return LayerTime(name, kind, flops, moved, max(compute, memory), "compute" if compute > memory else "memory")


# ---- the machine ----


def synchronizer(device: torch.device) -> Callable[[], Any]:
    """A function that waits until the device has done what it was given."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    if device.type == "mps":
        return torch.mps.synchronize
    return lambda: None


@torch.no_grad()
def measure_rates(device: torch.device, dtype: torch.dtype) -> MachineRates:
    """The best of a few large matrix products in `dtype` and of a few copies that no cache holds."""
    cuda = device.type == "cuda"
    side = 8192 if cuda else 2048
    a = torch.randn(side, side, device=device).to(dtype)
    b, product = a.t().contiguous(), torch.empty_like(a)
    seconds = _fastest(lambda: torch.mm(a, b, out=product), device)
    flops = FLOP_PER_MULTIPLY_ADD * side**3 / seconds
    source = torch.ones((1 << 30) if cuda else (1 << 28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _fastest(lambda: target.copy_(source), device)
    return MachineRates(flops, 2 * source.numel() / seconds)


def _fastest(work: Callable[[], Any], device: torch.device) -> float:
    synchronize = synchronizer(device)
    best = float("inf")
    for _ in range(REPEATS + 1):  # the first one pays for allocations; it is never the best
        synchronize()
        began = time.perf_counter()
        work()
        synchronize()
        best = min(best, time.perf_counter() - began)
    return best
