"""Weights that were trained before, put into a network: what fits, what is adapted, what begins afresh."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cnnlab.building.assemble import make_finetune
from cnnlab.building.opened import Opened, open_run
from cnnlab.composing.experiment import Experiment
from cnnlab.composing.trust import Trust
from cnnlab.errors import CheckpointError
from cnnlab.init.prior import class_parameters
from cnnlab.inspect.layers import head_parameters
from cnnlab.weights import Trained, Weights

SHOWN = 4
"""Names in a line on the console before it counts the rest; `run.json` has all."""
COUNTERS = "num_batches_tracked"
"""Of norm layers; older files have none, and nothing that is computed depends on them."""


def trained_before(experiment: Experiment) -> Trained | None:
    """The weights that the experiment starts from, read; `None` where it names none.

    Raises `CheckpointError` for what cannot be had, and what `open_run` does for a run that nobody vouches for.
    """
    node = experiment.node("weights")
    opened = partial(_opened, trust=experiment.trust)
    part: Weights | None = node.make(opened=opened, model_name=experiment.node("model").get("name"))
    return None if part is None else part.read()


def _opened(folder: Path, checkpoint: str, trust: Trust) -> Opened:
    return open_run(folder, checkpoint, device="cpu", trust=trust)


def transfer(
    experiment: Experiment,
    model: nn.Module,
    found: Trained,
    classes: Sequence[str],
    image_shape: tuple[int, int, int],
) -> Transferred:
    """Puts weights into a network, in place; what they have nothing for stays as it is.

    Args:
        classes: what the network is to tell apart.
        image_shape: (C, H, W).

    Raises:
        CheckpointError: they have nothing for this network before its head.
    """
    finetune = make_finetune(experiment)
    reuses = None if finetune is None else partial(finetune.reuses, model)
    rows = class_parameters(model, image_shape, len(classes))
    return _Transfer(model, found, tuple(classes), image_shape[0], set(rows), reuses).run()


@dataclass
class Transferred:
    """What became of each tensor of a network and of the weights that were put into it."""

    source: str
    record: Mapping[str, Any]
    loaded: list[str] = field(default_factory=list)
    adapted: dict[str, str] = field(default_factory=dict)
    """How, in words."""
    fresh: dict[str, str] = field(default_factory=dict)
    """Why, in words: these are as `init` made them."""
    left_over: list[str] = field(default_factory=list)
    """By their names in the weights."""
    head: str = ""
    parameters: int = 0
    """Numbers that were taken over."""

    def lines(self) -> list[str]:
        """For the console."""
        taken, all_ = len(self.loaded) + len(self.adapted), len(self.loaded) + len(self.adapted) + len(self.fresh)
        lines = [f"weights: {taken} of {all_} tensors ({self.parameters:,} numbers) from {self.source}"]
        lines += [f"weights: {name} adapted ({how})" for name, how in self.adapted.items()]
        reasons: dict[str, list[str]] = {}
        for name, why in self.fresh.items():
            reasons.setdefault(why, []).append(name)
        lines += [f"weights: new, as init made them: {_first(names)} ({why})" for why, names in reasons.items()]
        if self.left_over:
            lines.append(f"weights: left over: {_first(self.left_over)}")
        return [*lines, f"weights: head {self.head}"]

    def as_record(self) -> dict[str, Any]:
        """For `run.json`."""
        return {
            "source": self.source,
            **self.record,
            "loaded": self.loaded,
            "adapted": self.adapted,
            "new": self.fresh,
            "left_over": self.left_over,
            "head": self.head,
        }


def _first(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"


@dataclass
class _Transfer:
    model: nn.Module
    found: Trained
    classes: tuple[str, ...]
    channels: int
    rows: set[str]
    """The parameters with a row for each class."""
    reuses: Callable[[str], bool] | None

    def run(self) -> Transferred:
        told = Transferred(self.found.source, self.found.record)
        own, head = self.model.state_dict(), head_parameters(self.model)
        names = aligned(list(self.found.state), list(own))
        first = next((n for n, p in self.model.named_parameters() if p.ndim == 4 and p.shape[1] == self.channels), None)
        order, told.head = self.order()
        with torch.no_grad():
            for name, tensor in own.items():
                given = self.found.state.get(names.get(name, ""))
                taken, words = self.taken(name, tensor, given, name == first, order, name in head)
                if taken is not None:
                    tensor.copy_(taken)
                if name.endswith(COUNTERS):
                    continue
                if taken is None:
                    told.fresh[name] = words
                    continue
                told.parameters += taken.numel()
                if words:
                    told.adapted[name] = words
                else:
                    told.loaded.append(name)
        used = {names[name] for name in (*told.loaded, *told.adapted)}
        told.left_over = [name for name in self.found.state if name not in used and not name.endswith(COUNTERS)]
        if not any(name not in head for name in (*told.loaded, *told.adapted)):
            raise CheckpointError(
                f"weights: {self.found.source} has nothing for this network before its head: its tensors are named "
                f"{_first(list(self.found.state))}, and the network's {_first(list(own))}; type the model that they "
                "are of, or weights=none"
            )
        if not any(name in head for name in (*told.loaded, *told.adapted)):
            why = dict.fromkeys(words for name, words in told.fresh.items() if name in head)
            told.head = f"new ({self.why_new() or '; '.join(why) or 'the network names none'})"
        return told

    def why_new(self) -> str:
        """Why the classes' rows cannot be taken over; the empty text where they can."""
        theirs = self.found.classes
        if theirs is None or (len(theirs) == len(self.classes) and set(theirs) == set(self.classes)):
            return ""
        return f"other classes: {len(theirs)} ({_first(theirs)}), and here {len(self.classes)} ({_first(self.classes)})"

    def order(self) -> tuple[list[int] | None, str]:
        """The weights' rows in this data's order, `None` where they stay as they are; and the head in words."""
        theirs = self.found.classes
        if theirs is None:
            return None, "kept; its classes have no names, and are taken to be these in this order"
        if self.why_new():
            return None, "kept but for its last layer"
        if theirs == self.classes:
            return None, "kept, as the classes are the same"
        return [theirs.index(name) for name in self.classes], "kept, its rows in the order of the classes here"

    def taken(
        self,
        name: str,
        own: Tensor,
        given: Tensor | None,
        is_first: bool,
        order: list[int] | None,
        in_head: bool,
    ) -> tuple[Tensor | None, str]:
        """What a tensor of the network becomes, and how it was adapted; or `None`, and why."""
        if self.reuses is not None and not self.reuses(name):
            return None, "not reused"
        if in_head and self.why_new() and (name in self.rows or not self.rows):
            return None, "other classes"
        if given is None:
            return None, "the weights have none"
        if is_first and given.ndim == 4 and given.shape[1] != own.shape[1]:
            adapted = to_channels(given, own.shape[1])
            if adapted.shape == own.shape:
                return adapted, f"{given.shape[1]} -> {own.shape[1]} channels"
        if given.shape != own.shape:
            return None, f"{_shape(given)} in the weights, {_shape(own)} here"
        if in_head and order is not None and not self.rows:
            return None, "its classes are in another order"
        if name in self.rows and order is not None:
            return given[order], "rows in another order"
        return given, ""


