"""Out of memory in mid-run: the micro-batch is halved and the batch kept (`trainer.auto_accumulate`)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from cnnlab.machine.device import give_back
from cnnlab.machine.memory import is_out_of_memory
from cnnlab.observe.observer import Look
from cnnlab.protocols import Batch, Outputs, StepResult
from cnnlab.tasks import Task
from cnnlab.torch_private import BatchNorm
from cnnlab.train.forward import Forward, Sums, pieces
from cnnlab.train.halves import Halves
from cnnlab.train.steps.eager import EagerStep

_T = TypeVar("_T")
_log = logging.getLogger(__name__)
LEAST_STATISTICS = 2
"""Samples of a micro-batch that a batch norm needs."""


def halve_on_demand(step: EagerStep, told: Callable[[int, str], None]) -> None:
    """Lets the step repeat an update's forward and backward with twice as many micro-batches when memory is at its end.

    Nothing of what failed is left: buffers, gradients and taps are put back, and dropout draws anew from its seed. So
    the update is the one of a step that was made with that `accumulate`. What follows (the optimizer's state) asks for
    the same memory in any case, and is not repeated.

    Args:
        step: of a run on one process, whose optimizer evaluates no closure.
        told: gets the new number of micro-batches, and a word on what changes with it (the empty text for nothing).
    """
    backward, model = step.backward, step.model
    normed = any(isinstance(module, BatchNorm) for module in model.modules())

    def patient(batch: Batch, count: int, number: int, look: Look) -> StepResult:
        least = LEAST_STATISTICS if normed else 1
        while True:
            before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
            try:
                return backward(batch, count, number, look)
            except Exception as error:
                if not is_out_of_memory(error) or len(batch["index"]) < 2 * step.accumulate * least:
                    raise
            # Only here, where the error and with it the graph of what failed is gone, is there room again.
            with torch.no_grad():
                for buffer, kept in before:
                    buffer.copy_(kept)
            step.cut_finer()
            step.zero_grad()
            look.restart()
            give_back(step.device)
            samples = len(batch["index"]) // step.accumulate
            told(step.accumulate, f"; batch norm takes its moments of {samples} samples from here on" if normed else "")

    step.backward = patient  # type: ignore[method-assign]


class HalvingForward(Forward):
    """In evaluation, what does not fit is run in twice as many pieces, and so are the batches that follow; it is said.

    Sums over samples are what they were, but for the rounding of another batch size.
    """

    def __init__(
        self, model: nn.Module, task: Task, device: torch.device, dtype: torch.dtype, halves: Halves | None = None
    ):
        super().__init__(model, task, device, dtype, halves=halves)
        self.count = 1
        self._whole = Forward(model, task, device, dtype, halves=halves)

    def __call__(self, batch: Batch) -> tuple[Tensor, Sums]:
        if self.model.training:
            return super().__call__(batch)
        return self._halving(len(batch["index"]), lambda: self._summed(batch))

    def outputs(self, image: Tensor) -> Outputs:
        if self.model.training:
            return super().outputs(image)
        return self._halving(len(image), lambda: self._joined(image))

    def _halving(self, samples: int, attempt: Callable[[], _T]) -> _T:
        """What `attempt` gives, with `count` doubled until it fits, or each piece is one sample."""
        before = self.count
        while True:
            try:
                result = attempt()
                break
            except Exception as error:
                if not is_out_of_memory(error) or samples < 2 * self.count:
                    raise
            self.count *= 2
            give_back(self.device)
        if self.count > before:
            each = -(-samples // self.count)
            _log.warning("out of memory: a batch is evaluated in pieces of %d from here on", each)
        return result

    def _summed(self, batch: Batch) -> tuple[Tensor, Sums]:
        losses: list[Tensor] = []
        total: Sums = {}
        for piece in pieces(batch, self.count):
            own, sums = self._whole(piece)
            losses.append(own)
            total = {name: total[name] + value for name, value in sums.items()} if total else sums
        return torch.cat(losses), total

    def _joined(self, image: Tensor) -> Outputs:
        parts = image.tensor_split(min(self.count, max(1, len(image))))
        found = [self._whole.outputs(part) for part in parts]
        return {name: torch.cat([outputs[name] for outputs in found]) for name in found[0]}
