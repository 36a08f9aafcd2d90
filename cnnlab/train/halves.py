"""A network in two halves: a backbone that stands still, and what trains on its features.

Where the backbone gives of an image the same in every epoch, it need not run in every epoch (`finetune.cache`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cnnlab import rng
from cnnlab.inspect.layers import head_modules
from cnnlab.protocols import FEATURE, Batch, ConvNet, Features, Outputs, as_outputs

CLOSE = {torch.float32: 1e-4, torch.float64: 1e-10}
"""By how much, relative to the largest value, an image's features may depend on the size of its batch (other kernels
sum in another order). Half precision: `HALF_CLOSE`."""
HALF_CLOSE = 2e-2
LEAST = 2
"""Images with which a network is tried: batch statistics need two."""


class Whole(ValueError):
    """Why a network cannot be run in halves; the message is the reason, in words that follow `as`."""


class Halves(ABC):
    """`after(before(images))` is what the network gives of the images, and `before` does not train."""

    model: nn.Module
    ran: frozenset[str] = frozenset()
    """Names of the modules that `after` runs."""

    @abstractmethod
    def before(self, image: Tensor) -> dict[str, Tensor]:
        """(N, C, H, W) -> the features by name, each with N rows."""

    @abstractmethod
    def after(self, features: Mapping[str, Tensor]) -> Outputs:
        """What the network gives of images with these features."""

    @abstractmethod
    def describe(self) -> str:
        """What the features are."""

    def of_batch(self, batch: Batch) -> Outputs:
        """What the network gives of a batch that holds features in the place of images."""
        start = len(FEATURE)
        return self.after({name[start:]: tensor for name, tensor in batch.items() if name.startswith(FEATURE)})


class AtClassifier(Halves):
    """The features are what the modules that classify are given, which follow one another; what the last one gives is
    what the network gives."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model = model
        self.names = tuple(names)
        self.modules = [model.get_submodule(name) for name in names]

    def before(self, image: Tensor) -> dict[str, Tensor]:
        given: list[tuple[Any, ...]] = []
        handle = self.modules[0].register_forward_pre_hook(lambda module, arguments: given.append(arguments))
        try:
            self.model(image)
        finally:
            handle.remove()
        if len(given) != 1 or len(given[0]) != 1 or not isinstance(given[0][0], Tensor):
            raise Whole(f"its classifier `{self.names[0]}` is not called once, with one tensor")
        return {"input": given[0][0]}

    def after(self, features: Mapping[str, Tensor]) -> Outputs:
        x = features["input"]
        for module in self.modules:
            x = module(x)
        return as_outputs(x)

    def describe(self) -> str:
        return f"what `{self.names[0]}` is given"


class AtStages(Halves):
    """The features are those maps of a backbone's stages, and those indices of its poolings, that classifier and head
    read.

    Args:
        model: with stages.
        image: (N, C, H, W) to find out with which.
    """

    def __init__(self, model: ConvNet, image: Tensor) -> None:
        self.model = self.network = model
        found = model.features(image)
        self._count, self.sizes = len(found.stages), found.sizes
        self.stages, self._indexed = set[int](), False
        for training in (False, True):
            with _as(model, training):
                self._note(found)
        if not self.stages:
            raise Whole("its head reads none of its stages")

    def _note(self, found: Features) -> None:
        """Which of the features the outputs depend on."""
        stages = [stage.detach().requires_grad_() for stage in found.stages]
        noting = _Noting(tuple(stages), found.indices, found.sizes)
        with torch.enable_grad():
            total = sum(output.float().sum() for output in self.network.of_features(noting).values())
            assert isinstance(total, Tensor)
            slopes = torch.autograd.grad(total, stages, allow_unused=True)
        self.stages |= {place for place, slope in enumerate(slopes) if slope is not None}
        self._indexed |= noting.asked and bool(found.indices)

    def before(self, image: Tensor) -> dict[str, Tensor]:
        found = self.network.features(image)
        maps = {f"stage{place}": found.stages[place] for place in sorted(self.stages)}
        indices = {f"indices{place}": indices for place, indices in enumerate(found.indices)}
        return {**maps, **(indices if self._indexed else {})}

    def after(self, features: Mapping[str, Tensor]) -> Outputs:
        nothing = torch.zeros(())  # in the place of maps that nobody reads
        stages = tuple(features.get(f"stage{place}", nothing) for place in range(self._count))
        if not self._indexed:
            return self.network.of_features(Features(stages))
        indices = tuple(features[f"indices{place}"] for place in range(len(self.sizes)))
        return self.network.of_features(Features(stages, indices, self.sizes))

    def describe(self) -> str:
        which = ", ".join(str(place + 1) for place in sorted(self.stages))
        return f"maps of stage{'s' * (len(self.stages) > 1)} {which} of {self._count}" + (
            ", and the poolings' indices" if self._indexed else ""
        )


