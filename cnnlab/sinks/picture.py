"""Quantities over depth and time, as pictures: rows are layers, columns are sampled steps. Loads no torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cnnlab.terminal import one_line

MAX_ROWS = 128
MAX_COLUMNS = 256

_ANCHORS = "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725"
"""Ten evenly spaced colors of viridis, a colormap of even lightness steps that the color-blind can read."""

ZERO = (0, 0, 0)
"""A zero on a log scale: a dead layer."""
NON_FINITE = (220, 30, 30)
UNKNOWN = (128, 128, 128)
_INK, _PAPER = (40, 40, 40), (255, 255, 255)


def _viridis() -> np.ndarray:
    anchors = np.array([[int(c[i : i + 2], 16) for i in (0, 2, 4)] for c in _ANCHORS.split()], dtype=float)
    at = np.linspace(0, len(anchors) - 1, 256)
    channels = [np.interp(at, np.arange(len(anchors)), anchors[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=1).round().astype(np.uint8)


VIRIDIS = _viridis()
"""(256, 3) uint8, from dark (low) to bright (high)."""


@dataclass
class History:
    """One quantity over the sampled steps, in bounded memory; `log` says on which scale it is read.

    A network deeper than `MAX_ROWS` has neighboring layers share a row, which shows the one that lies
    furthest from the network's median, so that a single sick layer stays visible. After `MAX_COLUMNS` samples
    every second one is dropped and only every second is taken from there on, so that the whole run stays in
    the picture.
    """

    names: list[str]
    log: bool = True
    steps: list[int] = field(default_factory=list)
    columns: list[np.ndarray] = field(default_factory=list)
    _stride: int = 1
    _seen: int = 0

    def add(self, step: int, values: Sequence[float]) -> None:
        if self._seen % self._stride == 0:
            self.steps.append(step)
            self.columns.append(_reduced(np.asarray(values, dtype=np.float64), self.log))
        self._seen += 1
        if len(self.columns) >= MAX_COLUMNS:
            self.steps, self.columns, self._stride = self.steps[::2], self.columns[::2], self._stride * 2

    def values(self) -> np.ndarray:
        """(rows, samples), the first layer on top."""
        return np.stack(self.columns, axis=1)


def _reduced(values: np.ndarray, log: bool) -> np.ndarray:
    if len(values) <= MAX_ROWS:
        return values
    with np.errstate(divide="ignore", invalid="ignore"):
        level = np.log(values) if log else values
    known = np.isfinite(level)
    distance = np.full(len(values), np.inf)
    if known.any():
        distance[known] = np.abs(level[known] - np.median(level[known]))
    edges = np.linspace(0, len(values), MAX_ROWS + 1).astype(int)
    return np.array([values[a:b][np.argmax(distance[a:b])] for a, b in itertools.pairwise(edges)])


@dataclass(frozen=True)
class Scale:
    """How values become colors: linear or logarithmic between `low` and `high`."""

    low: float
    high: float
    log: bool

    @classmethod
    def of(cls, values: np.ndarray, log: bool, bounds: tuple[float, float] | None = None) -> Scale:
        """The range of the finite values (positive ones on a log scale), without the outermost 1 % on each
        side, so that one early peak does not darken all that follows."""
        if bounds is not None:
            return cls(*bounds, log)
        usable = values[np.isfinite(values) & ((values > 0) | (not log))]
        if not usable.size:
            return cls(1.0, 10.0, log) if log else cls(0.0, 1.0, log)
        low, high = (float(edge) for edge in np.quantile(usable, (0.01, 0.99)))
        if log:
            # at least a decade: on a narrower scale noise would look like structure
            widened = max(1.0, (10.0 / (high / low)) ** 0.5)
            return cls(low / widened, high * widened, log)
        return cls(low, high if high > low else low + 1.0, log)

    def colors(self, values: np.ndarray) -> np.ndarray:
        """(...,) -> (..., 3) uint8."""
        known = np.isfinite(values) & ((values > 0) | (not self.log))
        safe = np.where(known, values, self.high)
        low, high = self.low, self.high
        if self.log:
            safe, low, high = np.log(safe), np.log(low), np.log(high)
        level = np.clip((safe - low) / (high - low), 0, 1)
        colors = VIRIDIS[(level * 255).round().astype(int)]
        if self.log:
            colors[np.isfinite(values) & (values <= 0)] = ZERO
        colors[np.isinf(values)] = NON_FINITE
        colors[np.isnan(values)] = UNKNOWN
        return colors


def depth_picture(title: str, history: History, *, bounds: tuple[float, float] | None = None) -> np.ndarray:
    """A heat map with its legend: (height, width, 3) uint8.

    Top to bottom: from the first layer to the last. Left to right: the sampled steps. Black is zero (log
    scale only), red infinite, gray unknown (NaN, or no value).
    """
    values, log = history.values(), history.log
    scale = Scale.of(values, log, bounds)
    tall = int(np.clip(320 // values.shape[0], 2, 24))
    wide = int(np.clip(-(-480 // values.shape[1]), 2, 48))
    heat = scale.colors(values).repeat(tall, axis=0).repeat(wide, axis=1)
    top, left, side, bottom = 22, 8, 96, 36
    height = top + max(heat.shape[0], 64) + bottom
    canvas = np.full((height, left + max(heat.shape[1], 320) + side, 3), _PAPER, dtype=np.uint8)
    canvas[top : top + heat.shape[0], left : left + heat.shape[1]] = heat
    bar_height = max(heat.shape[0], 64)
    bar = VIRIDIS[np.linspace(255, 0, bar_height).round().astype(int)][:, None].repeat(12, axis=1)
    bar_left = left + max(heat.shape[1], 320) + 16
    canvas[top : top + bar_height, bar_left : bar_left + 12] = bar
    middle = (scale.low * scale.high) ** 0.5 if log else (scale.low + scale.high) / 2
    below = top + heat.shape[0] + 4
    return with_text(
        canvas,
        [
            (left, 5, f"{title}: {shortened(history.names[0])} (top) to {shortened(history.names[-1])} (bottom)"),
            (left, below, f"step {history.steps[0]:,} to {history.steps[-1]:,}, left to right"),
            (left, below + 14, ("black: 0   " if log else "") + "red: infinite   gray: unknown"),
            (bar_left + 18, top - 4, f"{scale.high:.2g}"),
            (bar_left + 18, top + bar_height // 2 - 6, f"{middle:.2g}"),
            (bar_left + 18, top + bar_height - 8, f"{scale.low:.2g}"),
        ],
    )


def shortened(name: str, most: int = 24) -> str:
    """The name in one line, or the end of it."""
    name = one_line(name)
    return name if len(name) <= most else f"...{name[-most + 3 :]}"


def with_text(canvas: np.ndarray, words: Sequence[tuple[int, int, str]]) -> np.ndarray:
    """The canvas (H, W, 3) uint8 with each `(x, y, text)` on it, in dark letters of 11 pixels."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.fromarray(canvas)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    for x, y, text in words:
        draw.text((x, y), text, fill=_INK, font=font)
    return np.asarray(image)


def enlarged(picture: np.ndarray, least: int = 96) -> np.ndarray:
    """(H, W, 3) -> (k·H, k·W, 3), by whole pixels, so that the longer side has at least `least`."""
    times = max(1, -(-least // max(picture.shape[:2])))
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def png(picture: np.ndarray) -> bytes:
    """The picture (H, W, 3) uint8 as a PNG file."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format="PNG")
    return buffer.getvalue()
