"""Shapes: generated scenes with a class, a mask and a box. Needs no file and no network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cnnlab import rng
from cnnlab.data.options import LabelledCut
from cnnlab.data.splits import TensorSplit, digest, thinned
from cnnlab.protocols import DataSpec, Split
from cnnlab.schema import NonNegativeInt, PositiveInt, Probability, Range

CLASSES = ("circle", "square", "triangle", "cross", "ring", "star")
_CHUNK = 128  # keeps the fields (1.5 MB each) in cache: 3,000 scenes take 0.12 s, all at once 0.7 s
_TEXTURE = 5  # control points a side of the background's smooth texture
_CHANNELS = 3
_BAR_DRAWS = 7


@dataclass(eq=False)
class Shapes(LabelledCut):
    """Scenes with one shape, turned, scaled and coloured at random, on a textured, cluttered background.

    Each image is a function of (split_seed, split, index) alone: a larger `train` extends the smaller one and
    leaves val and test as they are. Classes are balanced (index modulo six).

    Targets: `label`; `mask` with 0 the background and 1 + label the shape; `box`, the mask's tight bounds.

    Args:
        size: side of the images in pixels.
        train, val, test: samples a split.
        clutter: bars behind the shape, in colours of their own; they are background.
        noise: half-width of the uniform grey noise on every pixel, as a part of the full range.
        contrast: least distance (Euclidean, in RGB of [0, 1]) of the shape's colour from the mean background.

    `split_seed` is of the scenes.
    """

    size: Annotated[int, Range(low=16)] = 32
    train: PositiveInt = 2000
    val: PositiveInt = 300
    test: PositiveInt = 500
    clutter: NonNegativeInt = 3
    noise: Probability = 0.1
    contrast: Annotated[float, Range(low=0, high=0.8)] = 0.35

    def spec(self) -> DataSpec:
        return DataSpec(
            channels=_CHANNELS,
            size=(self.size, self.size),
            classes=CLASSES,
            targets=frozenset({"label", "mask", "box"}),
            mask_classes=("background", *CLASSES),
        )

    def load(self) -> dict[str, Split]:
        settings = (self.size, self.clutter, self.noise, self.contrast, self.split_seed)
        splits: dict[str, Split] = {}
        for name, count in (("train", self.train), ("val", self.val), ("test", self.test)):
            index = torch.arange(count)
            if name == "train":
                index = thinned(
                    index,
                    index % len(CLASSES),
                    len(CLASSES),
                    limit=self.limit,
                    imbalance=self.imbalance,
                    seed=self.split_seed,
                )
            made = [self._scenes(name, piece) for piece in index.split(_CHUNK)]
            images, masks, boxes = (torch.cat(tensors) for tensors in zip(*made))
            targets = {"label": index % len(CLASSES), "mask": masks, "box": boxes}
            splits[name] = TensorSplit(images, targets, digest("shapes", *settings, name, index))
        return splits

    def _scenes(self, split: str, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (n, 3, S, S) uint8, masks (n, S, S) uint8 and boxes (n, 4) of the scenes at `index` (n,)."""

        def draw(stream: str, count: int) -> Tensor:
            return rng.uniform(self.split_seed, f"shapes/{split}/{stream}", 0, index, count)

        n, side = len(index), self.size
        background = draw("background", _CHANNELS)
        texture = draw("texture", _CHANNELS * _TEXTURE**2).view(n, _CHANNELS, _TEXTURE, _TEXTURE)
        smooth = interpolate(texture - 0.5, (side, side), mode="bilinear", align_corners=True)
        scene = background[:, :, None, None] + 0.5 * smooth
        for bar in range(self.clutter):
            scene = _over(scene, *self._bar(draw(f"bar{bar}", _BAR_DRAWS)))
        cover = self._shape(index % len(CLASSES), draw("place", 4))
        scene = _over(scene, cover, _away_from(draw("colour", _CHANNELS), background, self.contrast))
        scene = scene + self.noise * (2 * draw("noise", side * side).view(n, 1, side, side) - 1)
        masks = torch.where(cover >= 0.5, (1 + index % len(CLASSES))[:, None, None], 0).to(torch.uint8)
        return scene.clamp(0, 1).mul(255).round().to(torch.uint8), masks, boxes_of(masks > 0)

    def _shape(self, label: Tensor, place: Tensor) -> Tensor:
        """(n, S, S) coverage in [0, 1] of the shapes `label` (n,), placed by `place` (n, 4) in [0, 1)."""
        radius = (0.18 + 0.2 * place[:, 0]) * self.size
        centre = radius[:, None] + place[:, 1:3] * (self.size - 2 * radius[:, None])
        u, v = self._frame(centre, 2 * math.pi * place[:, 3])
        u, v = u / radius[:, None, None], v / radius[:, None, None]
        inside = torch.empty_like(u)
        for number, name in enumerate(CLASSES):
            members = (label == number).nonzero().flatten()
            inside[members] = _INSIDE[name](u[members], v[members])
        return (inside * radius[:, None, None] + 0.5).clamp(0, 1)

    def _bar(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Coverage (n, S, S) and colour (n, 3) of a thin bar; `draws` (n, 7)."""
        along, across = self._frame(draws[:, :2] * self.size, math.pi * draws[:, 2])
        half_length = (0.15 + 0.35 * draws[:, 3, None, None]) * self.size
        half_width = 0.03 * self.size
        inside = torch.minimum(half_length - along.abs(), half_width - across.abs())
        return (inside + 0.5).clamp(0, 1), draws[:, 4:]

    def _frame(self, centre: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
        """Pixel centres in frames at `centre` (n, 2) turned by `angle` (n,): two (n, S, S), in pixels."""
        ticks = torch.arange(self.size) + 0.5
        x = ticks[None, None, :] - centre[:, 0, None, None]
        y = ticks[None, :, None] - centre[:, 1, None, None]
        cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
        return x * cos + y * sin, y * cos - x * sin


def boxes_of(inside: Tensor) -> Tensor:
    """(n, 4) float32 tight bounds (x1, y1, x2, y2) in [0, 1] of the true pixels in (n, H, W) bool."""
    sides = []
    for seen in (inside.any(1), inside.any(2)):
        length = seen.shape[1]
        first = seen.int().argmax(1)
        last = length - seen.flip(1).int().argmax(1)
        sides.append((first / length, last / length))
    (x1, x2), (y1, y2) = sides
    return torch.stack([x1, y1, x2, y2], 1)


def _over(scene: Tensor, cover: Tensor, colour: Tensor) -> Tensor:
    """The scene (n, 3, S, S) with `colour` (n, 3) laid over it where `cover` (n, S, S) is 1."""
    return torch.lerp(scene, colour[:, :, None, None].expand_as(scene), cover[:, None])


def _away_from(colour: Tensor, other: Tensor, distance: float) -> Tensor:
    """Colours (n, 3) in [0, 1] that are `distance` <= 0.8 or more from `other`.

    A colour that is too close gives way to `other` moved by a half in each channel, towards the farther end:
    0.87.
    """
    near = (colour - other).norm(dim=1, keepdim=True) < distance
    return torch.where(near, torch.where(other < 0.5, other + 0.5, other - 0.5), colour)


def _circle(u: Tensor, v: Tensor) -> Tensor:
    return 1 - (u.square() + v.square()).sqrt()


def _square(u: Tensor, v: Tensor) -> Tensor:
    return math.sqrt(0.5) - torch.maximum(u.abs(), v.abs())


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    slope = math.sqrt(0.75)
    return 0.5 - torch.maximum(-v, slope * u.abs() + 0.5 * v)


def _cross(u: Tensor, v: Tensor) -> Tensor:
    long, short = torch.maximum(u.abs(), v.abs()), torch.minimum(u.abs(), v.abs())
    return torch.minimum(0.95 - long, 0.28 - short)


def _ring(u: Tensor, v: Tensor) -> Tensor:
    return 0.22 - ((u.square() + v.square()).sqrt() - 0.78).abs()


def _star(u: Tensor, v: Tensor) -> Tensor:
    """Five points: in each tenth of the turn, one straight edge from a tip (radius 1) to a notch (0.4)."""
    tenth = math.pi / 5
    angle = (torch.atan2(u, v).remainder(2 * tenth) - tenth).abs()  # 0 at a notch, `tenth` at a tip
    radius = (u.square() + v.square()).sqrt()
    tip = (math.cos(tenth), math.sin(tenth))
    normal = (tip[1], 0.4 - tip[0])  # perpendicular to the edge from (0.4, 0) to the tip
    length = math.hypot(*normal)
    return (normal[0] * (0.4 - radius * angle.cos()) - normal[1] * radius * angle.sin()) / length


_INSIDE = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "ring": _ring,
    "star": _star,
}
"""Signed distance to the edge (or a lower bound of its size), positive inside, in units of the radius."""
