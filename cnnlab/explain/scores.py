"""What a map explains: one number of the network's answer to each image, before softmax or argmax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cnnlab.errors import UsageError, did_you_mean, short
from cnnlab.explain.subject import Subject
from cnnlab.protocols import Outputs

REGIONS = ("predicted", "all")
SIDES = ("x1", "y1", "x2", "y2")
_BACKGROUND = ("background", "unlabelled", "unlabeled", "void", "other")
"""Mask classes that are named by nobody's question."""


@dataclass(frozen=True)
class Score:
    """A number for each of N images: the logit of a class, its mean over a region of the mask, or a box's coordinate.

    The mean over a region gives the map of the sum (Vinogradova et al. 2020, Seg-Grad-CAM), but for a factor.
    """

    output: str
    """Of the network: `logits`, `mask` or `box`."""
    number: Tensor
    """(N,) int64: which class or side."""
    names: tuple[str, ...]
    """What it is called, an image each."""
    region: Tensor | None = None
    """(N, H, W) bool, of a mask."""

    def of(self, outputs: Outputs, number: Tensor | None = None, region: Tensor | None = None) -> Tensor:
        """(N,) with its graph; `number` and `region` for batches that repeat the images."""
        number = self.number if number is None else number
        region = self.region if region is None else region
        values = outputs[self.output]
        if region is None:
            return values.gather(1, number[:, None])[:, 0]
        return _over(values, number, region)

    def probability(self, outputs: Outputs) -> Tensor | None:
        """(N,) of the class under a softmax, its mean over the region; `None` for a box."""
        if self.output == "box":
            return None
        likely = outputs[self.output].softmax(1)
        if self.region is None:
            return likely.gather(1, self.number[:, None])[:, 0]
        return _over(likely, self.number, self.region)

    def ranked(self, subject: Subject, outputs: Outputs, rank: int) -> Score:
        """The logit of each image's class of that rank, 0 the highest. Raises `UsageError` for masks."""
        if self.output != "logits":
            raise UsageError(f"top{rank + 1}: is of the classes of an image; type the class that you mean")
        number = outputs["logits"].argsort(stable=True, dim=1, descending=True)[:, rank]
        return Score("logits", number, tuple(subject.classes[i] for i in number.tolist()))

    def part(self, where: slice) -> Score:
        region = None if self.region is None else self.region[where]
        return Score(self.output, self.number[where], self.names[where], region)


def _over(values: Tensor, number: Tensor, region: Tensor) -> Tensor:
    """(N,): the mean of each image's class (N,) of (N, classes, H, W) over its region (N, H, W)."""
    one = values[torch.arange(len(values), device=values.device), number]
    weight = region.to(one.dtype)
    return (one * weight).sum((1, 2)) / weight.sum((1, 2)).clamp_min(1)


def score_of(
    subject: Subject,
    outputs: Outputs,
    target: str = "predicted",
    *,
    truth: dict[str, Tensor] | None = None,
    region: str = REGIONS[0],
) -> Score:
    """The score that `target` names.

    Args:
        outputs: of the images, as the network gives them.
        target: `predicted`, `true` (needs `truth`), a class by name, or `box:x1` (`y1`, `x2`, `y2`).
        truth: `label` (N,) or `mask` (N, H, W), where they are known.
        region: of a mask: `predicted` (the pixels that the network gives to the class; all where there are none) or
            `all`.

    Raises `UsageError` for a target that this network has not.
    """
    count = len(next(iter(outputs.values())))
    kind = next((name for name in ("logits", "mask") if name in subject.task.reads), None)
    if target.startswith("box:"):
        return _side(outputs, target, count)
    if kind is None:
        raise UsageError(f"{type(subject.task).__name__} reads no logits and no mask, so there is no class to explain")
    answers = outputs[kind].detach()
    number = _numbers(subject, answers, target, truth, kind)
    names = tuple(subject.classes[i] for i in number.tolist())
    if kind == "logits":
        return Score(kind, number, names)
    inside = answers.argmax(1) == number[:, None, None]
    empty = ~inside.flatten(1).any(1)
    inside = inside | empty[:, None, None] if region == "predicted" else torch.ones_like(inside)
    return Score(kind, number, names, inside)


def _side(outputs: Outputs, target: str, count: int) -> Score:
    side = target.removeprefix("box:")
    if "box" not in outputs:
        raise UsageError(f"`{target}`: this network gives no box; type a class, or `predicted`")
    if side not in SIDES:
        raise UsageError(f"`{target}`: expected box:{', box:'.join(SIDES)}")
    number = torch.full((count,), SIDES.index(side), device=outputs["box"].device)
    return Score("box", number, (target,) * count)


def _numbers(subject: Subject, answers: Tensor, target: str, truth: dict[str, Tensor] | None, kind: str) -> Tensor:
    classes = subject.classes
    if target in classes:
        return torch.full((len(answers),), classes.index(target), device=answers.device)
    if target == "predicted":
        return answers.argmax(1) if kind == "logits" else _largest(answers.argmax(1), classes)
    if target == "true":
        known = (truth or {}).get("label" if kind == "logits" else "mask")
        if known is None:
            raise UsageError("`true`: the class of these images is not known; type a class, or `predicted`")
        known = known.to(answers.device)
        if kind == "mask":
            return _largest(known, classes)
        return known if known.ndim == 1 else known.argmax(1)
    raise UsageError(
        f"target {target!r}: expected `predicted`, `true`, box:x1 and the like, or a class of the network "
        f"({short(', '.join(classes))}){did_you_mean(target, [*classes, 'predicted', 'true'])}"
    )


def _largest(mask: Tensor, classes: Sequence[str]) -> Tensor:
    """(N,): the class of the most pixels of (N, H, W) that is no background; the background where nothing else is."""
    counts = torch.stack([(mask == number).flatten(1).sum(1) for number in range(len(classes))], 1)
    behind = torch.tensor([name.lower() in _BACKGROUND for name in classes], device=counts.device)
    alone = (counts * ~behind).sum(1, keepdim=True) == 0
    return torch.where(behind & ~alone, -1, counts).argmax(1)
