"""The three kinds of augmentation, and what each owes the pipeline.

To add one, subclass `Geometric`, `Colour` or `Barrier` in any importable file, state `draws`, implement the
one method, and write a YAML file with one key: `{name: {_target_: my.module.MyPart, knob: 1.0}}`.

All the randomness of a part is `draws.uniforms`, a pure function of (seed, part, epoch, sample). A part works
on the whole batch, on the batch's device, and never waits for that device: no `.item()`, no boolean-mask
indexing, no shape that depends on values, no tensor made from Python numbers (that is a copy from the host;
`Placed` makes it once).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from cnnlab.protocols import Batch, DataSpec, Split

Fill = Literal["zeros", "edge", "reflect"]
"""What lies outside an image: black, the nearest pixel, or the mirror image about the border pixels."""


@dataclass(frozen=True)
class Draws:
    """What a part knows of the batch that it augments."""

    uniforms: Tensor
    """(N, draws) float32 in [0, 1): one row a sample."""
    epoch: int
    size: tuple[int, int]
    """(height, width) of the images, as the network gets them."""
    channels: int
    num_classes: int
    mean: Tensor | None = None
    """(N, C) mean colour of each image where the part is applied; only for a `Colour` with `needs_mean`."""
    photo: Tensor | None = None
    """(N, 2) height and width of each whole photo in the pixels of `size`, from the middle of which the image is cut;
    `None` where nothing lies beyond the image."""

    def whole(self) -> tuple[Tensor, Tensor]:
        """(N, 1) height and width of the whole photo, in pixels of the image."""
        if self.photo is not None:
            return self.photo[:, :1], self.photo[:, 1:]
        like = self.uniforms[:, :1]
        return torch.full_like(like, self.size[0]), torch.full_like(like, self.size[1])

    def between(self, low: float, high: float, draw: int = 0) -> Tensor:
        """(N,) column `draw` of the uniforms, stretched to [low, high)."""
        return self.uniforms[:, draw] * (high - low) + low


class Part(ABC):  # noqa: B024 (each of the three kinds has its own abstract method)
    """What every kind of augmentation has in common. Subclass one of the three kinds, not this."""

    draws: int = 0
    """Uniform numbers that a sample needs."""
    redraw: bool = True
    """Whether a sample gets new numbers each epoch; if not, `Draws.epoch` still tells them apart."""
    bounded: bool = True
    """Whether values in [0, 1] stay there; the pipeline clamps, once and at its end, if not for all parts."""
    neighbours: int = 0
    """Samples before its own in the batch that a sample's result depends on (`tensor.roll(1, 0)`: 1). On several
    processes these are the global batch's, as on one."""

    def num_draws(self, channels: int, size: tuple[int, int]) -> int:
        """Uniform numbers that a sample of this shape needs."""
        return self.draws

    def supports(self, spec: DataSpec) -> str | None:
        """Why such data cannot be augmented so, or `None`. Asked once, when the pipeline is built."""
        return None

    def fit(self, split: Split, seed: int) -> None:  # noqa: B027 (most parts have nothing to fit)
        """Computes what the part must know of the training set."""

    def state_dict(self) -> dict[str, Tensor]:
        """What `fit` computed."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Takes over what `state_dict` gave."""


class Geometric(Part):
    """Moves pixels by an affine map a sample; image, mask and box move together.

    Neighbouring geometric parts with the same `fill` fold into one map and one resampling, so that three of
    them blur no more, and cost no more, than one.
    """

    fill: Fill | None = None
    """What comes in from outside; `None` where nothing does (flips), which folds with any other."""
    exact: bool = False
    """Promise that all maps are flips and whole-pixel translations: pixels are copied, never interpolated."""
    crops: bool = False
    """Whether the part cuts pieces out of the whole photo: photos are then stored whole, where the data can."""
    shifts: bool = False
    """Whether the part moves in what lies beside the image: photos are then stored whole, where the image is their
    middle."""
    minification: float = 1.0
    """Largest factor by which the part shrinks an image. Above 1, resampling is antialiased."""

    @abstractmethod
    def matrix(self, draws: Draws) -> Tensor:
        """(N, 3, 3) maps, old place to new, of (x, y, 1) in pixels from the image's centre, y down."""


class Colour(Part):
    """Maps the channels of each pixel by one affine map a sample.

    Neighbouring colour parts fold into one matrix. Nothing is clamped in between.
    """

    bounded = False
    needs_mean: bool = False
    """Whether `Draws.mean` is wanted."""

    @abstractmethod
    def matrix(self, draws: Draws) -> Tensor:
        """(N, C, C + 1): new colour = matrix · (old colour, 1), for values in [0, 1]."""


class Barrier(Part):
    """Anything else: applied alone, at its place in the list. One that stays in [0, 1] states `bounded`."""

    bounded = False

    @abstractmethod
    def apply(self, batch: Batch, draws: Draws) -> Batch:
        """The batch, `image` (N, C, H, W) float32, with new tensors for what changes, none in place."""


class Placed:
    """Small tensors computed once on the host, copied once to each device that asks for them."""

    def __init__(self, **tensors: Tensor):
        self.tensors = dict(tensors)
        self._copies: dict[tuple[str, torch.device], Tensor] = {}

    def get(self, name: str, device: torch.device) -> Tensor:
        """Raises `RuntimeError` if the tensor was neither computed nor loaded."""
        if name not in self.tensors:
            raise RuntimeError(f"`{name}` is unknown: call fit(split) or load_state_dict(state) first")
        key = (name, device)
        if key not in self._copies:
            self._copies[key] = self.tensors[name].to(device)
        return self._copies[key]

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts `tensors` in the place of all that was kept."""
        self.tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        self._copies = {}


def check_fill(fill: str) -> None:
    """Raises `ValueError` unless `fill` is a `Fill`."""
    if fill not in get_args(Fill):
        raise ValueError(f"expected fill to be one of {', '.join(get_args(Fill))}, received {fill!r}")


def standard_normal(uniforms: Tensor) -> Tensor:
    """Uniform numbers on the grid of 2^-24 to standard normal ones, by the inverse CDF; always finite."""
    # 2u - 1 is a multiple of 2^-23 in [-1, 1); half a step more puts it symmetrically inside (-1, 1).
    return torch.erfinv(2 * uniforms - 1 + 2.0**-24) * 2**0.5


def as_float(image: Tensor) -> Tensor:
    """uint8 as float32 in [0, 1]; what is float already stays."""
    return image if image.is_floating_point() else image / 255
