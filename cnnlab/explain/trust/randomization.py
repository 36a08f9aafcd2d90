"""Randomization: does a map change when the network forgets what it has learned?

The plain test (Adebayo et al. 2018) randomizes from the top and compares by SSIM or rank correlation: the order keeps
what the lower layers know, and noise in a map makes any two look different. Here, after Hedström et al. 2023 (arXiv
2401.06465), maps are denoised first (smooth MPRT), layers are randomized from the bottom, and beside it the rise of the
map's complexity is measured, which compares no two maps (efficient MPRT).

A correlation is still no verdict: maps of any two images have something in common (borders, the middle), and a map that
is all noise is unlike everything. So the correlation with the shuffled network's map of the same image is held against
that with its maps of other images, and against the map's own reliability under other noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cnnlab import rng
from cnnlab.explain.methods import METHODS, map_of
from cnnlab.explain.scores import Score
from cnnlab.explain.subject import Subject
from cnnlab.explain.trust.statistics import Estimate, entropy, estimate, spearman

NOISE = 0.1
"""Standard deviation of the noise that maps are averaged over, as a part of the image's range; the paper's."""
SAMPLES = 4
"""Noisy images a map."""
SHUFFLES = 5
"""Networks that have forgotten."""
TOLERANCE = 0.05
"""Of a rank correlation: less is not worth a verdict."""
_MANY = 10
"""Passes a map: methods that take more average by themselves, and get `_FEW`: samples, shuffles, images."""
_FEW = (2, 3, 8)
_APART = 3
"""Other images that one is compared with."""


@dataclass
class Randomized:
    """Rank correlations of denoised maps, of N images (N,) or of S shuffles (S,)."""

    reliability: Tensor
    """(N,) of the map with itself under other noise: the most that a correlation can be."""
    common: Tensor
    """(N,) with the same network's maps of other images: what its maps have in common."""
    similarity: Tensor
    """(S, N) with the map of the network whose weights are shuffled."""
    elsewhere: Tensor
    """(S, N) with that network's maps of other images."""
    halfway: Tensor
    """(N,) with the map of the network whose lower half is shuffled; NaN where it was not asked."""
    rise: Tensor
    """(S, N) of the map's complexity from the trained network to the shuffled one, relative to the former (efficient
    MPRT)."""

    @property
    def score(self) -> Tensor:
        """(N,) in [0, 1], higher is better: the part of what a map reproducibly shows of its image that goes with the
        weights; 0 for what knows the image alone, and for what shows nothing of it."""
        elsewhere = self.elsewhere.nanmean(0)
        shown = self.reliability - elsewhere
        lost = self.reliability - self.similarity.nanmean(0)
        share = (lost / torch.where(shown > 0, shown, 1)).clamp(0, 1)
        return torch.where(shown.isfinite() & lost.isfinite(), torch.where(shown > 0, share, 0), torch.nan)

    @property
    def shown(self) -> Estimate:
        """How much more a map is like itself than like the same network's maps of other images."""
        return estimate(self.reliability - self.common)

    @property
    def remaining(self) -> Estimate:
        """How much more a map is like the shuffled networks' maps of its image than like those of other images: what
        the image shows without the weights. The interval is over shuffles."""
        return estimate((self.similarity - self.elsewhere).nanmean(1))

    @property
    def passes(self) -> bool:
        """It shows something of its image, and is not found to show it without the weights."""
        return self.shown.low > 0 and not self.remaining.low > TOLERANCE

    def document(self) -> dict[str, Any]:
        remaining = self.remaining
        return {
            "reliability": estimate(self.reliability).mean,
            "common": estimate(self.common).mean,
            "similarity": estimate(self.similarity.nanmean(0)).mean,
            "elsewhere": estimate(self.elsewhere.nanmean(0)).mean,
            "remaining": {"mean": remaining.mean, "low": remaining.low, "high": remaining.high},
            "halfway": estimate(self.halfway).mean,
            "complexity_rise": estimate(self.rise.nanmean(1)).mean,
        }


