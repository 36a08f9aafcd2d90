"""The step whose forward pass is one program of `torch.compile`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnnlab.errors import UsageError
from cnnlab.protocols import Batch
from cnnlab.torch_private import compiler_error
from cnnlab.train.forward import Forward
from cnnlab.train.steps.eager import EagerStep


class CompiledStep(EagerStep):
    """Network, loss and measures through `torch.compile`; an uneven batch runs uncompiled, not recompiled.

    Args:
        batch_size: samples of a full batch, over all ranks and micro-batches.
    """

    name = "compiled"

    def __init__(self, forward: Forward, *args: Any, batch_size: int, **kwargs: Any):
        super().__init__(forward, *args, **kwargs)
        self._part = len(range(self.ranks.rank, batch_size, self.ranks.world))
        self._sizes = self._full()
        self._plain = forward
        self._compiled = torch.compile(forward.__call__, dynamic=False, fullgraph=True)
        self.forward = self._dispatch

    def _full(self) -> set[int]:
        """Samples of a full batch's micro-batches."""
        return {self._part // self.accumulate, -(-self._part // self.accumulate)}

    def cut_finer(self) -> None:
        super().cut_finer()
        self._sizes = self._full()

    def _dispatch(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if len(batch["index"]) not in self._sizes:
            return self._plain(batch)
        try:
            return self._compiled(batch)
        except compiler_error() as error:
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UsageError(
                f"`trainer.step=compiled`: torch.compile cannot compile this network as a whole ({reason}); "
                "type trainer.step=eager"
            ) from error
