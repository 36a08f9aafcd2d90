"""What is inside a network: filters, feature maps, what a unit answers to most, and which images it takes for alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from cnnlab import rng
from cnnlab.errors import UsageError, did_you_mean, short
from cnnlab.explain.layers import kept, layer
from cnnlab.explain.maps import cpu
from cnnlab.explain.subject import Subject

STEPS = 256
"""Of the ascent."""
RATE, DECAY, BLUR = 0.08, 0.01, 0.5
"""Of a step: its size in standard deviations of the images; how far it draws towards 0; the standard deviation, in
pixels, of a blur after every fourth."""
_TRIES = 4
"""Starts, where a unit is silent at one."""
AT_ONCE = 64


# ---- filters ----


def filters(subject: Subject, name: str) -> Tensor:
    """(K, C, h, w) float32 on the CPU: the weights of a convolution; of a grouped one, C are a group's channels.

    Raises `UsageError` for layers without such.
    """
    module = layer(subject, name)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 4 or not isinstance(module, nn.Conv2d):
        known = [own for own, each in subject.model.named_modules() if isinstance(each, nn.Conv2d)]
        raise UsageError(
            f"layer {name!r}: is no convolution, so it has no filters; those are {short(', '.join(known) or 'none')}"
        )
    return cpu(weight)


# ---- what a layer gives ----


def activations(subject: Subject, images: Tensor, name: str) -> Tensor:
    """What a layer gives for images (N, C, H, W): (N, K, h, w), or (N, K), float32 on the CPU. Tokens (N, T, K) are
    places in a row.

    Raises `UsageError` where it gives something else.
    """
    module = layer(subject, name)
    with subject.undisturbed(), torch.no_grad():
        images = images.to(next((p.dtype for p in subject.model.parameters()), images.dtype))
        parts = []
        for part in images.split(AT_ONCE):
            with kept(module) as calls:
                subject.outputs(part)
            parts.append(cpu(_given(calls, name)))
    return torch.cat(parts)


def _given(calls: Sequence[Tensor], name: str) -> Tensor:
    if not calls:
        raise UsageError(f"layer {name!r}: not used in evaluation, or it gives several tensors; name another")
    found = calls[-1]
    if found.ndim == 3:
        return found.transpose(1, 2).unsqueeze(2)
    if found.ndim not in (2, 4):
        raise UsageError(f"layer {name!r}: gives {tuple(found.shape)}, expected maps (N, K, h, w) or values (N, K)")
    return found


def feature_maps(subject: Subject, images: Tensor, name: str) -> Tensor:
    """(N, K, h, w) float32 on the CPU. Raises `UsageError` for layers without maps."""
    found = activations(subject, images, name)
    if found.ndim != 4 or min(found.shape[-2:]) < 2:
        raise UsageError(f"layer {name!r}: gives {tuple(found.shape[1:])}, which has no places; name one with maps")
    return found


# ---- what a unit answers to most ----


@dataclass
class Maximized:
    """`image` (C, H, W) as the network gets it; the unit's value for it, and for the images that it is held against."""

    unit: str
    image: Tensor
    reached: float
    of_images: float
    """The highest of the images."""


def maximized(subject: Subject, images: Tensor, name: str, units: Sequence[str]) -> list[Maximized]:
    """Images that make units of a layer large: gradient ascent from faint noise on the unit's mean over its places,
    with steps of one size, under jitter, decay towards the mean image and a Gaussian blur every fourth step (Yosinski
    et al. 2015, section 4, but for its clipping; jitter: Mordvintsev et al. 2015). No value leaves the range that it
    has in `images`.

    Args:
        images: (N, C, H, W) of the data as the network gets them.
        name: a module, or `logits`.
        units: numbers of channels; of `logits`, and of a layer with a value a class, names of classes too.

    Raises `UsageError` for unknown layers and units, and units that nothing moves.
    """
    of = _values(subject, name)
    with subject.undisturbed():
        images = images.to(next((p.dtype for p in subject.model.parameters()), images.dtype)).detach()
        with torch.no_grad():
            known = torch.cat([of(part) for part in images.split(AT_ONCE)])
        numbers = [_number(subject, name, unit, known.shape[1]) for unit in units]
        found = _ascended(of, images, numbers)
        with torch.no_grad():
            reached = of(found)
    return [
        Maximized(unit, found[at].detach(), reached[at, number].item(), known[:, number].max().item())
        for at, (unit, number) in enumerate(zip(units, numbers, strict=True))
    ]


def _values(subject: Subject, name: str) -> Callable[[Tensor], Tensor]:
    """From images to (N, K): each unit's mean over its places."""
    if name == "logits":

        def logits(images: Tensor) -> Tensor:
            outputs = subject.outputs(images)
            if "logits" not in outputs:
                raise UsageError("`logits`: this network gives none; name a layer")
            return outputs["logits"]

        return logits
    module = layer(subject, name)

    def of_layer(images: Tensor) -> Tensor:
        with kept(module) as calls:
            subject.outputs(images)
        found = _given(calls, name)
        return found.mean((2, 3)) if found.ndim == 4 else found

    return of_layer


