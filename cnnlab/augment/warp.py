"""Affine maps of a batch: algebra, exact copying, antialiased resampling; masks and boxes follow the image.

Coordinates are pixels from the image's centre, x to the right and y down, so that rotations and flips have no
translation and a map means the same at every size. Sums are written out instead of calling `matmul`, for two
reasons: TF32 and autocast would round coordinates to 8 or 11 bits, and each sample's result must not depend
on how many others are in the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnlab.augment.base import Fill
from cnnlab.protocols import VOID, Batch

_PADDING = {"zeros": "zeros", "edge": "border", "reflect": "reflection"}


def affine(
    like: Tensor,
    xx: Tensor | float = 1.0,
    xy: Tensor | float = 0.0,
    x: Tensor | float = 0.0,
    yx: Tensor | float = 0.0,
    yy: Tensor | float = 1.0,
    y: Tensor | float = 0.0,
) -> Tensor:
    """(N, 3, 3): (xx, xy, x), (yx, yy, y), (0, 0, 1), of numbers or (N,) tensors; `like` (N, ...) gives N."""
    entries = (xx, xy, x, yx, yy, y, 0.0, 0.0, 1.0)
    count, device = len(like), like.device
    columns = [e if isinstance(e, Tensor) else torch.full((count,), e, device=device) for e in entries]
    return torch.stack(columns, dim=1).view(-1, 3, 3)


def compose(second: Tensor, first: Tensor) -> Tensor:
    """The map that does `first`, then `second`: their product, (N, 3, 3)."""
    return (second[:, :, :, None] * first[:, None, :, :]).sum(2)


def invert(matrix: Tensor) -> Tensor:
    """The inverse map (N, 3, 3), in closed form: `linalg.inv` waits for the device, to check for zeros."""
    (a, b, x), (c, d, y) = matrix[:, 0].unbind(1), matrix[:, 1].unbind(1)
    scale = 1 / (a * d - b * c)
    a, b, c, d = d * scale, -b * scale, -c * scale, a * scale
    return affine(matrix, a, b, -(a * x + b * y), c, d, -(c * x + d * y))


def _source(coefficient: Tensor, shift: Tensor, length: int) -> Tensor:
    """(N, length) source positions along one axis of an exact map: int64, maybe outside [0, length)."""
    centre = (length - 1) / 2
    out = torch.arange(length, device=shift.device, dtype=shift.dtype) - centre
    return (coefficient[:, None] * out + (shift + centre)[:, None]).round().long()


def _reflect(position: Tensor, length: int) -> Tensor:
    """Positions mirrored at the border pixels' centres, as often as needed."""
    if length == 1:
        return torch.zeros_like(position)
    position = position.remainder(2 * (length - 1))
    return torch.minimum(position, 2 * (length - 1) - position)


def copy_pixels(batch: Batch, matrix: Tensor, fill: Fill) -> Batch:
    """The batch moved by flips and whole-pixel translations: every pixel is a copy, in its own dtype.

    Args:
        batch: `image` (N, C, H, W) of any dtype, and maybe `mask` and `box`.
        matrix: (N, 3, 3), old place to new.
    """
    image = batch["image"]
    height, width = image.shape[-2:]
    inverse = invert(matrix)
    rows = _source(inverse[:, 1, 1], inverse[:, 1, 2], height)
    columns = _source(inverse[:, 0, 0], inverse[:, 0, 2], width)
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    if fill == "reflect":
        rows, columns = _reflect(rows, height), _reflect(columns, width)
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    flat = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
    moved = image.flatten(2).gather(2, flat[:, None].expand(-1, image.shape[1], -1)).view(image.shape)
    if fill == "zeros":
        moved.mul_(inside[:, None])
    result = {**batch, "image": moved}
    if "mask" in batch:
        mask = batch["mask"].flatten(1).gather(1, flat).view(batch["mask"].shape)
        result["mask"] = torch.where(inside, mask, VOID)
    if "box" in batch:
        result["box"] = move_box(batch["box"], matrix, (height, width))
    return result


def resample(
    batch: Batch,
    matrix: Tensor,
    fill: Fill,
    samples: int = 1,
    size: tuple[int, int] | None = None,
    across: int = 1,
) -> Batch:
    """The batch moved by any affine maps: bilinear for the image, nearest for the mask with `VOID` outside.

    Antialiasing: where an output pixel covers s > 1 input pixels along an output axis, `samples` bilinear
    readings are averaged along that axis. Their spread gives the filter the variance of the triangle, s
    pixels wide on each side, that PIL and `interpolate(antialias=True)` use: s²/6, of which bilinear reading
    itself brings 1/6. Where s <= 1 the spread is zero: plain bilinear interpolation, whatever `samples` is.

    Args:
        batch: `image` (N, C, H, W) float, and maybe `mask` and `box`.
        matrix: (N, 3, 3), old place to new.
        samples: readings along each axis; at least the largest s, or pixels are missed.
        size: (height, width) of the result; `None` keeps the image's.
        across: readings along the image's own x alone, with `samples` = 1: for images that shrink mostly along that.
    """
    image = batch["image"]
    height, width = image.shape[-2:]
    size = (height, width) if size is None else size
    inverse = invert(matrix)
    grid = _grid(inverse, height, width, size)
    steps = _steps(inverse, height, width, samples, across)
    if not steps:
        moved = _read(image, grid, fill)
    else:
        moved = image.new_zeros((*image.shape[:2], *size))
        for step in steps:
            moved += _read(image, grid + step[:, None, None, :], fill)
        moved /= len(steps)
    result = {**batch, "image": moved}
    if "mask" in batch:
        # Shifted by VOID, so that what `grid_sample` reads outside, 0, is void.
        shifted = batch["mask"][:, None].to(image.dtype) - VOID
        read = F.grid_sample(shifted, grid, mode="nearest", padding_mode="zeros", align_corners=True)
        result["mask"] = (read[:, 0] + VOID).to(batch["mask"].dtype)
    if "box" in batch:
        result["box"] = move_box(batch["box"], matrix, (height, width), size)
    return result


