"""The step: forward, backward, unscale, clip, update. One class a way of running it; the loop cannot tell them
apart."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cnnlab import rng
from cnnlab.errors import DivergedError, UsageError
from cnnlab.machine.ranks import Ranks
from cnnlab.observe.observer import Look
from cnnlab.protocols import Batch, StepResult
from cnnlab.torch_private import compiler_error
from cnnlab.train.forward import NO_PENALTIES, Forward, Penalties, minimized, pieces
from cnnlab.train.interventions import Interventions
from cnnlab.train.objective import Objective

CAPTURE_MODE = "thread_local"
"""What a capture forbids, it forbids in its own thread: the fetching thread may go on to allocate and copy batches."""


class EagerStep:
    """The phases one after the other. The other steps replace how a phase runs, not what it does.

    Args:
        forward: network, loss and measures of one micro-batch.
        optimizer: any `torch.optim.Optimizer`; its groups state `base_lr`.
        parameters: those that train.
        seed: of the dropout stream.
        ranks: the processes that share each batch.
        penalties: terms of the loss that depend on the weights alone.
        interventions: what may change the run, at the phases `batch`, `gradients` and `weights`.
        scaler: for fp16.
        accumulate: micro-batches an update.
        clip_norm: largest L2 norm of the whole gradient, or `None`.
    """

    name = "eager"

    def __init__(
        self,
        forward: Forward,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        *,
        seed: int,
        ranks: Ranks,
        penalties: Penalties = NO_PENALTIES,
        interventions: Interventions | None = None,
        scaler: torch.amp.GradScaler | None = None,
        accumulate: int = 1,
        clip_norm: float | None = None,
    ):
        self.forward: Callable[[Batch], tuple[Tensor, dict[str, Tensor]]] = forward
        self.evaluator = forward
        """`forward` itself, whatever the step makes of it."""
        self.model = forward.model
        self.device = forward.device
        self.optimizer = optimizer
        self.parameters = list(parameters)
        wanted = set(map(id, self.parameters))
        self.weights = {name: p for name, p in self.model.named_parameters() if id(p) in wanted}
        """The same by name."""
        self.seed = seed
        self.ranks = ranks
        self.penalties = penalties
        self.interventions = interventions or Interventions()
        self.scaler = scaler
        self.accumulate = accumulate
        self.clip_norm = clip_norm
        if scaler is not None:
            scaler.scale(torch.zeros((), device=self.device))  # makes its state, which a rank without samples needs

    def __call__(self, batch: Batch, count: int, number: int, look: Look) -> StepResult:
        """Update `number` from this rank's part of a batch of `count` samples."""
        self.zero_grad()
        result = self.backward(self.interventions.batch(batch, number), count, number, look)
        self.reduce(count, number, look)
        look.before_update()
        self.update(number)
        look.updated()
        return result

    def rehearse(self, batch: Batch, count: int) -> None:
        """Forward and backward of a batch without a trace: what is made on first use is made, nothing is learned."""
        self.interventions.train(self.model, 0)
        with _Restored(list(self.model.buffers())):
            self.zero_grad()
            self.backward(batch, count, 0, Look())
        for p in self.parameters:
            p.grad = None

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    def cut_finer(self) -> None:
        """Twice as many micro-batches from here on."""
        self.accumulate *= 2

    def backward(self, batch: Batch, count: int, number: int, look: Look) -> StepResult:
        """Adds up the gradients of all micro-batches; the loss is the mean over `count`, plus the penalty."""
        sums: dict[str, Tensor] = {}
        losses = []
        for index, piece in enumerate(pieces(batch, self.accumulate)):
            self.reseed(number, index)
            first = index == 0 and self.ranks.is_main  # penalties are equal on all ranks: one adds them
            penalties = self.penalties if first else NO_PENALTIES
            total, loss, piece_sums = minimized(self.forward, piece, count, penalties, self.weights)
            (total if self.scaler is None else self.scaler.scale(total)).backward()
            look.forward_done()
            losses.append(loss)
            for name, value in piece_sums.items():
                sums[name] = sums[name] + value if name in sums else value
        seen = torch.cat(losses) if losses else torch.zeros(0, device=self.device)
        return StepResult(sums, seen, batch["index"])

    def reseed(self, number: int, piece: int) -> None:
        """Dropout and the like draw from their own stream, the same on a resume as in an unbroken run."""
        rng.reseed(self.device, self.seed, "dropout", number, piece, self.ranks.rank)

    def objective(self, batch: Batch, count: int, number: int) -> Objective:
        """What update `number` minimizes, with the network as it stands.

        Args:
            batch: this rank's part, after the interventions.
            count: samples of the whole batch.
        """
        return Objective(
            self.evaluator,
            batch,
            count,
            penalties=self.penalties,
            accumulate=self.accumulate,
            seed=self.seed,
            number=number,
            interventions=self.interventions,
            ranks=self.ranks,
        )

    def reduce(self, count: int, number: int, look: Look) -> None:
        """Gradients over all ranks, unscaled; watched; intervened in; clipped."""
        if self.ranks.world > 1:
            for p in self.parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            self.ranks.sum_([p.grad for p in self.parameters if p.grad is not None])
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        scale = None if self.scaler is None else self.scaler._scale  # a tensor, so nobody waits for the device
        look.gradients(count, 1.0 if scale is None else scale)
        self.interventions.gradients(self.parameters, number)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)

    def update(self, number: int) -> None:
        try:
            if self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.step(self.optimizer)
                self.scaler.update()
        except torch.linalg.LinAlgError as error:  # a preconditioner of gradients that are not finite
            raise DivergedError(
                f"{type(self.optimizer).__name__} cannot factorize the moments of these gradients ({error}); "
                "try a smaller rate (optim.lr=...) or trainer.clip_norm=1"
            ) from error
        self.interventions.weights(number)


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


