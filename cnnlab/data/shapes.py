"""Shapes: generated scenes with a class, a mask and a box. Needs no file and no network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cnnlab import rng
from cnnlab.data.options import LabelledCut
from cnnlab.data.splits import TensorSplit, digest, thinned
from cnnlab.protocols import DataSpec, Split, TakenApart
from cnnlab.schema import NonNegativeInt, PositiveInt, Probability, Range

CLASSES = ("circle", "square", "triangle", "cross", "ring", "star")
_CHUNK = 128  # keeps the fields (1.5 MB each) in cache: 3,000 scenes take 0.12 s, all at once 0.7 s
_TEXTURE = 5  # control points a side of the background's smooth texture
_CHANNELS = 3
_BAR_DRAWS = 7
_ALONE = (0.18, 0.2)
"""Radius of a shape that is alone, as a part of the side: least, and how much it varies."""
_AMONG_OTHERS = (0.17, 0.07)
"""Of the largest of several, which fits into a quarter of the image."""
_SMALLER = (0.5, 0.25)
"""Of the others, as a part of the largest one's."""
_MARK = 0.125
"""Side of a mark, as a part of the image's."""
MARKS = ((1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0), (1.0, 1.0, 0), (1.0, 0, 1.0), (0, 1.0, 1.0))
"""Colours of the marks, one a class."""


class Part(NamedTuple):
    """What is laid over a scene: coverage (n, S, S) in [0, 1], colour (n, 3), and the class of each one (n,) in a mask,
    `None` for what is background."""

    name: str
    cover: Tensor
    colour: Tensor
    label: Tensor | None = None


Draw = Callable[[str, int], Tensor]
"""(stream, how many) to (n, how many) in [0, 1)."""


