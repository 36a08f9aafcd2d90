"""What is explained: images of the run's data or of the user's own, and what becomes of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cnnlab.errors import UsageError
from cnnlab.explain.methods import explain
from cnnlab.explain.pictures import Row, page
from cnnlab.explain.scores import REGIONS, score_of
from cnnlab.explain.subject import Subject
from cnnlab.machine.device import give_back
from cnnlab.machine.memory import is_out_of_memory

_log = logging.getLogger(__name__)
AT_ONCE = 32


@dataclass
class Examples:
    """N images, and what is known of them."""

    names: list[str]
    prepared: Tensor
    """(N, C, H, W) as the network gets them."""
    shown: Tensor
    """(N, C, H, W) as people see them: uint8, or of any range."""
    truth: dict[str, Tensor] = field(default_factory=dict)
    """`label`, `mask`, where they are known."""

    def some(self, first: int, count: int) -> Examples:
        part = slice(first, first + count)
        truth = {name: value[part] for name, value in self.truth.items()}
        return Examples(self.names[part], self.prepared[part], self.shown[part], truth)


@dataclass
class Explained:
    """One image: its picture (3, H, W) uint8, and what stands on it, a record each map."""

    name: str
    picture: Tensor
    records: list[dict[str, Any]]


def explained(
    subject: Subject,
    examples: Examples,
    targets: Sequence[str],
    methods: Sequence[str],
    layers: Sequence[str] = (),
    *,
    region: str = REGIONS[0],
    verdicts: dict[str, str] | None = None,
) -> Iterator[Explained]:
    """Each image with its maps; where memory ends, fewer images at once, which is said.

    Args:
        targets: see `score_of`; `topK` stands for the K classes with the highest logits.
        verdicts: what is said below the maps, by their title.
    """
    first, at_once = 0, AT_ONCE
    while first < len(examples.names):
        piece = examples.some(first, at_once)
        try:
            found = list(_piece(subject, piece, targets, methods, layers, region, verdicts or {}))
        except Exception as error:
            if not is_out_of_memory(error) or len(piece.names) == 1:
                raise
            found, at_once = [], len(piece.names) // 2
        if found:
            first += len(found)
            yield from found
            continue
        del piece  # only here, where the error is gone, is there room again
        give_back(examples.prepared.device)
        _log.warning("out of memory: %d images are explained at once from here on", at_once)


def _piece(
    subject: Subject,
    examples: Examples,
    targets: Sequence[str],
    methods: Sequence[str],
    layers: Sequence[str],
    region: str,
    verdicts: dict[str, str],
) -> Iterator[Explained]:
    with subject.undisturbed(), torch.no_grad():
        outputs = subject.outputs(examples.prepared)
    rows: list[list[Row]] = [[] for _ in examples.names]
    for target in _spread(subject, targets):
        name, rank = target
        score = score_of(subject, outputs, name, truth=examples.truth, region=region)
        score = score if rank is None else score.ranked(subject, outputs, rank)
        values, likely = score.of(outputs), score.probability(outputs)
        maps = explain(subject, examples.prepared, score, methods, layers)
        for at, own in enumerate(rows):
            chance = None if likely is None else likely[at].item()
            said = [verdicts.get(found.title, "") for found in maps]
            own.append(Row(score.names[at], values[at].item(), chance, [(found, at) for found in maps], said))
    for at, (name, own) in enumerate(zip(examples.names, rows)):
        about = [name, *_known(subject, examples, at)]
        yield Explained(name, page(examples.shown[at], own, about), [r for row in own for r in _records(row)])


def _spread(subject: Subject, targets: Sequence[str]) -> Iterator[tuple[str, int | None]]:
    for target in targets:
        count = target.removeprefix("top")
        if target in subject.classes or not (target.startswith("top") and count.isdecimal()):
            yield target, None
            continue
        if not 1 <= int(count) <= len(subject.classes):
            raise UsageError(f"`{target}`: expected top1 to top{len(subject.classes)}, as many as there are classes")
        yield from (("predicted", rank) for rank in range(int(count)))


def _known(subject: Subject, examples: Examples, at: int) -> list[str]:
    label = examples.truth.get("label")
    if label is None or label.ndim > 1:
        return []
    return [f"is {subject.spec.classes[int(label[at])]}"]


def _records(row: Row) -> Iterator[dict[str, Any]]:
    for (found, at), verdict in zip(row.maps, row.verdicts, strict=True):
        values = found.values[at]
        yield {
            "target": row.target,
            "score": row.score,
            "probability": row.probability,
            "method": found.method,
            "layer": found.layer,
            "evidence": found.evidence[at] or "some",
            "maximum": values.max().item(),
            "minimum": values.min().item(),
            "trust": verdict or None,
        }
