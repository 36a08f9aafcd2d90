"""Pictures of maps: a row for each target, a column for each map; what is in a map is never stretched beyond it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cnnlab.explain.maps import Map
from cnnlab.sinks.picture import VIRIDIS
from cnnlab.tasks.pictures import above, captioned, enlarged, grid, stretched

SIDE = 192
"""Pixels of a cell's longer side, or nearly: room for the captions."""
_GREY = 0.6
"""How much of the image is left under a map."""
_CLIP = 0.995
"""Of the magnitudes of pixels: single ones are far above the rest (Smilkov et al. 2017, section 2)."""
_FOR, _AGAINST = (0.84, 0.15, 0.16), (0.12, 0.35, 0.75)
LEGEND = (
    "yellow: the map's maximum; dark, or the bare image: 0",
    "red speaks for the target, blue against it; full colour: the largest magnitude (of pixels: its 99.5 %)",
)
TRUST = "trust: score, floor (the same of maps that know nothing); NOT above: not shown at 95 % on the images measured"


@dataclass
class Row:
    """One target of one image: its maps, what the target is called, and how the network scores it."""

    target: str
    score: float
    probability: float | None
    maps: list[tuple[Map, int]]
    """Each with the image's place in it."""
    verdicts: list[str] = field(default_factory=list)
    """Below each map, where there is something to say, a line each."""

    def said(self) -> str:
        likely = "" if self.probability is None else f", p {self.probability:.3f}"
        return f"{self.target}: {self.score:.3g}{likely}"


def page(image: Tensor, rows: Sequence[Row], about: Sequence[str]) -> Tensor:
    """(3, H, W) uint8.

    Args:
        image: (C, H, W), uint8 or of any range.
        about: lines below the image itself.
    """
    shown = cell(image)
    lines = []
    for row in rows:
        cells, captions = [shown], [list(about)]
        verdicts = row.verdicts or [""] * len(row.maps)
        for (found, at), verdict in zip(row.maps, verdicts, strict=True):
            cells.append(painted(shown, found, at))
            captions.append(_caption(row, found, at, verdict))
        most = max(map(len, captions))
        lines.append(captioned(torch.stack(cells), [[*words, *[""] * (most + 1 - len(words))] for words in captions]))
    picture = torch.cat([grid(line, len(line), gap=4) for line in lines], 1)
    legend = (*LEGEND, *([TRUST] if any(any(row.verdicts) for row in rows) else []))
    return above(picture, _written(legend, picture.shape[2]))


def _written(lines: Sequence[str], width: int) -> Tensor:
    return captioned(torch.ones(1, 3, 4, width), [list(lines)])[0]


def _caption(row: Row, found: Map, at: int, verdict: str) -> list[str]:
    values = found.values[at]
    missing = found.evidence[at]
    scale = f"{missing}: no evidence" if missing else f"max {_largest(values):.2g}"
    return [found.method, *([found.layer] if found.layer else []), row.said(), scale, *verdict.splitlines()]


def _largest(values: Tensor) -> float:
    return values.abs().max().item()


def cell(image: Tensor) -> Tensor:
    """(3, H', W') in [0, 1]: an image (C, H, W), enlarged or reduced to about `SIDE`."""
    if image.dtype == torch.uint8:
        shown = image.float().cpu()[None] / 255
        shown = shown if shown.shape[1] == 3 else shown[:, :1].expand(-1, 3, -1, -1)
    else:
        shown = stretched(image[None], 1)
    if max(shown.shape[-2:]) > 2 * SIDE:
        factor = 2 * SIDE / max(shown.shape[-2:])
        shown = interpolate(shown, scale_factor=factor, mode="bilinear", antialias=True).clamp(0, 1)
    return enlarged(shown, SIDE)[0]


def painted(shown: Tensor, found: Map, at: int) -> Tensor:
    """(3, H', W') in [0, 1]: the image `shown`, grey, with a map over it; grey alone where it is without evidence."""
    grey = (_GREY * shown.mean(0) + (1 - _GREY) / 2).expand(3, -1, -1)
    if found.evidence[at]:
        return grey
    values = interpolate(found.values[at][None, None], shown.shape[-2:], mode="nearest")[0, 0]
    most = _largest(values) if found.coarse else torch.quantile(found.values[at].abs().flatten(), _CLIP).item()
    level = (values / (most or _largest(values))).clamp(-1, 1)
    if found.signed:
        paint = torch.where(level[None] > 0, _colour(_FOR), _colour(_AGAINST))
        strength = level.abs()
    else:
        paint = torch.from_numpy(VIRIDIS)[(level * 255).round().long()].permute(2, 0, 1) / 255
        if not found.coarse:
            return paint
        strength = level.sqrt() * 0.8
    return torch.lerp(grey, paint, strength.expand(3, -1, -1))


def _colour(rgb: tuple[float, float, float]) -> Tensor:
    return torch.tensor(rgb)[:, None, None]
