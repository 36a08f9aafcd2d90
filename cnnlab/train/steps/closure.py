"""The steps of optimizers that evaluate the loss themselves."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from cnnlab.inspect.untouched import kept
from cnnlab.observe.observer import Look
from cnnlab.protocols import Batch, StepResult
from cnnlab.train.guard import NotFinite
from cnnlab.train.steps.eager import EagerStep


class ClosureStep(EagerStep):
    """For optimizers that evaluate the loss themselves, several times an update (L-BFGS).

    Every evaluation sees the same dropout; only the first one moves the running statistics of norm layers and is
    the one observed and reported.
    """

    name = "closure"

    def __call__(self, batch: Batch, count: int, number: int, look: Look) -> StepResult:
        first: StepResult | None = None
        self.guard.before(self.model)
        batch = self.interventions.batch(batch, number)

        def closure() -> Tensor:
            nonlocal first
            self.zero_grad()
            with nullcontext() if first is None else kept(self.model.buffers()):
                result = self.backward(batch, count, number, look)
            loss = self.reduce(result, count, number, look if first is None else Look())
            for p in self.parameters:
                if p.grad is not None:
                    p.grad = p.grad.contiguous()  # torch's L-BFGS takes no channels-last gradients
            if first is None:
                look.before_update()
                first = result
                self.begin_search(loss, self.own_gradients())
            return self.mean_loss(result, count)

        with self.guard.searching(self.optimizer, self.parameters):
            self.optimizer.step(closure)  # type: ignore[arg-type]
        self.interventions.weights(number)
        look.updated()
        assert first is not None, "the optimizer evaluates its closure"
        return self.guard.kept(number, first)

    def begin_search(self, loss: Tensor, gradients: Sequence[Tensor] | None) -> None:
        """Raises `NotFinite` where the first evaluation gives the search nothing to begin with."""
        self.guard.judge(loss, gradients, self.optimizer)
        if self.guard.bad:
            raise NotFinite

    def mean_loss(self, result: StepResult, count: int) -> Tensor:
        """What is minimized, over all ranks; equal on each of them, so that their line searches agree."""
        terms = [result.sums[name] for name in ("data_loss", "penalty") if name in result.sums]
        total = torch.stack(terms).sum() if terms else torch.zeros((), device=self.device)
        self.ranks.sum_([total])
        return total / count


class GraphClosureStep(ClosureStep):
    """For optimizers that differentiate the loss twice (Newton-CG): the closure returns it with its graph."""

    name = "closure (second order)"

    def __call__(self, batch: Batch, count: int, number: int, look: Look) -> StepResult:
        first: StepResult | None = None
        self.guard.before(self.model)
        objective = self.objective(self.interventions.batch(batch, number), count, number)

        def closure() -> Tensor:
            nonlocal first
            total, result = objective.evaluate(moving=first is None)
            if first is None:
                look.forward_done()
                first = result
                self.begin_search(self.guard.loss_of(result, count), None)
            return total

        self.zero_grad()
        look.before_update()
        with self.guard.searching(self.optimizer, self.parameters):
            self.optimizer.step(closure)  # type: ignore[arg-type]
        look.gradients(count)
        self.interventions.weights(number)
        look.updated()
        assert first is not None, "the optimizer evaluates its closure"
        return self.guard.kept(number, first)
