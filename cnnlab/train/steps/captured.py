"""The step as two CUDA graphs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cnnlab.inspect.untouched import kept
from cnnlab.observe.observer import Look
from cnnlab.protocols import Batch, StepResult
from cnnlab.train.forward import Forward
from cnnlab.train.steps.eager import EagerStep

CAPTURE_MODE = "thread_local"
"""What a capture forbids, it forbids in its own thread: the fetching thread may go on to allocate and copy batches."""


class CapturedStep(EagerStep):
    """Two CUDA graphs: forward and backward of all micro-batches, and the update. Probes read between them, so
    sampled and other steps are the same program.

    The first graph is captured at the first full batch; an uneven last batch runs eagerly. The second one is
    captured at the third update that follows the first graph, when the optimizer has made its state, if the
    optimizer reads everything on the device (torch's fused and capturable ones do); otherwise the update runs
    eagerly after the first graph.
    """

    name = "captured"

    def __init__(self, forward: Forward, *args: Any, batch_size: int, warmup: int = 3, **kwargs: Any):
        super().__init__(forward, *args, **kwargs)
        self.batch_size = batch_size
        self.warmup = warmup
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: Batch = {}
        self._gradients: list[Tensor | None] = []
        self._result: StepResult | None = None
        self._update_graph: torch.cuda.CUDAGraph | None = None
        self._updates = 0
        self._replayed = False
        """Whether the gradients at hand are the first graph's."""

    @property
    def update_is_capturable(self) -> bool:
        """Whether the optimizer reads nothing on the host, not even its rate."""
        groups = self.optimizer.param_groups
        on_device = all(isinstance(group["lr"], Tensor) and group.get("capturable", True) for group in groups)
        return self.scaler is None and on_device

    def zero_grad(self) -> None:
        """The graph overwrites its own gradients; `backward` puts them back in place."""

    def cut_finer(self) -> None:
        """The first graph is captured anew; its memory is given up first."""
        super().cut_finer()
        super().zero_grad()
        self._graph, self._result, self._gradients, self._inputs = None, None, [], {}

    def backward(self, batch: Batch, count: int, number: int, look: Look) -> StepResult:
        self._replayed = len(batch["index"]) == self.batch_size
        if not self._replayed:
            super().zero_grad()
            return super().backward(batch, count, number, look)
        if self._graph is None:
            self._capture(batch, count)
        assert self._graph is not None and self._result is not None
        for name, tensor in batch.items():
            self._inputs[name].copy_(tensor, non_blocking=True)
        for p, gradient in zip(self.parameters, self._gradients, strict=True):
            p.grad = gradient
        self.reseed(number, 0)
        self._graph.replay()
        return StepResult(dict(self._result.sums), self._result.sample_loss, self._inputs["index"])

    def apply(self) -> None:
        if not (self._replayed and self.update_is_capturable):
            super().apply()
            return
        self._updates += 1
        if self._updates == self.warmup:
            torch.cuda.synchronize(self.device)
            with _captured() as self._update_graph:
                self.optimizer.step()
        if self._update_graph is None:
            self.optimizer.step()
        else:
            self._update_graph.replay()

    def reseed(self, number: int, piece: int) -> None:
        """Before the graph, which draws from the generator as it finds it, not inside."""
        if not torch.cuda.is_current_stream_capturing():
            super().reseed(number, piece)

    def _capture(self, batch: Batch, count: int) -> None:
        self._inputs = {name: tensor.clone() for name, tensor in batch.items()}
        run = super().backward
        with kept(self.model.buffers()):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(self.warmup):
                    super().zero_grad()
                    run(self._inputs, count, 0, Look())
            torch.cuda.current_stream().wait_stream(stream)
            super().zero_grad()
            with _captured() as graph:
                self._result = run(self._inputs, count, 0, Look())
        self._gradients = [p.grad for p in self.parameters]
        self._graph = graph


@contextmanager
def _captured() -> Iterator[torch.cuda.CUDAGraph]:
    """The graph that the block's kernels become. After a failure the current stream is what it was, for which not every
    torch cares."""
    gc.collect()  # no cycle of an earlier graph's nodes may live on, or be freed while this one is recorded
    stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode=CAPTURE_MODE):
            yield graph
    except BaseException:
        torch.cuda.set_stream(stream)
        raise
