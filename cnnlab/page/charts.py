"""Curves as SVG, drawn by the page's template in the reader's own colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 26
"""Of the drawing and its margins, in the SVG's own units."""
MOST_POINTS = 400
"""Of a line; a longer one is thinned evenly, its ends kept."""

Points = Sequence[tuple[float, float | None]]
"""Of a line; `None` and what is not finite is a gap."""


@dataclass
class Chart:
    """`lines`: name, and its unbroken pieces as SVG's `points`; `x` and `y`: each tick's place and label."""

    title: str
    lines: list[tuple[str, list[str]]]
    x: list[tuple[float, str]]
    y: list[tuple[float, str]]
    x_label: str
    lost: list[str] = field(default_factory=list)
    """Names of lines without a point to draw."""


def chart(title: str, lines: Mapping[str, Points], x_label: str, *, log: bool = False) -> Chart | None:
    """`None` where there is nothing to draw.

    Args:
        log: the values on a logarithmic scale, on which those of 0 or less are gaps.
    """

    def level(value: float | None) -> float | None:
        if value is None or not math.isfinite(value) or (log and value <= 0):
            return None
        return math.log10(value) if log else value

    drawn = {name: [(x, level(y)) for x, y in thinned(points)] for name, points in lines.items()}
    known = [(x, y) for points in drawn.values() for x, y in points if y is not None]
    if not known:
        return None
    low, high = _widened(min(y for _, y in known), max(y for _, y in known))
    first, last = min(x for x, _ in known), max(x for x, _ in known)
    last = last if last > first else first + 1

    def place(x: float, y: float) -> str:
        across = LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        return f"{across:.1f},{_down(y, low, high):.1f}"

    pieces = {name: _pieces(points) for name, points in drawn.items()}
    ticks = _decades(low, high) if log else [(y, _number(y)) for y in nice(low, high)]
    across = [(LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT), _number(x)) for x in nice(first, last)]
    return Chart(
        title,
        [(name, [" ".join(place(x, y) for x, y in piece) for piece in own]) for name, own in pieces.items() if own],
        [(round(x, 1), label) for x, label in across],
        [(round(_down(y, low, high), 1), label) for y, label in ticks],
        x_label,
        [name for name, own in pieces.items() if not own],
    )


def thinned(points: Points) -> Points:
    if len(points) <= MOST_POINTS:
        return points
    return [points[round(at * (len(points) - 1) / (MOST_POINTS - 1))] for at in range(MOST_POINTS)]


def nice(low: float, high: float, about: int = 5) -> list[float]:
    """Some `about` round numbers from `low` to `high`: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _widened(low: float, high: float) -> tuple[float, float]:
    if high - low > 1e-12 * max(abs(low), abs(high)):
        return low, high
    return low - max(0.5 * abs(low), 1e-3), high + max(0.5 * abs(high), 1e-3)


def _down(y: float, low: float, high: float) -> float:
    return TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)


def _decades(low: float, high: float) -> list[tuple[float, str]]:
    whole = list(range(math.ceil(low), math.floor(high) + 1))
    if len(whole) < 2:
        return [(y, _number(10**y)) for y in (low, (low + high) / 2, high)]
    step = -(-len(whole) // 6)
    return [(number, f"1e{number}") for number in whole[::step]]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 and value == round(value) else f"{value:.3g}"


def _pieces(points: Sequence[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """A single point is a piece of two equal ones, so that a round line cap shows it."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append((x, y))
    return [piece * 2 if len(piece) == 1 else piece for piece in pieces if piece]
