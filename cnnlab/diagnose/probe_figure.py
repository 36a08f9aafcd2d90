"""Signals by depth as one figure: a colour a config, solid what was measured, dashed what theory says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cnnlab.sinks.figures import COLOURS, as_written, blank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LONGEST = 46
_PANELS: tuple[tuple[str, str, bool], ...] = (
    ("pre_std", "pre-activations: standard deviation", True),
    ("std", "activations: standard deviation", True),
    ("signal", "signal: the part of it between inputs", True),
    ("gradient", "activation gradients: root mean square", True),
    ("angle", "angle between two inputs, degrees", False),
    ("effective_rank", "effective rank of the activations", False),
)


def drawn(configs: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> Figure:
    """The documents of `cnnlab.diagnose.probe.probe`, side by side."""
    from matplotlib.lines import Line2D

    figure, panels = blank(17, 7.6, 2, 4)
    *axes, values_of, words = panels.flatten()
    handles = []
    for number, (config, label) in enumerate(zip(configs, labels, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        marker = "osD^v"[number // len(COLOURS) % 5]
        look: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 3, "linewidth": 1.3}
        handles.append(Line2D([], [], label=as_written(label, _LONGEST), **look))
        for axis, (key, _, log) in zip(axes, _PANELS, strict=False):
            _curves(axis, config["layers"], key, log, look)
        values = [v for v in config["jacobian"]["singular_values"] if v > 0]
        values_of.plot(range(1, len(values) + 1), values, **look)
    for axis, (_, title, log) in zip(axes, _PANELS, strict=False):
        _dressed(axis, title, "layer", log)
    for finding, where, config, number in _places(configs):
        key = "gradient" if finding.startswith("gradient") else "signal"
        axis = axes[[panel[0] for panel in _PANELS].index(key)]
        value = config["layers"][where][key]
        if _is_drawn(value, True):
            colour = COLOURS[number % len(COLOURS)]
            axis.plot([where + 1], [value], marker="x", markersize=11, markeredgewidth=2.5, color=colour)
    exact = all(config["jacobian"]["exact"] for config in configs)
    title = "singular values of the input-output Jacobian" + ("" if exact else "\n(in random directions of the output)")
    _dressed(values_of, title, "number", True)
    dashed = Line2D([], [], color="#555555", linestyle="--", linewidth=1.3, label="theory (mean field)")
    cross = Line2D([], [], color="#555555", linestyle="", marker="x", markersize=9, label="dies, or explodes, here")
    words.axis("off")
    size = "small" if len(handles) <= 20 else "xx-small"
    words.legend(handles=[*handles, dashed, cross], loc="upper left", frameon=False, fontsize=size)
    return figure


def _curves(axis: Any, layers: Sequence[Mapping[str, Any]], key: str, log: bool, look: Mapping[str, Any]) -> None:
    axis.plot(*_points(layers, lambda row: row[key], log), **look)
    theory = [(row["theory"] or {}).get(key, math.nan) for row in layers]
    if any(_is_drawn(value, log) for value in theory):
        x = np.arange(1, len(theory) + 1)
        y = [value if _is_drawn(value, log) else math.nan for value in theory]
        axis.plot(x, y, color=look["color"], linestyle="--", linewidth=1.3)


def _points(
    layers: Sequence[Mapping[str, Any]], read: Callable[[Mapping[str, Any]], float], log: bool
) -> tuple[list[int], list[float]]:
    found = [(number, read(row)) for number, row in enumerate(layers, 1) if _is_drawn(read(row), log)]
    return [number for number, _ in found], [value for _, value in found]


def _is_drawn(value: float | None, log: bool) -> bool:
    return value is not None and math.isfinite(value) and (value > 0 or not log)


def _places(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, Mapping[str, Any], int]]:
    """Where each finding is: its kind, the layer's number from 0, the config and its number."""
    found = []
    for number, config in enumerate(configs):
        names = [row["name"] for row in config["layers"]]
        found += [
            (finding["kind"], names.index(finding["layer"]), config, number)
            for finding in config["findings"]
            if finding["layer"] in names
        ]
    return found


def _dressed(axis: Any, title: str, below: str, log: bool) -> None:
    axis.set_title(title, fontsize="medium")
    axis.set_xlabel(below)
    axis.grid(alpha=0.25)
    if log:
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)
