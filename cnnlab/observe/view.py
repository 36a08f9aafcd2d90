"""What a probe sees of a running step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from cnnlab.observe.taps import Activity


@dataclass
class View:
    """One sampled step, at the phase for which the probe asked.

    `step` counts the updates, this one among them, as the records do.

    `tensors` names `parameters` (those that train). Gradients are unscaled, accumulated over micro-batches,
    summed over ranks and not yet clipped. `count` is the number of samples of the whole batch. `activity` is
    there for probes that need activations or their gradients, `previous` (the weights before the update) for
    those that need `updates`.
    """

    step: int
    count: int
    model: nn.Module
    tensors: Sequence[str]
    parameters: Sequence[nn.Parameter]
    activity: Activity | None = None
    previous: Sequence[Tensor] | None = None
