"""What a data set knows of its images beside what the network was trained on: where the object is, and what each part
of a scene does. Maps are measured against it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cnnlab.building.evaluation import OpenedData, loader_of
from cnnlab.building.opened import Opened
from cnnlab.explain.examples import Examples
from cnnlab.explain.scores import Score
from cnnlab.explain.trust import Known
from cnnlab.explain.trust.places import of_box
from cnnlab.protocols import VOID, Batch, Renderer

_PLACES = ("label", "mask", "box")


def batch_of(network: Opened, split: str, data: OpenedData, count: int) -> Batch:
    """`count` samples from all over a split, as the network gets them, with every target that tells where they are."""
    also = [name for name in _PLACES if name in data.whole.targets]
    return loader_of(network, split, data, also).some(count)


def examples_of(batch: Batch, split: str) -> Examples:
    """A batch of data as examples."""
    names = [f"{split} {index}" for index in batch["index"].tolist()]
    truth = {name: value for name, value in batch.items() if name in ("label", "mask")}
    return Examples(names, batch["image"], batch["image"], truth)


def known_of(network: Opened, split: str, data: OpenedData, batch: Batch, score: Score) -> Known:
    """What is known of a batch of `batch_of`, for maps of a score.

    Of a data set that renders its scenes (`cnnlab.protocols.Renderer`), the scenes without each part. The object is, in
    a mask, what has the score's class, or all that is no background where the mask has other classes than the score;
    where there is a box, its inside, if the label is the score's class. Images without it have no object.
    """
    found = Known(inside=_inside(network, data, batch, score))
    if isinstance(data.source, Renderer):
        taken = data.source.taken_apart(split, batch["index"].cpu())
        count, parts = taken.images.shape[:2]
        if tuple(taken.images.shape[2:]) == (network.spec.channels, *network.spec.size):
            prepared = network.prepared(taken.images.flatten(0, 1))
            found.without, found.visible = prepared.view(count, parts, *prepared.shape[1:]), taken.visible
            found.parts = taken.names
    return found


def _inside(network: Opened, data: OpenedData, batch: Batch, score: Score) -> Tensor | None:
    size = (batch["image"].shape[-2], batch["image"].shape[-1])
    if "mask" in batch and tuple(batch["mask"].shape[1:]) == size:
        own = "mask" in network.task.needs  # then the masks have been renumbered
        return _in_mask(batch["mask"].cpu(), network.spec.mask_classes if own else data.whole.mask_classes, score.names)
    if "box" not in batch:
        return None
    inside = of_box(batch["box"].float().cpu(), size)
    label = batch.get("label")
    if score.output == "box" or label is None or label.ndim > 1:
        return inside
    meant = torch.tensor([network.spec.classes[int(number)] == name for number, name in zip(label, score.names)])
    return inside & meant[:, None, None]


def _in_mask(mask: Tensor, classes: Sequence[str], names: Sequence[str]) -> Tensor:
    numbers = torch.tensor([classes.index(name) if name in classes else -1 for name in names])
    named = mask == numbers[:, None, None]
    anything = (mask != 0) & (mask != VOID)
    return torch.where((numbers >= 0)[:, None, None], named, anything)