@dataclass(eq=False)
class Shapes(LabelledCut):
    """Scenes with one shape, turned, scaled and coloured at random, on a textured, cluttered background.

    Each image is a function of (split_seed, split, index) alone: a larger `train` extends the smaller one and
    leaves val and test as they are. Classes are balanced (index modulo six).

    Targets: `label`; `mask` with 0 the background and 1 + label each shape; `box`, the tight bounds of the shape that
    gives the class.

    Args:
        size: side of the images in pixels.
        train, val, test: samples a split.
        clutter: bars behind the shape, in colours of their own; they are background.
        noise: half-width of the uniform grey noise on every pixel, as a part of the full range.
        contrast: least distance (Euclidean, in RGB of [0, 1]) of the shape's colour from the mean background.
        objects: shapes a scene, each in a quarter of its own. The largest gives the class and the box; the others are
            of any class and have half to three quarters of its radius.
        shortcut: a planted shortcut: every training scene has a small square mark near a corner, in a colour that goes
            with a class. In this part of the scenes it is the scene's own class, in the others one drawn from all. 0
            makes the mark say nothing; `None` leaves it out.
        shortcut_test: the mark in test scenes: of a class drawn from all (`random`), as in `train` (`same`), or left
            out (`none`). In val it is as in `train`: whoever selects by val does not see the shortcut.

    `split_seed` is of the scenes.
    """

    size: Annotated[int, Range(low=16)] = 32
    train: PositiveInt = 2000
    val: PositiveInt = 300
    test: PositiveInt = 500
    clutter: NonNegativeInt = 3
    noise: Probability = 0.1
    contrast: Annotated[float, Range(low=0, high=0.8)] = 0.35
    objects: Annotated[int, Range(low=1, high=4)] = 1
    shortcut: Probability | None = None
    shortcut_test: Literal["random", "same", "none"] = "random"

    def spec(self) -> DataSpec:
        return DataSpec(
            channels=_CHANNELS,
            size=(self.size, self.size),
            classes=CLASSES,
            targets=frozenset({"label", "mask", "box"}),
            mask_classes=("background", *CLASSES),
        )

    def train_samples(self) -> int:
        return len(self._used("train", self.train))

    def load(self) -> dict[str, Split]:
        settings: tuple[object, ...] = (self.size, self.clutter, self.noise, self.contrast, self.split_seed)
        if self.objects > 1 or self.shortcut is not None:
            settings = (*settings, self.objects, self.shortcut, self.shortcut_test)
        splits: dict[str, Split] = {}
        for name, count in (("train", self.train), ("val", self.val), ("test", self.test)):
            index = self._used(name, count)
            made = [self._scenes(name, piece) for piece in index.split(_CHUNK)]
            images, masks, boxes = (torch.cat(tensors) for tensors in zip(*made))
            targets = {"label": index % len(CLASSES), "mask": masks, "box": boxes}
            splits[name] = TensorSplit(images, targets, digest("shapes", *settings, name, index))
        return splits

    def _used(self, split: str, count: int) -> Tensor:
        """(n,): which of the scenes are the samples of a split."""
        index = torch.arange(count)
        if split != "train":
            return index
        cut: Any = {"limit": self.limit, "imbalance": self.imbalance, "seed": self.split_seed}
        return thinned(index, index % len(CLASSES), len(CLASSES), **cut)

    def taken_apart(self, split: str, index: Tensor) -> TakenApart:
        """The samples at `index` (n,) of a split, rendered again without each of their parts: `mark`, `shape` (the one
        that gives the class), `object1` and so on, and the bars `bar0` and so on."""
        scenes = self._used(split, getattr(self, split))[index]
        found = [self._taken_apart(split, piece) for piece in scenes.split(_CHUNK)]
        images, visible = (torch.cat(tensors) for tensors in zip(*((each.images, each.visible) for each in found)))
        return TakenApart(found[0].names, images, visible)

    def _taken_apart(self, split: str, index: Tensor) -> TakenApart:
        draw = self._draws(split, index)
        parts = self._parts(split, index, draw)
        images = [self._rendered(draw, [each for each in parts if each is not part]) for part in parts]
        visible = [_seen(parts, number) >= 0.5 for number in range(len(parts))]
        order = range(len(parts) - 1, -1, -1)  # the uppermost first
        return TakenApart(
            tuple(parts[i].name for i in order),
            torch.stack([images[i] for i in order], 1),
            torch.stack([visible[i] for i in order], 1),
        )

    def _draws(self, split: str, index: Tensor) -> Draw:
        return lambda stream, count: rng.uniform(self.split_seed, f"shapes/{split}/{stream}", 0, index, count)

    def _scenes(self, split: str, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (n, 3, S, S) uint8, masks (n, S, S) uint8 and boxes (n, 4) of the scenes at `index` (n,)."""
        draw = self._draws(split, index)
        parts = self._parts(split, index, draw)
        masks = torch.zeros(len(index), self.size, self.size, dtype=torch.int64)
        boxes = torch.zeros(len(index), 4)
        for part in parts:
            inside = part.cover >= 0.5
            if part.label is not None:
                masks = torch.where(inside, (1 + part.label)[:, None, None], masks)
                boxes = boxes_of(inside)  # of the last one, which lies above the others
            elif part.name == "mark":
                masks = torch.where(inside, 0, masks)
        return self._rendered(draw, parts), masks.to(torch.uint8), boxes

    def _rendered(self, draw: Draw, parts: Sequence[Part]) -> Tensor:
        """(n, 3, S, S) uint8: the background with the parts over it."""
        side = self.size
        background = draw("background", _CHANNELS)
        n = len(background)
        texture = draw("texture", _CHANNELS * _TEXTURE**2).view(n, _CHANNELS, _TEXTURE, _TEXTURE)
        smooth = interpolate(texture - 0.5, (side, side), mode="bilinear", align_corners=True)
        scene = background[:, :, None, None] + 0.5 * smooth
        for part in parts:
            scene = _over(scene, part.cover, part.colour)
        scene = scene + self.noise * (2 * draw("noise", side * side).view(n, 1, side, side) - 1)
        return scene.clamp(0, 1).mul(255).round().to(torch.uint8)

    def _parts(self, split: str, index: Tensor, draw: Draw) -> list[Part]:
        """What lies over the background, the lowest first: bars, the other shapes, the shape, the mark."""
        background, label = draw("background", _CHANNELS), index % len(CLASSES)
        parts = [Part(f"bar{bar}", *self._bar(draw(f"bar{bar}", _BAR_DRAWS))) for bar in range(self.clutter)]
        place = draw("place", 4)
        radius, centre = self._placed(place)
        if self.objects > 1:
            radius = (_AMONG_OTHERS[0] + _AMONG_OTHERS[1] * place[:, 0]) * self.size
            quarters = draw("quarters", 4).argsort(1)
            centre = self._in_quarter(quarters[:, 0], radius, place[:, 1:3])
            for number in range(1, self.objects):
                other = draw(f"object{number}", 8)
                kind = (other[:, 4] * len(CLASSES)).long()
                smaller = radius * (_SMALLER[0] + _SMALLER[1] * other[:, 0])
                where = self._in_quarter(quarters[:, number], smaller, other[:, 1:3])
                colour = _away_from(other[:, 5:], background, self.contrast)
                parts.append(Part(f"object{number}", self._shape(kind, smaller, where, other[:, 3]), colour, kind))
        colour = _away_from(draw("colour", _CHANNELS), background, self.contrast)
        parts.append(Part("shape", self._shape(label, radius, centre, place[:, 3]), colour, label))
        if self.shortcut is not None and not (split == "test" and self.shortcut_test == "none"):
            parts.append(self._mark(split, label, draw("mark", 5)))
        return parts

    def _mark(self, split: str, label: Tensor, draws: Tensor) -> Part:
        """A square near one of the corners, in the colour of a class; `draws` (n, 5)."""
        share = 0.0 if split == "test" and self.shortcut_test == "random" else self.shortcut or 0.0
        shown = torch.where(draws[:, 0] < share, label, (draws[:, 1] * len(CLASSES)).long())
        corner = (draws[:, 2] * 4).long()
        half = max(1.0, _MARK * self.size / 2)
        offset = half + 1 + draws[:, 3:] * half
        far = torch.stack([corner % 2, corner // 2], 1) == 1
        centre = torch.where(far, self.size - offset, offset)
        across, down = self._frame(centre, torch.zeros(len(label)))
        inside = half - torch.maximum(across.abs(), down.abs())
        return Part("mark", (inside + 0.5).clamp(0, 1), torch.tensor(MARKS)[shown])

    def _placed(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """Radius (n,) and centre (n, 2) in pixels of a shape that is alone, by `place` (n, 4) in [0, 1)."""
        radius = (_ALONE[0] + _ALONE[1] * place[:, 0]) * self.size
        return radius, radius[:, None] + place[:, 1:3] * (self.size - 2 * radius[:, None])

    def _in_quarter(self, quarter: Tensor, radius: Tensor, place: Tensor) -> Tensor:
        """(n, 2): the centre, in pixels, of a shape in a quarter (n,), at `place` (n, 2) of what room there is."""
        corner = torch.stack([quarter % 2, quarter // 2], 1) * (self.size / 2)
        return corner + radius[:, None] + place * (self.size / 2 - 2 * radius[:, None])

    def _shape(self, label: Tensor, radius: Tensor, centre: Tensor, turn: Tensor) -> Tensor:
        """(n, S, S) coverage in [0, 1] of the shapes `label` (n,) at `centre` (n, 2), in pixels, turned by `turn` (n,)
        of a whole turn."""
        u, v = self._frame(centre, 2 * math.pi * turn)
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


def _seen(parts: Sequence[Part], number: int) -> Tensor:
    """(n, S, S): how much of each pixel is of that part, with what lies above it."""
    seen = parts[number].cover
    for above in parts[number + 1 :]:
        seen = seen * (1 - above.cover)
    return seen


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