def inside(image: Tensor, matrix: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, h, w) bool: which pixels of the moved images have their centres inside the image.

    Args:
        image: (N, C, H, W), before it is moved.
        matrix: (N, 3, 3), old place to new.
        size: (h, w) of the result.
    """
    height, width = image.shape[-2:]
    # A border pixel reaches half a pixel beyond its centre, where the grid has ±1; rounding takes none away.
    x, y = _grid(invert(matrix), height, width, size).abs().unbind(-1)
    return (x <= 1 + 1.001 / max(width - 1, 1)) & (y <= 1 + 1.001 / max(height - 1, 1))


def _read(image: Tensor, grid: Tensor, fill: Fill) -> Tensor:
    # align_corners=True: its reflection mirrors at the border pixels' centres, as `_reflect` does.
    return F.grid_sample(image, grid, mode="bilinear", padding_mode=_PADDING[fill], align_corners=True)


def _unit(inverse: Tensor, height: int, width: int) -> Tensor:
    """(N, 2, 2): an output pixel's step along x (column 0) and y, in `grid_sample`'s coordinates."""
    return torch.stack(
        [inverse[:, 0, :2] * (2 / max(width - 1, 1)), inverse[:, 1, :2] * (2 / max(height - 1, 1))], dim=1
    )


def _grid(inverse: Tensor, height: int, width: int, size: tuple[int, int]) -> Tensor:
    """(N, *size, 2) reading positions in an image (height, width), for `grid_sample(align_corners=True)`."""
    unit = _unit(inverse, height, width)
    shift = torch.stack(
        [inverse[:, 0, 2] * (2 / max(width - 1, 1)), inverse[:, 1, 2] * (2 / max(height - 1, 1))], dim=1
    )
    x = torch.arange(size[1], device=inverse.device, dtype=inverse.dtype) - (size[1] - 1) / 2
    y = torch.arange(size[0], device=inverse.device, dtype=inverse.dtype) - (size[0] - 1) / 2
    along_x = unit[:, :, 0, None] * x
    along_y = unit[:, :, 1, None] * y + shift[:, :, None]
    # (N, 2, H, W) first: adding along long rows is 8 times as fast on a CPU as along pairs.
    return (along_y[:, :, :, None] + along_x[:, :, None, :]).permute(0, 2, 3, 1)


def _steps(inverse: Tensor, height: int, width: int, samples: int, across: int) -> list[Tensor]:
    """(N, 2) from the middle of an output pixel to each of its readings, in `grid_sample`'s coordinates; none for one
    in the middle."""
    if samples > 1:
        along_x, along_y = (_spread(inverse[:, :2, axis], samples) for axis in (0, 1))
        unit = _unit(inverse, height, width)
        return [
            unit[:, :, 0] * along_x[:, i, None] + unit[:, :, 1] * along_y[:, j, None]
            for i in range(samples)
            for j in range(samples)
        ]
    if across > 1:
        row = inverse[:, 0, :2]
        offsets = _spread(row, across) * row.square().sum(1, keepdim=True).sqrt() * (2 / max(width - 1, 1))
        return [torch.stack([offsets[:, i], torch.zeros_like(offsets[:, i])], dim=1) for i in range(across)]
    return []


def _spread(column: Tensor, samples: int) -> Tensor:
    """(N, samples) offsets of the readings along one output axis, in output pixels.

    `column` (N, 2) is that axis in the input, of length s. Evenly spaced offsets k·d have variance
    d²·(samples² - 1)/12, which is to be (1 - 1/s²)/6.
    """
    covered = column.square().sum(1)
    spacing = ((1 - 1 / covered).clamp(min=0) * (2 / (samples**2 - 1))).sqrt()
    offsets = torch.arange(samples, device=column.device, dtype=column.dtype) - (samples - 1) / 2
    return spacing[:, None] * offsets


def move_box(box: Tensor, matrix: Tensor, size: tuple[int, int], to: tuple[int, int] | None = None) -> Tensor:
    """The bounds of the moved corners, clipped to the image: (N, 4) (x1, y1, x2, y2) in [0, 1].

    `size` is the image's (height, width), `to` the result's, where that is another.

    A box that leaves the image becomes (0, 0, 0, 0), and stays so wherever it is moved next.
    """
    height, width = size
    to_height, to_width = size if to is None else to
    x1, y1, x2, y2 = box.unbind(1)
    x = torch.stack([x1, x2, x1, x2], dim=1) * width - width / 2
    y = torch.stack([y1, y1, y2, y2], dim=1) * height - height / 2
    new_x = (matrix[:, 0, 0, None] * x + matrix[:, 0, 1, None] * y + matrix[:, 0, 2, None]) / to_width + 0.5
    new_y = (matrix[:, 1, 0, None] * x + matrix[:, 1, 1, None] * y + matrix[:, 1, 2, None]) / to_height + 0.5
    moved = torch.stack([new_x.amin(1), new_y.amin(1), new_x.amax(1), new_y.amax(1)], dim=1).clamp(0, 1)
    there = ((box[:, 2:] > box[:, :2]) & (moved[:, 2:] > moved[:, :2])).all(1)
    return torch.where(there[:, None], moved, 0.0)
