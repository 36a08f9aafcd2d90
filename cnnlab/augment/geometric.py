"""Flips, crops, rotation, scale, translation and shear: affine maps, one a sample."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from cnnlab.augment.base import Draws, Fill, Geometric, check_fill
from cnnlab.augment.warp import affine
from cnnlab.schema import NonNegative, NonNegativeInt, Positive, Probability, Range

SmallestScale = Annotated[float, Range(low=1 / 16)]
"""Antialiasing reads 1/scale pixels along each axis: 16 x 16 readings a pixel are the most that we allow."""


class HorizontalFlip(Geometric):
    """Mirrors left and right with probability `p`. Exact."""

    draws = 1
    exact = True

    def __init__(self, p: Probability = 0.5):
        self.p = p

    def matrix(self, draws: Draws) -> Tensor:
        u = draws.uniforms[:, 0]
        return affine(u, xx=1 - 2 * (u < self.p).to(u.dtype))


class VerticalFlip(Geometric):
    """Mirrors top and bottom with probability `p`. Exact."""

    draws = 1
    exact = True

    def __init__(self, p: Probability = 0.5):
        self.p = p

    def matrix(self, draws: Draws) -> Tensor:
        u = draws.uniforms[:, 0]
        return affine(u, yy=1 - 2 * (u < self.p).to(u.dtype))


class AlternatingFlip(Geometric):
    """Mirrors left and right every other epoch: half of the samples in even epochs, the others in odd ones.

    Two epochs in a row show each sample both ways, where independent flips repeat one half of the time
    (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU", section 3.6). Exact.
    """

    draws = 1
    redraw = False
    exact = True

    def matrix(self, draws: Draws) -> Tensor:
        u = draws.uniforms[:, 0]
        side = 1 - 2 * (u < 0.5).to(u.dtype)
        return affine(u, xx=side if draws.epoch % 2 == 0 else -side)


class PadCrop(Geometric):
    """Pads each side and crops back to the size at a random place (He et al. 2015, section 4.2).

    The same as a translation by up to ±`padding` whole pixels in x and in y. Exact. Where photos are stored whole, what
    lies beside the image comes in (Krizhevsky et al. 2012, section 4.1), and `fill` beyond the photo only.
    """

    draws = 2
    exact = True
    shifts = True

    def __init__(self, padding: NonNegativeInt = 4, fill: Fill = "zeros"):
        check_fill(fill)
        self.padding = padding
        self.fill = fill

    def matrix(self, draws: Draws) -> Tensor:
        shift = (draws.uniforms * (2 * self.padding + 1)).floor() - self.padding
        return affine(shift, x=shift[:, 0], y=shift[:, 1])


class RandomResizedCrop(Geometric):
    """Crops a random part of the photo and stretches it to the size (Szegedy et al. 2014, section 6).

    As torchvision's: the part's area is uniform in `scale`, as a share of the photo's, its aspect ratio (width over
    height) log-uniform in `ratio`, its place uniform. A part that is longer than a side of the photo is drawn again,
    ten times at most; then it is the largest one in the middle with a ratio that is allowed. The photo is the whole
    one, in its own proportions, where the data stores it (see `cnnlab.data.whole`), else the image.
    """

    draws = 22
    crops = True
    _AREAS = (0, *range(4, 22, 2))
    _RATIOS = (1, *range(5, 22, 2))
    """The columns of each attempt; the place has 2 and 3."""

    def __init__(
        self,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        fill: Fill = "edge",
    ):
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"expected scale (low, high) with 0 < low <= high <= 1, received {tuple(scale)}")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"expected ratio (low, high) with 0 < low <= high, received {tuple(ratio)}")
        check_fill(fill)
        self.scale = (scale[0], scale[1])
        self.ratio = (ratio[0], ratio[1])
        self.fill = fill

    def parts(self, draws: Draws) -> Tensor:
        """(N, 4) height and width of each part, and x and y of its centre from the photo's, in pixels of the image."""
        height, width = draws.whole()
        shares = [draws.between(*self.scale, draw=column) for column in self._AREAS]
        logs = [draws.between(math.log(self.ratio[0]), math.log(self.ratio[1]), draw=column) for column in self._RATIOS]
        areas, ratios = torch.stack(shares, 1) * height * width, torch.stack(logs, 1).exp()
        across, down = (areas * ratios).sqrt(), (areas / ratios).sqrt()
        fits = (across <= width) & (down <= height)
        first = fits.int().argmax(1, keepdim=True)
        found = fits.any(1, keepdim=True)
        across = torch.where(found, across.gather(1, first), torch.minimum(width, height * self.ratio[1]))
        down = torch.where(found, down.gather(1, first), torch.minimum(height, width / self.ratio[0]))
        place = torch.where(found, draws.uniforms[:, 2:4] - 0.5, 0.0)
        return torch.cat([down, across, place[:, :1] * (width - across), place[:, 1:] * (height - down)], 1)

    def matrix(self, draws: Draws) -> Tensor:
        height, width = draws.size
        down, across, x, y = self.parts(draws).unbind(1)
        to_x, to_y = width / across, height / down
        return affine(to_x, xx=to_x, x=-x * to_x, yy=to_y, y=-y * to_y)


