"""The prior that a loss wants to start from, put into the classifier's bias and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnnlab import rng
from cnnlab.init.data_driven import training_without_noise
from cnnlab.protocols import as_outputs

CLASSIFIED = ("logits", "aux", "mask")
"""The outputs that are logits of classes, of the image or of each pixel."""


def start_from(model: nn.Module, prior: Tensor, image_shape: Sequence[int]) -> list[str]:
    """Lets the logits of every output (the auxiliary one, too) begin about `prior`: sets the last bias before them.

    Which one that is follows from what the network computes, not from names or shapes: a parameter that is added to
    the logits themselves, each of its values to one class, with nothing else to learn in between. So neither a norm
    layer inside the head nor one that happens to have as many channels as there are classes is taken for it, whoever
    wrote the network. Where several such biases add up (or an average of several classifiers is the output), their
    sum gets the prior.

    Args:
        prior: (classes,) the logits to begin with (Lin et al. 2017, section 4.1: -log((1 - π)/π)).
        image_shape: (C, H, W).

    Returns:
        The names of the biases that were set; none where the last layers have no bias.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, tuple[Tensor, float]] = {}
    draws = rng.generator(0, "prior")
    with torch.enable_grad(), training_without_noise(model):
        leaf = torch.rand(2, *image_shape, generator=draws).requires_grad_()
        outputs = as_outputs(model(leaf + 0))  # a network may begin in place, which a leaf does not allow
        for output in (outputs[name] for name in CLASSIFIED if name in outputs):
            candidates = [p for p in _last_parameters(output, leaf) if id(p) in names and p.shape == prior.shape]
            if output.shape[1] != len(prior) or not candidates:
                continue
            weights = torch.rand(output.shape, generator=draws)
            gradients = torch.autograd.grad(output, candidates, weights)
            by_class = weights.transpose(0, 1).flatten(1).sum(1)
            shares = [gradient / by_class for gradient in gradients]
            added = [(p, float(s.mean())) for p, s in zip(candidates, shares, strict=True) if _is_added(s)]
            total = sum(share for _, share in added)
            found |= {names[id(p)]: (p, total) for p, _ in added}
    with torch.no_grad():
        for bias, total in found.values():
            bias.copy_(prior / total)
    return list(found)


def class_parameters(model: nn.Module, image_shape: Sequence[int], classes: int) -> list[str]:
    """Names of the parameters with a row for each class: those of the last layers before the logits (of each output
    that is logits), whose first axis has as many entries as there are classes.

    Args:
        image_shape: (C, H, W).
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: list[str] = []
    with torch.enable_grad(), training_without_noise(model):
        model.requires_grad_(True)
        device = next(iter(model.parameters())).device
        leaf = torch.zeros(2, *image_shape, device=device).requires_grad_()
        outputs = as_outputs(model(leaf + 0))
        for output in (outputs[name] for name in CLASSIFIED if name in outputs):
            if output.shape[1] == classes:
                last = _last_parameters(output, leaf, behind=True)
                found += [names[id(p)] for p in last if id(p) in names and p.shape[:1] == (classes,)]
    return list(dict.fromkeys(found))


def _is_added(share: Tensor) -> bool:
    """Whether a parameter's gradient is that of a term of the logits: the same positive share of the logits' own, in
    every class. A scale's depends on what it scales."""
    return bool(share.min() > 1e-3 and torch.allclose(share, share.mean(), rtol=1e-3))


def _last_parameters(output: Tensor, image: Tensor, behind: bool = False) -> list[Tensor]:
    """The parameters that enter the graph of `output` directly, on each way back to the first operator that has any;
    with `behind` also those that come to it transposed, scaled, or made of others."""
    sees_image = _Reaches(image)
    found: dict[int, Tensor] = {}
    waiting, seen = [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        inputs = list(_inputs(node))
        learned = [before for before in inputs if not sees_image(before)]
        for before in learned:
            found |= {
                id(p): p for p in (_leaves(before) if behind else [getattr(before, "variable", None)]) if p is not None
            }
        if not learned:
            waiting += inputs
    return list(found.values())


def _leaves(node: Any) -> Iterator[Tensor]:
    """What a part of the graph begins with."""
    waiting, seen = [node], set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += _inputs(node)


class _Reaches:
    """Whether a node of the graph depends on `image`."""

    def __init__(self, image: Tensor) -> None:
        self._image = image
        self._known: dict[Any, bool] = {}

    def __call__(self, node: Any) -> bool:
        path = [node]
        while path:  # a network of a thousand layers is too deep for recursion
            top = path[-1]
            unknown = [before for before in _inputs(top) if before not in self._known]
            if top not in self._known and unknown:
                path += unknown
                continue
            is_image = getattr(top, "variable", None) is self._image
            self._known[top] = is_image or any(self._known[before] for before in _inputs(top))
            path.pop()
        return self._known[node]


def _inputs(node: Any) -> Iterator[Any]:
    return (before for before, _ in node.next_functions if before is not None)