class ClosureStep(EagerStep):
    """For optimizers that evaluate the loss themselves, several times an update (L-BFGS).

    Every evaluation sees the same dropout; only the first one moves the running statistics of norm layers and is
    the one observed and reported.
    """

    name = "closure"

    def __call__(self, batch: Batch, count: int, number: int, look: Look) -> StepResult:
        first: StepResult | None = None
        batch = self.interventions.batch(batch, number)

        def closure() -> Tensor:
            nonlocal first
            self.zero_grad()
            with nullcontext() if first is None else self.frozen_buffers():
                result = self.backward(batch, count, number, look)
            self.reduce(count, number, look if first is None else Look())
            for p in self.parameters:
                if p.grad is not None:
                    p.grad = p.grad.contiguous()  # torch's L-BFGS takes no channels-last gradients
            if first is None:
                look.before_update()
                first = result
            return self.mean_loss(result, count)

        self.optimizer.step(closure)  # type: ignore[arg-type]
        self.interventions.weights(number)
        look.updated()
        assert first is not None, "the optimizer evaluates its closure"
        return first

    def mean_loss(self, result: StepResult, count: int) -> Tensor:
        """What is minimized, over all ranks; equal on each of them, so that their line searches agree."""
        terms = [result.sums[name] for name in ("data_loss", "penalty") if name in result.sums]
        total = torch.stack(terms).sum() if terms else torch.zeros((), device=self.device)
        self.ranks.sum_([total])
        return total / count

    def frozen_buffers(self) -> AbstractContextManager[None]:
        return _Restored(list(self.model.buffers()))


class GraphClosureStep(ClosureStep):
    """For optimizers that differentiate the loss twice (Newton-CG): the closure returns it with its graph."""

    name = "closure (second order)"

    def __call__(self, batch: Batch, count: int, number: int, look: Look) -> StepResult:
        first: StepResult | None = None
        objective = self.objective(self.interventions.batch(batch, number), count, number)

        def closure() -> Tensor:
            nonlocal first
            total, result = objective.evaluate(moving=first is None)
            if first is None:
                look.forward_done()
                first = result
            return total

        self.zero_grad()
        look.before_update()
        self.optimizer.step(closure)  # type: ignore[arg-type]
        look.gradients(count)
        self.interventions.weights(number)
        look.updated()
        assert first is not None, "the optimizer evaluates its closure"
        return first


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

    def update(self, number: int) -> None:
        if not (self._replayed and self.update_is_capturable):
            super().update(number)
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
        self.interventions.weights(number)

    def reseed(self, number: int, piece: int) -> None:
        """Before the graph, which draws from the generator as it finds it, not inside."""
        if not torch.cuda.is_current_stream_capturing():
            super().reseed(number, piece)

    def _capture(self, batch: Batch, count: int) -> None:
        self._inputs = {name: tensor.clone() for name, tensor in batch.items()}
        run = super().backward
        with _Restored(list(self.model.buffers())):
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


class _Restored:
    """Puts the tensors back to what they were when the block was entered."""

    def __init__(self, tensors: list[Tensor]):
        self._tensors = tensors
        self._saved: list[Tensor] = []

    def __enter__(self) -> None:
        self._saved = [t.detach().clone() for t in self._tensors]

    def __exit__(self, *exception: object) -> None:
        with torch.no_grad():
            for tensor, saved in zip(self._tensors, self._saved, strict=True):
                tensor.copy_(saved)