class _Noting(Features):
    """Remembers whether somebody asked for the poolings' indices."""

    asked = False

    def __getattribute__(self, name: str) -> Any:
        if name == "indices":
            super().__setattr__("asked", True)
        return super().__getattribute__(name)


def halved(
    model: nn.Module, image: Tensor, train: Callable[[], None], autocast: Callable[[], AbstractContextManager[Any]]
) -> Halves:
    """The network in halves, at its classifier, or else at its stages; tried on images, without a trace.

    Args:
        image: at least `LEAST` of them, (N, C, H, W), as the network gets them.
        train: puts the network into training mode, less what stands still.
        autocast: as the run computes.

    Raises:
        Whole: the backbone trains, or what it gives of an image depends on random numbers, on the other images of the
            batch or on the mode; or the network cannot be cut.
    """
    reasons: list[str] = []
    with _Kept(model), rng.restored(image.device), torch.no_grad():
        for attempt in _attempts(model, image):
            try:
                found = attempt()
                trial = _Trial(found, image, train, autocast)
                trial.require_steady()
                trial.require_the_same()
                return found
            except Whole as error:
                reasons.append(str(error))
    raise Whole(reasons[-1] if reasons else f"{type(model).__name__} names no classifier and has no stages")


def _attempts(model: nn.Module, image: Tensor) -> Iterator[Callable[[], Halves]]:
    if names := list(head_modules(model)):
        yield lambda: AtClassifier(model, names)
    if isinstance(model, ConvNet) and model.stage_channels and (model.classifies or model.head is not None):
        yield lambda: AtStages(model, image)


@dataclass
class _Trial:
    """Whether halves are what they claim to be. Each call has an autocast of its own: inside of one, weights that were
    cast without a graph would be taken again where one is asked for."""

    halves: Halves
    image: Tensor
    train: Callable[[], None]
    autocast: Callable[[], AbstractContextManager[Any]]

    def before(self, image: Tensor) -> dict[str, Tensor]:
        with self.autocast():
            return self.halves.before(image)

    def require_steady(self) -> None:
        self.halves.model.eval()
        expected, part = self.before(self.image), self.before(self.image[:1])
        for name, tensor in expected.items():
            if len(tensor) != len(self.image) or not _close(part[name], tensor[:1]):
                raise Whole("what its backbone makes of an image depends on the other images of the batch")
        self.train()
        for seed in (0, 1):
            torch.manual_seed(seed)
            with torch.enable_grad():
                found = self.before(self.image)
            if any(tensor.requires_grad for tensor in found.values()):
                raise Whole("layers before its head train")
            if not _equal(found, expected):
                raise Whole(
                    "its backbone makes something else of an image in training (dropout, stochastic depth, or norm "
                    "layers that use the batch)"
                )

    def require_the_same(self) -> None:
        for mode in (self.halves.model.eval, self.train):
            mode()
            features = self.before(self.image)
            torch.manual_seed(0)
            with self.autocast():
                expected = as_outputs(self.halves.model(self.image))
            torch.manual_seed(0)
            with self.autocast(), _noted(self.halves.model) as ran:
                try:
                    found = self.halves.after(features)
                except (RuntimeError, TypeError) as error:  # modules that do not follow one another
                    raise Whole("its classifier is not the last thing that it does") from error
            self.halves.ran |= frozenset(ran)
            if not _equal(found, expected):
                raise Whole("what it gives is not what its classifier and head make of the features")


def _equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def _close(found: Tensor, expected: Tensor) -> bool:
    if not expected.is_floating_point():
        return True  # where of two nearly equal values the larger one is may change with the kernel
    bound = CLOSE.get(expected.dtype, HALF_CLOSE) * float(expected.abs().max())
    return found.shape == expected.shape and float((found - expected).abs().max()) <= bound


@contextmanager
def _as(model: nn.Module, training: bool) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was in before:
            module.training = was


@contextmanager
def _noted(model: nn.Module) -> Iterator[set[str]]:
    """The names of the modules that run in the block."""
    ran: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.add(name)) for name, module in model.named_modules()
    ]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


class _Kept:
    """Puts the network's buffers and modes back to what they were when the block was entered."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __enter__(self) -> None:
        self._modes = [(module, module.training) for module in self._model.modules()]
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in self._model.buffers()]

    def __exit__(self, *exception: object) -> None:
        for module, was in self._modes:
            module.training = was
        with torch.no_grad():
            for buffer, kept in self._buffers:
                buffer.copy_(kept)