def randomized(subject: Subject, images: Tensor, score: Score, name: str, layer: str = "") -> Randomized:
    """How the maps of a method change when the weights are shuffled; call it inside `Subject.undisturbed`.

    Args:
        images: (N, C, H, W) with N of 2 or more; of methods that take many passes, the first ones alone are used.
    """
    many = METHODS[name].passes > _MANY
    samples, shuffles, most = _FEW if many else (SAMPLES, SHUFFLES, len(images))
    images, score = images[:most], score.part(slice(most))

    def maps() -> Tensor:
        return torch.stack([map_of(subject, noisy, score, name, layer).values for noisy in _noisy(images, samples)])

    own = maps()
    whole = own.mean(0)
    before = entropy(whole)
    similarity, elsewhere, rise = [], [], []
    for number in range(shuffles):
        with shuffled(subject, images[:1], 1.0, number):
            other = maps().mean(0)
        similarity.append(_correlation(whole, other))
        elsewhere.append(_with_others(whole, other))
        rise.append((entropy(other) - before) / before)
    halfway = torch.full((len(images),), torch.nan)
    if not many:
        with shuffled(subject, images[:1], 0.5, 0):
            halfway = _correlation(whole, maps().mean(0))
    half = samples // 2
    return Randomized(
        reliability=_stepped_up(_correlation(own[:half].mean(0), own[half:].mean(0))),
        common=_with_others(whole, whole),
        similarity=torch.stack(similarity),
        elsewhere=torch.stack(elsewhere),
        halfway=halfway,
        rise=torch.stack(rise),
    )


def _with_others(left: Tensor, right: Tensor) -> Tensor:
    """(N,): the mean correlation of a map with those of the next images."""
    apart = range(1, min(_APART, len(left) - 1) + 1)
    return torch.stack([_correlation(left, right.roll(step, 0)) for step in apart]).nanmean(0)


def _correlation(left: Tensor, right: Tensor) -> Tensor:
    return spearman(left.flatten(1), right.flatten(1))


def _stepped_up(half: Tensor) -> Tensor:
    """The correlation of two means of all samples, from that of two means of half of them (Spearman-Brown)."""
    return 2 * half / (1 + half).clamp_min(1e-6)


def _noisy(images: Tensor, count: int) -> Iterator[Tensor]:
    """The images with noise that is a function of its number alone."""
    flat = images.flatten(1)
    spread = NOISE * (flat.amax(1) - flat.amin(1))
    for number in range(count):
        drawn = torch.randn(images.shape[1:], generator=rng.generator(0, "explain/denoise", number))
        yield images + spread[:, None, None, None] * drawn.to(images)


# ---- the network that has forgotten ----


@contextmanager
def shuffled(subject: Subject, image: Tensor, portion: float = 1.0, seed: int = 0) -> Iterator[None]:
    """For the block, each tensor of the first layers (that portion of them, in the order in which they compute) has its
    elements in random order; afterwards they are what they were, bit for bit.

    Shuffled weights have the distribution of those that were learned, so that no activation dies or explodes; and any
    layer can be shuffled, whatever its constructor is. A norm's scales, shifts and moments keep together.

    Args:
        image: (1, C, H, W), to see the order.
    """
    layers = _in_order(subject, image)
    chosen = layers[: max(1, round(portion * len(layers)))]
    tensors = [tensor for module in chosen for tensor in _own(module)]
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        with torch.no_grad():
            for number, module in enumerate(chosen):
                _shuffle(_own(module), seed, number)
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before):
                tensor.copy_(value)


def _in_order(subject: Subject, image: Tensor) -> list[nn.Module]:
    """The modules with tensors of their own, in the order of their first call; those without a call at the end."""
    called: list[nn.Module] = []

    def note(module: nn.Module, args: Any) -> None:
        if module not in called:
            called.append(module)

    with ExitStack() as stack, torch.no_grad():
        for module in subject.model.modules():
            stack.callback(module.register_forward_pre_hook(note).remove)
        subject.outputs(image)
    rest = [module for module in subject.model.modules() if module not in called]
    seen: set[int] = set()
    found = []
    for module in (*called, *rest):
        own = [tensor for tensor in _own(module) if id(tensor) not in seen]
        seen.update(map(id, own))
        if own:
            found.append(module)
    return found


def _own(module: nn.Module) -> list[Tensor]:
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel() > 1]


def _shuffle(tensors: Sequence[Tensor], seed: int, number: int) -> None:
    together: dict[int, Tensor] = {}
    for place, tensor in enumerate(tensors):
        count = tensor.numel()
        if tensor.ndim == 1 and count in together:
            order = together[count]
        else:
            order = torch.randperm(count, generator=rng.generator(seed, "explain/shuffle", number, place))
        if tensor.ndim == 1:
            together[count] = order
        tensor.copy_(tensor.flatten()[order.to(tensor.device)].view_as(tensor))
