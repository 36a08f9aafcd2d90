"""The step: forward, backward, unscale, clip, update. The other steps replace how a phase runs, not what it does; the
loop cannot tell them apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cnnlab import rng
from cnnlab.errors import DivergedError
from cnnlab.inspect.untouched import kept
from cnnlab.machine.ranks import Ranks
from cnnlab.observe.observer import Look
from cnnlab.protocols import Batch, StepResult
from cnnlab.train.forward import NO_PENALTIES, Forward, Penalties, minimized, pieces
from cnnlab.train.guard import UNGUARDED, Unguarded
from cnnlab.train.interventions import Interventions
from cnnlab.train.objective import Objective


class EagerStep:
    """The phases one after the other.

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
        guard: keeps updates that are not finite out of the weights.
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
        guard: Unguarded = UNGUARDED,
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
        self.guard = guard
        if scaler is not None:
            scaler.scale(torch.zeros((), device=self.device))  # makes its state, which a rank without samples needs

    def __call__(self, batch: Batch, count: int, number: int, look: Look) -> StepResult:
        """Update `number` from this rank's part of a batch of `count` samples."""
        self.guard.before(self.model)
        self.zero_grad()
        result = self.backward(self.interventions.batch(batch, number), count, number, look)
        loss = self.reduce(result, count, number, look)
        self.guard.judge(loss, self.own_gradients(), self.optimizer, self.scaler)
        look.before_update()
        self.update(number)
        look.updated()
        return self.guard.kept(number, result)

    def rehearse(self, batch: Batch, count: int) -> None:
        """Forward and backward of a batch without a trace: what is made on first use is made, nothing is learned."""
        self.interventions.train(self.model, 0)
        with kept(self.model.buffers()):
            self.zero_grad()
            self.backward(batch, count, 0, Look())
        for p in self.parameters:
            p.grad = None

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    def own_gradients(self) -> list[Tensor]:
        """Those that there are."""
        return [p.grad for p in self.parameters if p.grad is not None]

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

    def reduce(self, result: StepResult, count: int, number: int, look: Look) -> Tensor:
        """Gradients over all ranks, unscaled; watched; intervened in; clipped. Returns the loss that is judged."""
        loss = self.guard.loss_of(result, count)
        if self.ranks.world > 1:
            for p in self.parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            self.ranks.sum_([*self.own_gradients(), loss])
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        scale = None if self.scaler is None else self.scaler._scale  # a tensor, so nobody waits for the device
        look.gradients(count, 1.0 if scale is None else scale)
        self.interventions.gradients(self.parameters, number)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        return loss

    def update(self, number: int) -> None:
        self.guard.update(self.apply, self.leave, self.optimizer, self.scaler)
        self.interventions.weights(number)

    def leave(self) -> None:
        """What an update that is left out does all the same."""
        if self.scaler is not None:
            self.scaler.update()

    def apply(self) -> None:
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