class Rotate(Geometric):
    """Rotates about the centre by an angle uniform in ±`degrees`, counter-clockwise where positive."""

    draws = 1

    def __init__(self, degrees: NonNegative = 10.0, fill: Fill = "zeros"):
        check_fill(fill)
        self.degrees = degrees
        self.fill = fill

    def matrix(self, draws: Draws) -> Tensor:
        angle = draws.between(-self.degrees, self.degrees) * (math.pi / 180)
        sin, cos = angle.sin(), angle.cos()
        return affine(angle, xx=cos, xy=sin, yx=-sin, yy=cos)


class Scale(Geometric):
    """Zooms about the centre by a factor log-uniform in [`low`, `high`]; antialiased where it shrinks."""

    draws = 1

    def __init__(self, low: SmallestScale = 0.9, high: Positive = 1.1, fill: Fill = "zeros"):
        if low > high:
            raise ValueError(f"expected low <= high, received low={low}, high={high}")
        check_fill(fill)
        self.low = low
        self.high = high
        self.fill = fill
        self.minification = max(1.0, 1 / low)

    def matrix(self, draws: Draws) -> Tensor:
        factor = draws.between(math.log(self.low), math.log(self.high)).exp()
        return affine(factor, xx=factor, yy=factor)


class Translate(Geometric):
    """Shifts by up to ±`fraction` of the width and of the height, by parts of a pixel too."""

    draws = 2

    def __init__(self, fraction: Probability = 0.1, fill: Fill = "zeros"):
        check_fill(fill)
        self.fraction = fraction
        self.fill = fill

    def matrix(self, draws: Draws) -> Tensor:
        height, width = draws.size
        x = draws.between(-self.fraction, self.fraction, draw=0) * width
        y = draws.between(-self.fraction, self.fraction, draw=1) * height
        return affine(x, x=x, y=y)


class Shear(Geometric):
    """Slants along x, then along y, about the centre, each by an angle uniform in ±`degrees`.

    Areas stay, so this is not antialiased: at 30 degrees a pixel is stretched by 1.3 along one diagonal.
    """

    draws = 2

    def __init__(self, degrees: Annotated[float, Range(low=0, below=90)] = 10.0, fill: Fill = "zeros"):
        check_fill(fill)
        self.degrees = degrees
        self.fill = fill

    def matrix(self, draws: Draws) -> Tensor:
        x, y = torch.tan((draws.uniforms * 2 - 1) * (self.degrees * math.pi / 180)).unbind(1)
        return affine(x, xy=x, yx=y, yy=1 + x * y)
