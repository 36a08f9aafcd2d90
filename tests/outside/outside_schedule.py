"""A schedule from outside."""

from __future__ import annotations

from cnnlab.protocols import Schedule
from cnnlab.schema import Probability


class Sawtooth(Schedule):
    """Falls in a straight line from 1 to `low` within each epoch, and begins anew with the next (a restart of
    Loshchilov & Hutter 2017, "SGDR", with a line for the cosine)."""

    def __init__(self, low: Probability = 0.1):
        self.low = low
        self.steps_per_epoch = 1

    def resolve(self, steps_per_epoch: int, total_steps: int, batch_size: int) -> None:
        self.steps_per_epoch = steps_per_epoch

    def factor(self, step: int, total: int) -> float:
        return 1 - (1 - self.low) * (step % self.steps_per_epoch) / self.steps_per_epoch
