"""What training minimizes, of one micro-batch: the step runs it, the objective differentiates it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cnnlab.protocols import Batch, Outputs, Penalty, as_outputs
from cnnlab.tasks import Task
from cnnlab.train.halves import Halves

Sums = dict[str, Tensor]


class Forward:
    """A micro-batch through network, loss and measures; the part that is compiled.

    Returns the samples' losses (N,) with their graph, and the sums `count`, `data_loss` and its parts and the task's
    measures. Half-precision outputs become float32 first, so the loss is always computed there.

    Args:
        dtype: of the autocast; float32 and float64 take none.
        views: whether a network in evaluation sees the task's views of each image, rather than the image alone.
        halves: the network in halves, where batches may hold features in the place of images.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        device: torch.device,
        dtype: torch.dtype,
        *,
        views: bool = True,
        halves: Halves | None = None,
    ):
        self.model = model
        self.task = task
        self.device = device
        self.dtype = dtype
        self.views = views
        self.halves = halves

    def autocast(self) -> AbstractContextManager[Any]:
        whole = self.dtype in (torch.float32, torch.float64)
        return nullcontext() if whole else torch.autocast(self.device.type, self.dtype)

    def __call__(self, batch: Batch) -> tuple[Tensor, Sums]:
        return self.judged(self.of_batch(batch), batch)

    def judged(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Sums]:
        """What is returned of a batch, from its outputs."""
        parts = dict(self.task.loss(outputs, batch))
        losses = parts.pop("loss")
        with torch.no_grad():
            sums = {
                "count": torch.full((), float(len(losses)), device=losses.device),
                "data_loss": losses.detach().sum(),
                **{f"data_loss/{name}": part.detach().sum() for name, part in parts.items()},
                **self.task.measure({name: t.detach() for name, t in outputs.items()}, batch),
            }
        return losses, sums

    def of_batch(self, batch: Batch) -> Outputs:
        """`outputs` of a batch's images, or of the features that are in their place."""
        if self.halves is None or "image" in batch:
            return self.outputs(batch["image"])
        with self.autocast():
            return _widened(self.task.merge([(1.0, self.halves.of_batch(batch))]))

    def outputs(self, image: Tensor) -> Outputs:
        """What the task reads of the network, float32; in evaluation of the views that it wants of each image."""
        with self.autocast():
            views = [(1.0, image)] if self.model.training or not self.views else self.task.views(image)
            merged = self.task.merge([(weight, as_outputs(self.model(view))) for weight, view in views])
        return _widened(merged)


def _widened(outputs: Outputs) -> Outputs:
    return {name: t.to(torch.promote_types(t.dtype, torch.float32)) for name, t in outputs.items()}


class Penalties:
    """The penalties of a run by name, in the order in which they are added up; false where there are none."""

    def __init__(self, named: Mapping[str, Penalty] | None = None):
        self.named = dict(named or {})

    def __bool__(self) -> bool:
        return bool(self.named)

    def __call__(self, weights: Mapping[str, Tensor]) -> tuple[Tensor, Sums]:
        """Their sum with its graph, and without: `penalty`, and where there are several `penalty/NAME` of each.

        Raises `ValueError` for a penalty that gives no scalar.
        """
        terms = {name: penalty(weights) for name, penalty in self.named.items()}
        for name, term in terms.items():
            if not isinstance(term, Tensor) or term.shape != ():
                found = f"{tuple(term.shape)}" if isinstance(term, Tensor) else f"a {type(term).__name__}"
                raise ValueError(f"`penalty.{name}`: expected it to give a scalar tensor, received {found}")
        first, *others = terms.values()
        total = sum(others, first)
        parts = terms if len(terms) > 1 else {}
        return total, {"penalty": total.detach(), **{f"penalty/{name}": t.detach() for name, t in parts.items()}}


NO_PENALTIES = Penalties()


def pieces(batch: Batch, count: int) -> list[Batch]:
    """`count` micro-batches, as even as they can be; fewer where one would be empty."""
    count = min(count, len(batch["index"]))
    if count <= 1:
        return [batch] * count
    cut = {name: tensor.tensor_split(count) for name, tensor in batch.items()}
    return [{name: parts[i] for name, parts in cut.items()} for i in range(count)]


def minimized(
    forward: Callable[[Batch], tuple[Tensor, Sums]],
    piece: Batch,
    count: int,
    penalties: Penalties,
    weights: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor, Sums]:
    """A micro-batch's part of what is minimized: the sum of its losses over the `count` samples of the whole batch, and
    the penalties, where it is this part that has them.

    Returns:
        that scalar with its graph; the samples' losses (N,), detached; the sums of `Forward`, and those of `Penalties`
        times `count`.
    """
    losses, sums = forward(piece)
    total = losses.sum() / count
    if penalties:
        term, parts = penalties(weights)
        total = total + term
        sums |= {name: value * count for name, value in parts.items()}
    return total, losses.detach(), sums
