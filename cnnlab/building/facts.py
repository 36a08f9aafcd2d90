"""What a run is made of, in a few lines for the person who started it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cnnlab.augment import Pipeline
from cnnlab.machine.device import Placement
from cnnlab.optim.traits import Traits
from cnnlab.train.run import Run

NAMED = 5
"""Classes that are named; of more, the others are counted."""


def facts(run: Run, placement: Placement, pipeline: Pipeline, traits: Traits) -> dict[str, str]:
    """A line each on the model, the data and its way to the device, and how a step is taken."""
    parameters = f"{sum(p.numel() for p in run.model.parameters()):,} parameters"
    if still := sum(p.numel() for p in run.model.parameters() if not p.requires_grad):
        parameters += f", {still:,} of them frozen"
    splits = {name: run.loaders[name].split for name in ("train", "val", "test")}
    sizes = ", ".join(f"{name} {len(split):,}" for name, split in splits.items())
    pixels = "x".join(map(str, (run.spec.channels, *run.spec.size)))
    ranks = f", {run.ranks.world} processes" if run.ranks.world > 1 else ""
    accumulate = f", {run.step.accumulate} micro-batches" if run.step.accumulate > 1 else ""
    layout = placement.layout.value.replace("_", "-")
    return {
        "model": "; ".join([f"{_part(run, 'model')}, {parameters}", *getattr(run.model, "notes", [])]),
        "data": f"{_part(run, 'data')}, {pixels}{_stored(run)}: {sizes}",
        "classes": classes_in_words(
            run.task.class_names(run.spec), run.task.class_counts(run.spec, splits["train"].labels)
        ),
        "data path": run.loaders["train"].route(),
        "input": pipeline.describe(),
        "device": f"{_device_name(placement.device)}{ranks}",
        "step": f"{run.step.name}, {placement.precision.value}, {layout}{accumulate}, "
        f"{_optimizer_name(run.optimizer)}{_waits(run, placement, traits)}",
    }


def classes_in_words(names: Sequence[str], counts: Tensor | None) -> str:
    """What there is to tell apart, and how many training images there are of each: `cat 42, dog 40`, or
    `10 (airplane, ..., deer, ...), 4,900 training images each`.

    Args:
        counts: (classes,) training images of each, or `None` where images have no label.
    """
    each = None if counts is None else counts.tolist()
    if len(names) <= NAMED:
        return ", ".join(names if each is None else [f"{name} {n:,}" for name, n in zip(names, each, strict=True)])
    words = f"{len(names)} ({', '.join(names[:NAMED])}, ...)"
    if each is None:
        return words
    least, most = min(each), max(each)
    return f"{words}, {f'{most:,}' if least == most else f'{least:,} to {most:,}'} training images each"


def unseen_classes(names: Sequence[str], counts: Tensor | None) -> list[str]:
    """A notice where the training set lacks classes.

    Args:
        counts: (classes,) training images of each, or `None` where images have no label.
    """
    unseen = [] if counts is None else [name for name, n in zip(names, counts.tolist(), strict=True) if n == 0]
    if not unseen:
        return []
    more = f" and {len(unseen) - NAMED} more" if len(unseen) > NAMED else ""
    return [f"data: no training image of {', '.join(unseen[:NAMED])}{more}, which the network cannot learn"]


def weighed_classes(names: Sequence[str], counts: Tensor, masks: int) -> list[str]:
    """A notice of what balanced class weights were taken from.

    Args:
        counts: (classes,) pixels of each.
        masks: that were counted.
    """
    present = [(int(n), name) for name, n in zip(names, counts.tolist(), strict=True) if n]
    if not present:
        return []
    total = sum(n for n, _ in present)
    (least, rare), (most, frequent) = min(present), max(present)
    return [
        f"loss: classes are weighted by their pixels, {total:,} in {masks:,} training masks: from {frequent} "
        f"({most / total:.1%}, weight {total / len(present) / most:.2g}) to {rare} ({least / total:.1%}, weight "
        f"{total / len(present) / least:.2g})"
    ]


def _stored(run: Run) -> str:
    """A word where training photos are stored whole."""
    stored = run.loaders["train"].split.stored
    return "" if stored is None else f" of photos stored whole at {stored[0]}x{stored[1]}"


def _part(run: Run, group: str) -> str:
    return run.experiment.node(group).name.rpartition(".")[2]


def _optimizer_name(optimizer: torch.optim.Optimizer) -> str:
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return f"{'fused ' if fused else ''}{type(optimizer).__name__}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"cpu ({threads} thread{'s' if threads > 1 else ''})"
    return str(device)


def _waits(run: Run, placement: Placement, traits: Traits) -> str:
    """A word where every step waits for the GPU."""
    if placement.device.type != "cuda":
        return ""
    fused = all(group.get("fused") for group in run.optimizer.param_groups)
    return ", syncs" if traits.closure or (run.step.scaler is not None and not fused) else ""
