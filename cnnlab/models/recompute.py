"""Activation checkpointing that leaves the network's numbers alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cnnlab.torch_private import BatchNorm


class FrozenStatistics:
    """Batch norm inside normalizes by the batch as before, but its running moments stay what they are.

    May be entered again: an optimizer that differentiates twice has the blocks recomputed twice.
    """

    def __init__(self, blocks: Sequence[nn.Module]):
        self._norms = [m for block in blocks for m in block.modules() if isinstance(m, BatchNorm)]
        self._saved: list[tuple[float | None, Tensor | None]] = []

    def __enter__(self) -> None:
        self._saved = [
            (norm.momentum, None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone())
            for norm in self._norms
        ]
        for norm in self._norms:
            norm.momentum = 0.0

    def __exit__(self, *exception: object) -> None:
        with torch.no_grad():
            for norm, (momentum, count) in zip(self._norms, self._saved, strict=True):
                norm.momentum = momentum
                if norm.num_batches_tracked is not None and count is not None:
                    norm.num_batches_tracked.copy_(count)


def _contexts(
    blocks: Sequence[nn.Module],
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), FrozenStatistics(blocks)


def _chain(blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


class CheckpointedSequential(nn.Sequential):
    """A sequence of n blocks that holds O(sqrt(n)) activations at a time (Chen et al. 2016, section 4.1).

    It is cut into segments of sqrt(n) blocks; only a segment's input is kept, and the backward pass computes
    the rest again. Losses, gradients, random numbers and the running moments of batch norm are those of the
    plain sequence, bit for bit. Forward hooks inside run a second time, during the backward pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        blocks = list(self.children())
        if not torch.is_grad_enabled() or not blocks:
            return _chain(blocks, x)
        length = math.isqrt(len(blocks) - 1) + 1
        for start in range(0, len(blocks), length):
            segment = blocks[start : start + length]
            if torch.compiler.is_compiling():  # the compiler recomputes values only, never the buffers' updates
                x = checkpoint(_chain, segment, x, use_reentrant=False)
            else:
                x = checkpoint(_chain, segment, x, use_reentrant=False, context_fn=partial(_contexts, segment))
        return x
