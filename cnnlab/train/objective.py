"""The loss that training minimizes, as a function of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cnnlab import measure, rng
from cnnlab.inspect.untouched import modes_kept
from cnnlab.machine.ranks import Ranks
from cnnlab.protocols import Batch, StepResult
from cnnlab.torch_private import NormBase, foreach_add_
from cnnlab.train.forward import NO_PENALTIES, Forward, Penalties, Sums, minimized, pieces
from cnnlab.train.interventions import Interventions

Result = TypeVar("Result")


class Mode(StrEnum):
    """How the network stands while its loss is evaluated."""

    train = "train"
    """As it trains: dropout draws, norm layers use the batch's moments; what an intervention freezes is frozen."""
    frozen = "frozen"
    """As it trains, but every norm layer uses its running moments: each sample's loss is its own."""
    eval = "eval"
    """As it is evaluated: no dropout, running moments; the image itself, not the task's views of it."""


@dataclass(frozen=True)
class Objective:
    """f(θ) = Σ losses of the batch / count + penalties(θ), on a fixed batch and with fixed random numbers.

    It is what one update minimizes: the task's losses by their weights, over all micro-batches and ranks, in the
    precision of the run. Nothing is left behind: weights, `.grad`, buffers, modes and generators are afterwards what
    they were. Its values are tensors on the device; nobody waits for them. Lists of tensors (gradients, directions,
    products) follow `parameters`.

    It reads the network's weights when it is asked; `at` and `moved` give it other ones, of its own, so that the
    network keeps its weights:

        objective = run.objective(batch, mode="frozen", dtype=torch.float64)
        slope = objective.gradient()
        predicted = measure.dot(slope, direction)                                # gradient check
        found = (objective.moved(direction, h).value() - objective.moved(direction, -h).value()) / (2 * h)
        surface = [objective.moved(direction, t).value() for t in torch.linspace(-1, 1, 21)]
        hessian = objective.hessian()                                            # keeps its graph
        for _ in range(20):                                                      # power iteration
            direction = measure.normalized(hessian(direction))

    Args:
        forward: network, task and precision.
        batch: this rank's part, on the device, as the network gets it.
        count: samples of the whole batch over all ranks; `None` takes those of `batch`.
        penalties: the terms that depend on the weights alone. Rank 0 adds them.
        mode: see `Mode`; `None` leaves the network as it stands.
        dtype: float32 or float64: weights, buffers and batch are cast, and there is no autocast. `None` computes as
            the run does.
        accumulate: micro-batches into which the batch is cut (batch moments are those of each).
        seed, number: of the dropout stream: (seed, "dropout", number, micro-batch, rank), the one of update `number`.
        interventions, epoch: what is frozen under `Mode.train`.
        ranks: the processes that share the batch; each gets the result of all.
        weights: θ by name, where it is not the network's own.
    """

    forward: Forward
    batch: Batch
    count: int | None = None
    penalties: Penalties = NO_PENALTIES
    mode: Mode | None = None
    dtype: torch.dtype | None = None
    accumulate: int = 1
    seed: int = 0
    number: int = 0
    interventions: Interventions = field(default_factory=Interventions)
    epoch: int = 0
    ranks: Ranks = field(default_factory=Ranks)
    weights: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"expected float32 or float64, or None for the run's own, received {self.dtype}")

    # ---- the point ----

    @property
    def model(self) -> nn.Module:
        return self.forward.model

    @property
    def names(self) -> list[str]:
        """Of the parameters that train, in the network's order."""
        return [name for name, p in self.model.named_parameters() if p.requires_grad]

    @property
    def parameters(self) -> list[Tensor]:
        """θ: the weights at which it is evaluated; the network's own where it has no others."""
        theta = self._theta()
        return [theta[name] for name in self.names]

    def at(self, weights: Sequence[Tensor]) -> Objective:
        """The same function at copies of these weights, one tensor a parameter.

        Raises `ValueError` for those of another network.
        """
        return self._with([weight.detach().clone() for weight in weights])

    def moved(self, direction: Sequence[Tensor], length: float | Tensor) -> Objective:
        """The same function at θ + length·direction."""
        return self._with(measure.moved([p.detach() for p in self.parameters], direction, length))

    def _with(self, weights: Sequence[Tensor]) -> Objective:
        named, theta = dict(zip(self.names, weights, strict=True)), self._theta()
        for name, weight in named.items():
            if weight.shape != theta[name].shape:
                raise ValueError(f"expected {name} of {tuple(theta[name].shape)}, received {tuple(weight.shape)}")
        return replace(self, weights=named)

    # ---- what it is ----

    def evaluate(self, *, moving: bool = False) -> tuple[Tensor, StepResult]:
        """f(θ), with its graph where gradients are enabled, and what the step reports of it; of this rank alone.

        Args:
            moving: lets the norm layers' running moments move, as the first evaluation of an update does (of the
                network's own weights, in their dtype).
        """
        theta = self._theta()

        def work() -> tuple[Tensor, StepResult]:
            totals, losses = [], []
            sums: Sums = {}
            for total, loss, piece_sums in self._terms(theta):
                totals.append(total)
                losses.append(loss)
                for name, value in piece_sums.items():
                    sums[name] = sums[name] + value if name in sums else value
            total = sum(totals[1:], totals[0]) if totals else self._nothing()
            seen = torch.cat(losses) if losses else self._nothing().expand(0)
            return total, StepResult(sums, seen, self.batch["index"])

        return self._placed(theta, work, moving=moving)

    def value(self) -> Tensor:
        """f(θ), a scalar."""
        with torch.no_grad():
            total, _ = self.evaluate()
        return self._of_all([total])[0]

    def gradient(self) -> list[Tensor]:
        """∂f/∂θ, zeros for a parameter that takes no part."""
        return self.value_and_gradient()[1]

    def value_and_gradient(self) -> tuple[Tensor, list[Tensor]]:
        """f(θ) and ∂f/∂θ; one micro-batch's graph at a time."""
        theta, own = self._leaves()
        found = [self._nothing(), *(torch.zeros_like(leaf) for leaf in own)]

        def work() -> None:
            for total, _, _ in self._terms(theta):
                slopes = torch.autograd.grad(total, own, materialize_grads=True)
                foreach_add_(found, [total.detach(), *slopes])

        with torch.enable_grad():
            self._placed(theta, work)
        value, *gradient = self._of_all(found)
        return value, gradient

    def hessian_vector(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """H·v, shaped like the parameters."""
        return self.products([vector])[0]

    def products(self, vectors: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """H·v of each v, from one forward and one backward pass; one micro-batch's graph at a time."""
        theta, own = self._leaves()
        found = [[torch.zeros_like(leaf) for leaf in own] for _ in vectors]

        def work() -> None:
            for total, _, _ in self._terms(theta):
                slopes = torch.autograd.grad(total, own, create_graph=True, materialize_grads=True)
                for sums, vector in zip(found, vectors, strict=True):
                    foreach_add_(sums, measure.hessian_vector_products(slopes, own, _like(vector, own)))

        with torch.enable_grad():
            self._placed(theta, work)
        return [self._of_all(sums) for sums in found]

    def hessian(self) -> Hessian:
        """H at θ for many products, one after the other: the graph of the whole batch is kept as long as it is."""
        return Hessian(self)

    # ---- how ----

    def _theta(self) -> dict[str, Tensor]:
        """All parameters by name, in the dtype; those that train are leaves of the graph."""
        found: dict[str, Tensor] = {}
        for name, p in self.model.named_parameters():
            own = None if self.weights is None else self.weights.get(name)
            if own is None and self.dtype in (None, p.dtype):
                found[name] = p
            else:
                value = (p if own is None else own).detach().to(self.dtype or p.dtype)
                found[name] = value.detach().requires_grad_(p.requires_grad)
        return found

    def _leaves(self) -> tuple[dict[str, Tensor], list[Tensor]]:
        theta = self._theta()
        return theta, [theta[name] for name in self.names]

    def _terms(self, theta: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor, Sums]]:
        """What is minimized, piece by piece (see `minimized`)."""
        batch = {name: self._cast(tensor) for name, tensor in self.batch.items()}
        count = len(batch["index"]) if self.count is None else self.count
        forward = Forward(
            self.model,
            self.forward.task,
            self.forward.device,
            self.dtype or self.forward.dtype,
            views=False,
            halves=self.forward.halves,
        )
        trained = {name: theta[name] for name in self.names}
        for index, piece in enumerate(pieces(batch, self.accumulate)):
            rng.reseed(forward.device, self.seed, "dropout", self.number, index, self.ranks.rank)
            first = index == 0 and self.ranks.is_main
            yield minimized(forward, piece, count, self.penalties if first else NO_PENALTIES, trained)

    def _placed(self, theta: Mapping[str, Tensor], work: Callable[[], Result], *, moving: bool = False) -> Result:
        """What `work` gives while the network has the weights θ, and buffers of its own.

        The backward pass belongs inside: activation checkpointing runs parts of the network again there.
        """
        others = {name: t for name, t in theta.items() if not isinstance(t, nn.Parameter)}
        if not moving:
            others |= {name: self._cast(buffer).clone() for name, buffer in self.model.named_buffers()}
        with rng.restored(self.forward.device), self._in_mode():
            if not others:
                return work()
            return functional_call(_Holder(self.model), {f"model.{name}": t for name, t in others.items()}, (work,))

    @contextmanager
    def _in_mode(self) -> Iterator[None]:
        if self.mode is None:
            yield
            return
        with modes_kept(self.model):
            if self.mode == Mode.eval:
                self.model.eval()
            else:
                self.interventions.train(self.model, self.epoch)
            for module in self.model.modules() if self.mode == Mode.frozen else ():
                if isinstance(module, NormBase) and module.track_running_stats:
                    module.eval()
            yield

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor

    def _nothing(self) -> Tensor:
        return torch.zeros((), dtype=self.dtype or torch.float32, device=self.forward.device)

    def _of_all(self, tensors: list[Tensor]) -> list[Tensor]:
        self.ranks.sum_(tensors)
        return tensors


class Hessian:
    """v -> H·v at the weights where the objective stood, and `gradient` there.

    Where those are the network's own, they may not change meanwhile: autograd refuses a product after an update.
    """

    def __init__(self, objective: Objective):
        self._objective = objective
        self._theta, self._own = objective._leaves()
        self._slopes: list[tuple[Tensor, ...]] = []

        def work() -> None:
            for total, _, _ in objective._terms(self._theta):
                slopes = torch.autograd.grad(total, self._own, create_graph=True, materialize_grads=True)
                self._slopes.append(slopes)

        with torch.enable_grad():
            objective._placed(self._theta, work)
        self.gradient = self._summed([[s.detach() for s in slopes] for slopes in self._slopes])

    def __call__(self, vector: Sequence[Tensor]) -> list[Tensor]:
        along = _like(vector, self._own)

        def work() -> list[list[Tensor]]:
            return [measure.hessian_vector_products(slopes, self._own, along) for slopes in self._slopes]

        return self._summed(self._objective._placed(self._theta, work))

    def _summed(self, parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        total = [torch.zeros_like(leaf) for leaf in self._own]
        for part in parts:
            foreach_add_(total, list(part))
        return self._objective._of_all(total)


class _Holder(nn.Module):
    """Lets `functional_call` hold a network's other tensors for as long as something runs, not for a forward alone."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Result]) -> Result:
        return work()


def _like(vector: Sequence[Tensor], own: Sequence[Tensor]) -> list[Tensor]:
    return [part.detach().to(leaf) for part, leaf in zip(vector, own, strict=True)]