def to_channels(weight: Tensor, channels: int) -> Tensor:
    """The first convolution (O, C, h, w) for images of other channels: for one, the sum over channels, which is what a
    grey image in each of them gives; for others, the channels in turn, scaled by C / `channels`, so that equal
    channels give what they gave."""
    if channels == 1:
        return weight.sum(1, keepdim=True)
    count = weight.shape[1]
    repeated = weight.repeat(1, -(-channels // count), 1, 1)[:, :channels]
    return repeated * (count / channels)


def aligned(theirs: Sequence[str], own: Sequence[str]) -> dict[str, str]:
    """Names of the network to those of the weights: equal, or equal but for what a wrapper puts before them (`module.`,
    `network.`, `_orig_mod.`, `backbone.`), on either side; the pair of prefixes under which most names meet."""
    wanted = set(own)
    best: dict[str, str] = {}
    for strip in _prefixes(theirs):
        bare = {name.removeprefix(strip): name for name in theirs if name.startswith(strip)}
        for add in _prefixes(own):
            met = {add + name: full for name, full in bare.items() if add + name in wanted}
            if len(met) > len(best):
                best = met
    return best


def _prefixes(names: Sequence[str]) -> Iterator[str]:
    """None, and the first one or two components of names."""
    found = {""}
    for name in names:
        parts = name.split(".")
        found |= {".".join(parts[:depth]) + "." for depth in (1, 2) if len(parts) > depth}
    return iter(sorted(found, key=lambda prefix: (prefix.count("."), prefix)))


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
