"""The augmentation of a batch, from uint8 to what the network reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from torch import Tensor

from cnnlab import rng
from cnnlab.augment.base import Barrier, Colour, Draws, Fill, Geometric, Part, as_float
from cnnlab.augment.normalize import Normalize
from cnnlab.augment.photometric import apply_matrix, compose_colour
from cnnlab.augment.photos import Seen, extent, from_photos, readings
from cnnlab.augment.warp import compose, copy_pixels, resample
from cnnlab.protocols import VIEW, Batch, DataSpec, Split


class _Stage(ABC):
    """Neighbouring parts that are done in one go."""

    @abstractmethod
    def run(self, batch: Batch, draws: Mapping[str, Draws]) -> Batch: ...

    @abstractmethod
    def describe(self) -> str: ...


class _Move(_Stage):
    def __init__(self, parts: Mapping[str, Geometric]):
        self.parts = parts
        self.fills = any(part.fill for part in parts.values())
        self.fill: Fill = next((part.fill for part in parts.values() if part.fill), "edge")
        self.exact = all(part.exact for part in parts.values())
        self.minification = prod(part.minification for part in parts.values())
        self.samples = readings(self.minification)

    def run(self, batch: Batch, draws: Mapping[str, Draws]) -> Batch:
        matrix: Tensor | None = None
        for name, part in self.parts.items():
            step = part.matrix(draws[name])
            matrix = step if matrix is None else compose(step, matrix)
        assert matrix is not None
        if VIEW in batch:
            size = next(iter(draws.values())).size
            return from_photos(batch, matrix, self.fill if self.fills else None, size, self.minification)
        if self.exact:
            return copy_pixels(batch, matrix, self.fill)
        return resample({**batch, "image": as_float(batch["image"])}, matrix, self.fill, self.samples)

    def describe(self) -> str:
        kind = "copied" if self.exact else "1 resampling"
        extra = f", {self.samples}x{self.samples} readings" if self.samples > 1 and not self.exact else ""
        return f"{'+'.join(self.parts)} ({kind}{extra})"


class _Recolour(_Stage):
    def __init__(self, parts: Mapping[str, Colour]):
        self.parts = parts
        self.needs_mean = any(part.needs_mean for part in parts.values())

    def run(self, batch: Batch, draws: Mapping[str, Draws]) -> Batch:
        image = as_float(batch["image"])
        mean = image.mean((2, 3)) if self.needs_mean else None
        matrix: Tensor | None = None
        for name, part in self.parts.items():
            # The mean colour of what this part sees: the maps before it, applied to the image's mean colour.
            seen = mean
            if mean is not None and matrix is not None:
                seen = apply_matrix(mean[:, :, None, None], matrix)[:, :, 0, 0]
            step = part.matrix(replace(draws[name], mean=seen))
            matrix = step if matrix is None else compose_colour(step, matrix)
        assert matrix is not None
        return {**batch, "image": apply_matrix(image, matrix)}

    def describe(self) -> str:
        return f"{'+'.join(self.parts)} (1 matrix)"


class _Alone(_Stage):
    def __init__(self, name: str, part: Barrier):
        self.name = name
        self.part = part

    def run(self, batch: Batch, draws: Mapping[str, Draws]) -> Batch:
        if VIEW in batch:  # what is not a map of places or of colours is done to what the network would see
            batch = from_photos(batch, None, None, draws[self.name].size)
        return self.part.apply({**batch, "image": as_float(batch["image"])}, draws[self.name])

    def describe(self) -> str:
        return self.name


def _stages(parts: Mapping[str, Part], fold: bool) -> list[_Stage]:
    """Neighbours of one kind (and, for geometry, one `fill`) share a stage; without `fold`, none do."""
    groups: list[dict[str, Part]] = []
    for name, part in parts.items():
        if fold and groups and _fits(part, list(groups[-1].values())):
            groups[-1][name] = part
        else:
            groups.append({name: part})
    return [_stage(group) for group in groups]


def _fits(part: Part, group: Sequence[Part]) -> bool:
    if isinstance(part, Colour):
        return isinstance(group[0], Colour)
    if not isinstance(part, Geometric) or not isinstance(group[0], Geometric):
        return False
    return len({p.fill for p in (*group, part) if isinstance(p, Geometric) and p.fill is not None}) <= 1


def _stage(group: dict[str, Any]) -> _Stage:
    first = next(iter(group.values()))
    if isinstance(first, Colour):
        return _Recolour(group)
    if isinstance(first, Geometric):
        return _Move(group)
    ((name, part),) = group.items()
    return _Alone(name, part)


def _on_photos(stages: Sequence[_Stage]) -> Mapping[str, Geometric]:
    """The parts that move whole photos, where there are such: those of the first move, if nothing but colour is before
    it."""
    first = next((stage for stage in stages if not isinstance(stage, _Recolour)), None)
    return first.parts if isinstance(first, _Move) else {}


class Pipeline:
    """uint8 images -> augmentations in their order -> clamped once to [0, 1] -> normalized float32.

    In training, each part gets its numbers from `rng.uniform(seed, "augment/<name>", epoch, index, draws)`:
    what happens to a sample depends on the seed, the name, the epoch and the sample, not on its batch, the
    workers, the ranks, or the other parts (but for the partners that mixup and CutMix take from the global batch, see
    `neighbours`). In evaluation, images are only normalized. Of whole photos, the parts see what lies beyond the image;
    those that nothing moved are cut to it (see `cnnlab.augment.photos`).

    Nothing here waits for the device, and no shape depends on values, so that the whole can be compiled or
    captured.

    Args:
        parts: augmentations by name, in the order in which they apply.
        normalize: what comes last, in training and in evaluation.
        spec: the data's; parts that cannot work on it are refused here.
        seed: of the run.
        fold: merges neighbouring affine parts into one resampling, and neighbouring colour parts into one
            matrix. `False` does one at a time, to compare with: it blurs more, and cuts off what leaves the
            image and would come back.

    Raises:
        ValueError: some parts do not support such data; the message names them all.
    """

    def __init__(
        self, parts: Mapping[str, Part], normalize: Normalize, *, spec: DataSpec, seed: int, fold: bool = True
    ):
        wrong = [name for name, part in parts.items() if not isinstance(part, Geometric | Colour | Barrier)]
        if wrong:
            raise ValueError(f"expected subclasses of Geometric, Colour or Barrier, received {', '.join(wrong)}")
        reasons = {f"augment.{name}": part.supports(spec) for name, part in parts.items()}
        reasons["normalize"] = normalize.supports(spec)
        problems = [f"{name}: {reason}" for name, reason in reasons.items() if reason is not None]
        if problems:
            raise ValueError("; ".join(problems))
        self.parts = dict(parts)
        self.normalize = normalize
        self.spec = spec
        self.seed = seed
        self._stages = _stages(self.parts, fold)
        self._clamps = not all(part.bounded for part in self.parts.values())
        self._on_photos = _on_photos(self._stages)

    @property
    def crops(self) -> bool:
        """Whether pieces are cut out of whole photos in training, where the data stores such."""
        return any(part.crops for part in self._on_photos.values())

    @property
    def shifts(self) -> bool:
        """Whether what lies beside the image comes in, in training, where the data stores whole photos."""
        return any(part.shifts for part in self._on_photos.values())

    @property
    def neighbours(self) -> int:
        """Samples before its own in the batch that a sample's result depends on, in training."""
        return sum(part.neighbours for part in self.parts.values())

    def fit(self, split: Split) -> None:
        """Computes what the parts and the normalization must know of the training set."""
        seen = Seen(split, self.spec.size)
        for part in self.parts.values():
            part.fit(seen, self.seed)
        self.normalize.fit(seen, self.seed)

    def __call__(self, batch: Batch, *, epoch: int, train: bool) -> Batch:
        """The batch as the network gets it: `image` (N, C, H, W) float32, targets moved or mixed along.

        Args:
            batch: `image` uint8 (or float in [0, 1]), `index`, and the targets, all on one device. Not
                changed.
            epoch: that the random numbers belong to.
            train: augment, or only normalize.
        """
        if train and self.parts:
            batch = self.augment(batch, self.draw(batch, epoch))
        if VIEW in batch:
            batch = from_photos(batch, None, None, self.spec.size)
        return {**batch, "image": self.normalize(batch["image"])}

    def draw(self, batch: Batch, epoch: int) -> dict[str, Draws]:
        """The random numbers of every part, for the samples of a batch in an epoch."""
        _, channels, height, width = batch["image"].shape
        size, photo = ((height, width), None) if VIEW not in batch else (self.spec.size, extent(batch))
        draws = {}
        for name, part in self.parts.items():
            count = part.num_draws(channels, size)
            drawn = rng.uniform(self.seed, f"augment/{name}", epoch if part.redraw else 0, batch["index"], count)
            beyond = photo if name in self._on_photos else None
            draws[name] = Draws(drawn, epoch, size, channels, self.spec.num_classes, photo=beyond)
        return draws

    def augment(self, batch: Batch, draws: Mapping[str, Draws]) -> Batch:
        """The augmentations without the normalization, with given random numbers.

        `image` stays uint8 if pixels were only copied, else it is float32 in [0, 1].
        """
        for stage in self._stages:
            batch = stage.run(batch, draws)
        return {**batch, "image": batch["image"].clamp(0, 1)} if self._clamps else batch

    def describe(self) -> str:
        """One line: what is done in training, and in evaluation."""
        stages = [stage.describe() for stage in self._stages] + ["clamp"] * self._clamps
        normalize = self.normalize.describe()
        return f"train: {' -> '.join([*stages, normalize])}; evaluation: {normalize}"

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """What `fit` computed, by `normalize` and `augment.<name>`: CPU tensors."""
        states = {f"augment.{name}": part.state_dict() for name, part in self.parts.items()}
        states["normalize"] = self.normalize.state_dict()
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Takes over what `state_dict` gave, instead of `fit`.

        Raises:
            ValueError: the state is of other parts.
        """
        owners: dict[str, Part | Normalize] = {f"augment.{name}": part for name, part in self.parts.items()}
        owners["normalize"] = self.normalize
        unknown = sorted(set(state) - set(owners))
        if unknown:
            raise ValueError(f"expected the state of {', '.join(owners)}, received that of {', '.join(unknown)}")
        for name, tensors in state.items():
            owners[name].load_state_dict(tensors)
