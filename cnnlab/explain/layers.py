"""The layers whose maps are explained: found by what they give, and kept while the network runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import dropout, pooling

from cnnlab.errors import UsageError, did_you_mean
from cnnlab.explain.subject import Subject
from cnnlab.protocols import ConvNet

FINE = 7
"""Cells a side of the maps that Grad-CAM's paper shows at 224 pixels in ResNets; below it the stage before is shown,
too."""
_NO_MAPS_OF_THEIR_OWN = (
    *(nn.Identity, nn.Flatten, nn.Upsample),
    *(dropout._DropoutNd, pooling._MaxPoolNd, pooling._AvgPoolNd),
    *(pooling._AdaptiveAvgPoolNd, pooling._AdaptiveMaxPoolNd),
)
"""They only thin out or hand on what a convolution found."""


@dataclass
class _Seen:
    """The maps that modules gave in one pass, in the order in which the modules ended."""

    shape: tuple[int, int]
    found: list[tuple[str, tuple[int, int], int]] = field(default_factory=list)
    """Name, (height, width), and which tensor it was."""
    passed_on: set[int] = field(default_factory=set)
    tensors: list[Tensor] = field(default_factory=list)
    """Kept, so that no two have one id."""

    def note(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or output.ndim != 4 or not name:
            return
        self.tensors.append(output)
        if isinstance(module, _NO_MAPS_OF_THEIR_OWN) and not any(output is given for given in args):
            self.passed_on.add(id(output))
        height, width = output.shape[-2:]
        # channels-last networks have (N, H, W, C) inside: no map has other proportions than the image
        proportioned = abs(height * self.shape[1] - width * self.shape[0]) <= max(self.shape)
        if min(height, width) > 1 and proportioned and id(output) not in self.passed_on:
            self.found.append((name, (height, width), id(output)))


def usual_layers(subject: Subject, image: Tensor) -> list[str]:
    """The layer to look at: the last one of the coarsest maps with a size above 1, poolings aside; where those have
    fewer than `FINE` cells a side, that of the next finer maps, too.

    Args:
        image: (1, C, H, W).

    Raises `UsageError` for networks without maps.
    """
    seen = _Seen((image.shape[-2], image.shape[-1]))
    with ExitStack() as stack, torch.no_grad():
        for name, module in subject.model.named_modules():
            stack.callback(module.register_forward_hook(partial(seen.note, name)).remove)
        _run(subject, image)
    if not seen.found:
        raise UsageError(
            f"{type(subject.model).__name__} has no maps over the image, which Grad-CAM and the like look at; "
            "type --methods saliency,smoothgrad"
        )
    coarsest, *finer = sorted({size for _, size, _ in seen.found}, key=lambda size: size[0] * size[1])
    chosen = [[name for name, size, _ in seen.found if size == coarsest][-1]]
    if min(coarsest) < FINE and finer:
        before = [name for name, size, _ in seen.found if size == finer[0]]
        outermost = min(name.count(".") for name in before)  # a stage, rather than what the next one begins with
        chosen.append([name for name in before if name.count(".") == outermost][-1])
    return chosen


def _run(subject: Subject, image: Tensor) -> None:
    """The network, or what lies before its decoder: the coarsest maps are the backbone's."""
    model = subject.model
    if isinstance(model, ConvNet) and model.head is not None:
        model.features(image)
    else:
        subject.outputs(image)


def layer(subject: Subject, name: str) -> nn.Module:
    """The module of that name. Raises `UsageError` where there is none."""
    modules = dict(subject.model.named_modules())
    if name not in modules or not name:
        raise UsageError(f"layer {name!r}: not in this network{did_you_mean(name, modules)}; cnnlab summary lists them")
    return modules[name]


@contextmanager
def kept(module: nn.Module) -> Iterator[list[Tensor]]:
    """Lets `module` leave its maps (N, C, h, w) in the list, one a call, each with its place in the graph.

    What follows it gets a copy, so that no operation in place (a ReLU, a sum with a shortcut) changes what is kept.
    """
    calls: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            return None
        calls.append(output if output.requires_grad else output.requires_grad_())
        return output.clone()

    handle = module.register_forward_hook(keep)
    try:
        yield calls
    finally:
        handle.remove()


def last_of(calls: list[Tensor], name: str) -> Tensor:
    """The maps of the layer's last call: a layer that is used more than once is explained where it was used last.

    Raises `UsageError` where there are none with places.
    """
    if not calls:
        raise UsageError(f"layer {name!r}: not used in evaluation, or it gives several tensors; name another --layer")
    maps = calls[-1]
    if maps.ndim != 4 or min(maps.shape[-2:]) < 2:
        raise UsageError(
            f"layer {name!r}: gives {tuple(maps.shape[1:])}, which has no places; name one that gives maps"
        )
    return maps