def _number(subject: Subject, name: str, unit: str, count: int) -> int:
    if unit in subject.classes and count == len(subject.classes):
        return subject.classes.index(unit)
    if unit.isdecimal() and int(unit) < count:
        return int(unit)
    classes = subject.classes if count == len(subject.classes) else ()
    also = f", or a class ({short(', '.join(classes))}){did_you_mean(unit, classes)}" if classes else ""
    raise UsageError(f"unit {unit!r} of {name!r}: expected a number from 0 to {count - 1}{also}")


def _ascended(of: Callable[[Tensor], Tensor], images: Tensor, numbers: Sequence[int]) -> Tensor:
    low, high = (images.amin((0, 2, 3))[None, :, None, None], images.amax((0, 2, 3))[None, :, None, None])
    spread = images.std().clamp_min(1e-6)
    index = torch.tensor(numbers, device=images.device)[:, None]
    x = _started(of, images, index, spread)
    height, width = images.shape[-2:]
    generator = rng.generator(0, "explain/jitter")
    for step in range(STEPS):
        down, right = (
            ((torch.rand(2, generator=generator) - 0.5) * torch.tensor([height, width]) / 4).round().int().tolist()
        )
        gradient = _gradient(of, x.roll((down, right), (2, 3)), index).roll((-down, -right), (2, 3))
        size = gradient.square().mean((1, 2, 3), keepdim=True).sqrt()
        x = (x + RATE * spread * gradient / size.clamp_min(1e-20)) * (1 - DECAY)
        if step % 4 == 3 and min(height, width) > 4 and step < STEPS - 16:
            x = _blurred(x)
        x = torch.maximum(torch.minimum(x, high), low)
    return x


def _started(of: Callable[[Tensor], Tensor], images: Tensor, index: Tensor, spread: Tensor) -> Tensor:
    """(units, C, H, W): noise, of those tried the first at which the unit moves.

    Raises `UsageError` where it never does.
    """
    shape = (len(index), *images.shape[1:])
    x = images.new_zeros(shape)
    waiting = torch.ones(len(index), dtype=torch.bool, device=images.device)
    for attempt in range(_TRIES):
        noise = torch.randn(shape[1:], generator=rng.generator(0, "explain/start", attempt)).to(images)
        x = torch.where(waiting[:, None, None, None], (0.1 + 0.3 * attempt) * spread * noise, x)
        waiting = _gradient(of, x, index).flatten(1).abs().amax(1) == 0
        if not waiting.any():
            return x
    silent = ", ".join(str(int(number)) for number in index[waiting, 0])
    raise UsageError(f"unit {silent}: no image that was tried moves it; it may be dead")


def _gradient(of: Callable[[Tensor], Tensor], x: Tensor, index: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    value = of(x).gather(1, index).sum()
    found = torch.autograd.grad(value, x, allow_unused=True)[0] if value.requires_grad else None
    return torch.zeros_like(x) if found is None else found.nan_to_num(0, 0, 0)


def _blurred(x: Tensor) -> Tensor:
    at = torch.arange(-2, 3, device=x.device, dtype=x.dtype)
    line = torch.exp(-0.5 * (at / BLUR) ** 2)
    line = line / line.sum()
    channels = x.shape[1]
    padded = functional.pad(x, (2, 2, 2, 2), mode="reflect")
    kernel = (line[:, None] * line[None, :]).expand(channels, 1, 5, 5)
    return functional.conv2d(padded, kernel, groups=channels)


# ---- which images are alike ----


def features(subject: Subject, images: Tensor, name: str) -> Tensor:
    """(N, K) of length 1 (0 where nothing answers): what a layer gives, its mean over places."""
    found = activations(subject, images, name)
    found = found.mean((2, 3)) if found.ndim == 4 else found
    return functional.normalize(found, dim=1)


def nearest(
    subject: Subject, queries: Tensor, batches: Iterator[tuple[Tensor, Tensor]], name: str, count: int
) -> tuple[Tensor, Tensor]:
    """The samples that are most like each query, by the cosine between their `features`.

    Args:
        queries: (N, C, H, W) as the network gets them.
        batches: images of the samples, and their positions (B,).

    Returns:
        (N, count) cosines and positions, the nearest first; fewer columns of fewer samples.
    """
    own = features(subject, queries, name)
    best, at = own.new_empty(len(own), 0), torch.empty(len(own), 0, dtype=torch.int64)
    for images, index in batches:
        likeness = own @ features(subject, images, name).T
        best = torch.cat([best, likeness], 1)
        at = torch.cat([at, index.cpu().expand(len(own), -1)], 1)
        order = best.sort(dim=1, descending=True, stable=True).indices[:, :count]
        best, at = best.gather(1, order), at.gather(1, order)
    return best, at
