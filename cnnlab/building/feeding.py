"""What a run's loop is fed with: a loader a split, each batch augmented and as the task prepares it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from cnnlab.augment import Pipeline
from cnnlab.data.loader import Loader
from cnnlab.errors import UsageError
from cnnlab.machine.device import Placement
from cnnlab.machine.ranks import Ranks
from cnnlab.protocols import Batch, Split
from cnnlab.schema import Layout, Loading, Trainer
from cnnlab.tasks import Task
from cnnlab.torch_private import BatchNorm

MIN_STATISTICS_BATCH = 2
"""Samples that batch statistics need; an epoch's last batch with fewer is left out."""
MIN_EVALUATION_BATCH = 256
"""Samples of an evaluation's batch where nobody says; it keeps no graph, and has room for more than an update."""


def make_loaders(
    splits: Mapping[str, Split],
    pipeline: Pipeline,
    task: Task,
    model: nn.Module,
    trainer: Trainer,
    loading: Loading,
    placement: Placement,
    ranks: Ranks,
    seed: int,
    views: int | None = None,
) -> tuple[dict[str, Loader], list[str]]:
    """The loaders by split, and what of the data is left out, in words.

    Args:
        views: fixed augmented views of each training image, in turn; `None` for a new one in every epoch.

    Raises `UsageError` for a batch of fewer samples than there are processes and micro-batches.
    """
    train = splits["train"]
    batch_size = min(trainer.batch_size, len(train))
    pieces = ranks.world * trainer.accumulate
    if batch_size < pieces:
        raise UsageError(
            f"expected a batch of at least {pieces} samples, one for each of {ranks.world} processes and "
            f"{trainer.accumulate} micro-batches, received {batch_size}; type a larger trainer.batch_size"
        )
    rest = len(train) % batch_size
    unfit = too_few(model, rest, pieces)
    notices = []
    if unfit and not trainer.drop_last:
        notices.append(
            f"data: an epoch's last batch would have {rest} sample{'s' * (rest > 1)}, too few for batch "
            "statistics; it is left out"
        )
    common: dict[str, Any] = {
        "seed": seed,
        "rank": ranks.rank,
        "world": ranks.world,
        "device": placement.device,
        "loading": loading,
        "targets": task.needs,
    }
    evaluation = trainer.eval_batch_size or max(trainer.batch_size, MIN_EVALUATION_BATCH)
    unshuffled = {"shuffle": False, "transform": _transform(pipeline, task, placement), **common}
    loaders = {
        name: Loader(split, min(evaluation, len(split)), **unshuffled)
        for name, split in splits.items()
        if name != "train"
    }
    loaders["train"] = Loader(
        train,
        batch_size,
        shuffle=True,
        drop_last=trainer.drop_last or unfit,
        transform=_transform(pipeline, task, placement, train=True, views=views),
        neighbours=pipeline.neighbours,
        **common,
    )
    return loaders, notices


def too_few(model: nn.Module, samples: int, pieces: int) -> bool:
    """Whether an epoch's last batch, cut into `pieces`, has too few samples for the network's batch statistics."""
    return 0 < samples < MIN_STATISTICS_BATCH * pieces and any(isinstance(m, BatchNorm) for m in model.modules())


def _transform(
    pipeline: Pipeline, task: Task, placement: Placement, *, train: bool = False, views: int | None = None
) -> Callable[[Batch, int], Batch]:
    layout = memory_format(placement.layout)

    def apply(batch: Batch, epoch: int) -> Batch:
        seen = epoch if views is None else epoch % views
        batch = task.prepare(pipeline(batch, epoch=seen, train=train))
        return {**batch, "image": batch["image"].contiguous(memory_format=layout)}

    return apply


def memory_format(layout: Layout) -> torch.memory_format:
    return torch.channels_last if layout is Layout.channels_last else torch.contiguous_format
