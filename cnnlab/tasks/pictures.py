"""Pictures of what a network gets and of what it makes of it: grids of cells, (3, H, W) uint8."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cnnlab.protocols import VOID
from cnnlab.sinks.picture import shortened, with_text

RIGHT, WRONG = (40, 160, 60), (210, 50, 40)
"""Frames of what was predicted rightly, and of what was not."""
TRUTH = (255, 255, 255)
"""Boxes of what is there."""
_LINE, _LETTER = 14, 6
"""Height of a line of text and width of a letter, in pixels."""


def stretched(images: Tensor, least: int = 64) -> Tensor:
    """Images (N, C, H, W) of any range as cells (N, 3, H', W') in [0, 1], on the CPU.

    Each is stretched to its own 1st to 99th percentile, because the network gets normalized values; a channel count
    other than 1 or 3 shows the first. Small ones are enlarged by whole multiples, to `least` pixels or nearly.
    """
    shown = images.detach().float().cpu()
    if shown.shape[1] != 3:
        shown = shown[:, :1].expand(-1, 3, -1, -1)
    flat = shown.flatten(1)
    low, high = torch.quantile(flat, torch.tensor([0.01, 0.99]), dim=1)
    span = (high - low).clamp_min(1e-6)
    return enlarged(((flat - low[:, None]) / span[:, None]).clamp(0, 1).view(shown.shape), least)


def enlarged(cells: Tensor, least: int) -> Tensor:
    """The cells (N, 3, H, W) by a whole multiple, so that the longer side has `least` pixels or nearly."""
    factor = max(1, least // max(cells.shape[-2:]))
    return cells.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def coloured(mask: Tensor, classes: int) -> Tensor:
    """Class indices (N, H, W) as colours (N, 3, H, W) in [0, 1], on the CPU; void is black."""
    mask = mask.cpu()
    row = torch.where(mask == VOID, classes, mask)
    return palette(classes)[row].permute(0, 3, 1, 2)


def palette(classes: int) -> Tensor:
    """(classes + 1, 3) in [0, 1]: hues around the circle, and black for void."""
    hues = torch.linspace(0, 2 * torch.pi, classes + 1)[:-1]
    shift = torch.arange(3) * (2 * torch.pi / 3)
    return torch.cat([0.55 + 0.45 * torch.cos(hues[:, None] - shift), torch.zeros(1, 3)])


def beside(*panels: Tensor, gap: int = 1) -> Tensor:
    """Cells of panels (N, 3, H, W) side by side, with a white line between them."""
    line = torch.ones(*panels[0].shape[:3], gap)
    parts = [part for panel in panels for part in (line, panel)]
    return torch.cat(parts[1:], dim=3)


def framed(cells: Tensor, colours: Sequence[tuple[int, int, int]], width: int = 2) -> Tensor:
    """The cells (N, 3, H, W) in frames of `colours`, RGB of 0 to 255."""
    paint = torch.tensor(colours)[:, :, None, None] / 255
    frames = paint.expand(-1, -1, cells.shape[2] + 2 * width, cells.shape[3] + 2 * width).clone()
    frames[:, :, width:-width, width:-width] = cells
    return frames


def boxed(cells: Tensor, boxes: Tensor, colours: Sequence[tuple[int, int, int]]) -> Tensor:
    """The cells (N, 3, H, W) with the outline of a box each, (N, 4), (x1, y1, x2, y2) in [0, 1] of width and height, in
    `colours`, RGB of 0 to 255: two pixels wide, of which the inner one is black where the colour is white. Of a box
    without area, there is none to see."""
    drawn = cells.clone()
    height, width = cells.shape[-2:]
    pixels = boxes.detach().float().cpu() * torch.tensor([width, height, width, height])
    for cell, box, (x1, y1, x2, y2), colour in zip(drawn, boxes, pixels.round().int().tolist(), colours, strict=True):
        if not (box[2:] > box[:2]).all():
            continue
        for inset, paint in ((1, (0, 0, 0) if colour == TRUTH else colour), (0, colour)):
            left, top, right, bottom = x1 + inset, y1 + inset, max(x2, x1 + 1) - inset, max(y2, y1 + 1) - inset
            if left >= right or top >= bottom:
                continue
            shade = torch.tensor(paint)[:, None, None] / 255
            for rows, columns in (
                (slice(top, bottom), slice(left, left + 1)),
                (slice(top, bottom), slice(right - 1, right)),
                (slice(top, top + 1), slice(left, right)),
                (slice(bottom - 1, bottom), slice(left, right)),
            ):
                cell[:, rows, columns] = shade
    return drawn


def captioned(cells: Tensor, captions: Sequence[Sequence[str]]) -> Tensor:
    """The cells (N, 3, H, W) with lines of text below each; what is too long for the width is cut."""
    count, _, height, width = cells.shape
    most = max(4, width // _LETTER)
    taller = torch.ones(count, 3, height + _LINE * max(map(len, captions)), width)
    taller[:, :, :height] = cells
    for number, lines in enumerate(captions):
        words = [(1, height + _LINE * line, shortened(text, most)) for line, text in enumerate(lines)]
        taller[number] = _written(taller[number], words)
    return taller


def legend(names: Sequence[str], width: int) -> Tensor:
    """(3, H, width) in [0, 1]: a patch of each class's colour with its name."""
    each = _LETTER * max(map(len, names)) + 3 * _LETTER + _LINE
    columns = max(1, width // each)
    rows = -(-len(names) // columns)
    canvas, words = torch.ones(3, rows * _LINE + 4, max(width, each)), []
    for number, colour in enumerate(palette(len(names))[:-1]):
        top, left = 3 + number // columns * _LINE, number % columns * each
        canvas[:, top : top + _LINE - 3, left + 1 : left + _LINE - 2] = colour[:, None, None]
        words.append((left + _LINE, top - 2, names[number]))
    return _written(canvas, words)


def _written(canvas: Tensor, words: Sequence[tuple[int, int, str]]) -> Tensor:
    pixels = (canvas * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return torch.from_numpy(with_text(pixels, words).copy()).permute(2, 0, 1) / 255


def picture_grid(images: Tensor, columns: int = 8, rows: int = 2) -> Tensor:
    """The first images (N, C, H, W) of a batch side by side: (3, H', W') uint8."""
    return grid(stretched(images[: columns * rows]), columns)


def grid(cells: Tensor, columns: int, gap: int = 1) -> Tensor:
    """Cells (N, 3, H, W) in [0, 1], in rows of `columns`: (3, H', W') uint8."""
    count, _, height, width = cells.shape
    used = (count + columns - 1) // columns
    canvas = torch.ones(3, used * (height + gap) - gap, columns * (width + gap) - gap)
    for i in range(count):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        canvas[:, top : top + height, left : left + width] = cells[i]
    return (canvas * 255).round().to(torch.uint8)


def above(picture: Tensor, below: Tensor) -> Tensor:
    """A picture (3, H, W) uint8 with another, (3, H', W') in [0, 1], below it."""
    width = max(picture.shape[2], below.shape[2])
    canvas = torch.full((3, picture.shape[1] + below.shape[1], width), 255, dtype=torch.uint8)
    canvas[:, : picture.shape[1], : picture.shape[2]] = picture
    canvas[:, picture.shape[1] :, : below.shape[2]] = (below * 255).round().to(torch.uint8)
    return canvas
