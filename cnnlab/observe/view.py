"""What a probe sees of a running step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from cnnlab.observe.taps import Taps


@dataclass
class View:
    """One sampled step, at the phase for which the probe asked.

    `tensors` names `parameters` (those that train). Gradients are unscaled, accumulated over micro-batches,
    summed over ranks and not yet clipped. `previous` holds the weights before the update, for probes that need
    `updates`. `count` is the number of samples of the whole batch.
    """

    step: int
    count: int
    model: nn.Module
    tensors: Sequence[str]
    parameters: Sequence[nn.Parameter]
    taps: Taps | None
    scale: Tensor | float = 1.0
    """Factor of the loss under fp16 scaling; activation gradients still carry it."""
    previous: Sequence[Tensor] | None = None
