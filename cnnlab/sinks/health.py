"""A statistics record as a few strips, one a quantity, that show the health of every layer. Loads no torch.

A strip has at most `COLUMNS` cells from the first layer (left) to the last, however deep the network is. A
cell's height is the value, its verdict the color. The thresholds:

| quantity | watch | bad | after |
|---|---|---|---|
| activation std, as a multiple of the first layer's | x10 | x100, zero, non-finite | SageMaker Debugger: variance x10 at the start of training; a trained network drifts further, hence x100 in variance |
| dead units, share of a layer | 10 % | 50 % | SageMaker Debugger's rule of 50 % |
| zeros, where no unit's death is known | 90 % | 99 % | a healthy ReLU layer has about 50 % |
| saturated, share of the activations | 10 % | 50 % | 2 to 3 % in a healthy tanh network; SageMaker Debugger: 50 % |
| activation gradient std, as a multiple of the last layer's | below 0.01, above 10 | below 0.001 and itself below 1e-4, above 70, zero, non-finite | AUTOTRAINER (Zhang et al. 2021), on activation instead of weight gradients, which cannot tell He from Xavier |
| update/weight, per tensor but biases, at the full learning rate | outside 1e-4 .. 1e-2 | below 1e-7, above 0.1 | CS231n: about 1e-3 |
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from cnnlab.sinks.records import by_depth

COLUMNS = 24
LEAST_ANNEALED = 0.01
"""Of the highest learning rate."""


class Verdict(IntEnum):
    """How a layer does; the larger the worse."""

    UNKNOWN = 0
    GOOD = 1
    WATCH = 2
    BAD = 3


@dataclass(frozen=True)
class Cell:
    """One layer, or the worst of several neighbors. `height` in [0, 1]; `None` where there is no finite
    value."""

    height: float | None
    verdict: Verdict


@dataclass(frozen=True)
class Strip:
    """One quantity over depth. `words` names the finding at the worst layer; empty when all is well."""

    title: str
    cells: tuple[Cell, ...]
    first: float
    last: float
    verdict: Verdict
    words: str


@dataclass(frozen=True)
class _Rule:
    """How to judge one quantity: `relative` makes the values multiples of a reference, `judge` takes the
    multiple and the value, `describe` puts the worst layer in words."""

    quantity: str
    title: str
    judge: Callable[[float, float], Verdict]
    describe: Callable[[float, float], str]
    relative: Callable[[Sequence[float]], float] = lambda values: 1.0
    share: bool = False
    scales_with_rate: bool = False


def _band(value: float, watch: tuple[float, float], bad: tuple[float, float]) -> Verdict:
    if not bad[0] <= value <= bad[1]:
        return Verdict.BAD
    return Verdict.GOOD if watch[0] <= value <= watch[1] else Verdict.WATCH


def _signal(ratio: float, value: float) -> Verdict:
    return Verdict.BAD if not math.isfinite(value) else _band(ratio, (0.1, 10), (0.01, 100))


def _gradient(ratio: float, value: float) -> Verdict:
    if not math.isfinite(value) or value == 0 or (ratio < 1e-3 and value < 1e-4) or ratio > 70:
        return Verdict.BAD
    return _band(ratio, (0.01, 10), (0, 70))


def _update(ratio: float, value: float) -> Verdict:
    return Verdict.UNKNOWN if math.isnan(value) else _band(value, (1e-4, 1e-2), (1e-7, 0.1))


def _share(watch: float, bad: float) -> Callable[[float, float], Verdict]:
    def judge(ratio: float, value: float) -> Verdict:
        return Verdict.UNKNOWN if math.isnan(value) else _band(value, (0, watch), (0, bad))

    return judge


def _reference(values: Sequence[float]) -> float:
    return next((value for value in values if math.isfinite(value) and value > 0), 1.0)


_UPDATE_RATIO = "update/ratio"
_DEAD = _Rule("activation/dead", "dead units", _share(0.1, 0.5), lambda r, v: f"{v:.0%} dead", share=True)
_ZEROS = _Rule("activation/zeros", "zeros", _share(0.9, 0.99), lambda r, v: f"{v:.1%} zero", share=True)
_SATURATED = _Rule("activation/saturated", "saturated", _share(0.1, 0.5), lambda r, v: f"{v:.0%} saturated", share=True)
_RULES = (
    _Rule(
        "activation/std",
        "activation std",
        _signal,
        lambda r, v: f"{r:.2g} times the first layer's" if math.isfinite(v) else "not finite",
        _reference,
    ),
    _DEAD,
    _ZEROS,
    _SATURATED,
    _Rule(
        "activation_gradient/std",
        "gradient std",
        _gradient,
        lambda r, v: f"{r:.2g} times the last layer's" if math.isfinite(v) else "not finite",
        lambda values: _reference(values[::-1]),
    ),
    _Rule(
        _UPDATE_RATIO,
        "update/weight",
        _update,
        lambda r, v: f"{v:.2g} of its weight a step at the full rate, where 0.001 is usual",
        lambda values: 1e-3,
        scales_with_rate=True,
    ),
)


def health(record: Mapping[str, Any], annealed: float = 1.0) -> list[Strip]:
    """The strips of a statistics record, for the quantities that it has.

    `annealed` is the learning rate as a share of the run's highest: updates shrink with it, and are judged as
    they would be at the highest rate, or every cosine would end in alarm. Of a rate below `LEAST_ANNEALED` they are
    not judged: many an update is rounded away then.
    """
    quantities = by_depth(record)
    if _DEAD.quantity in quantities:
        quantities.pop(_ZEROS.quantity, None)
    if not any(value > 0 for value in quantities.get(_SATURATED.quantity, ([], []))[1]):
        quantities.pop(_SATURATED.quantity, None)
    if annealed < LEAST_ANNEALED:
        quantities.pop(_UPDATE_RATIO, None)
    if _UPDATE_RATIO in quantities:
        quantities[_UPDATE_RATIO] = _without_biases(*quantities[_UPDATE_RATIO])
    return [
        _strip(rule, *quantities[rule.quantity], annealed if rule.scales_with_rate else 1.0)
        for rule in _RULES
        if rule.quantity in quantities
    ]


def _without_biases(names: list[str], values: list[float]) -> tuple[list[str], list[float]]:
    """Biases start at zero, where any update is large beside them; they are left out unless there is nothing
    else."""
    kept = [(name, value) for name, value in zip(names, values, strict=True) if not name.endswith("bias")]
    return ([name for name, _ in kept], [value for _, value in kept]) if kept else (names, values)


def _strip(rule: _Rule, names: list[str], values: list[float], scale: float) -> Strip:
    reference = rule.relative(values)
    judged = [value / scale for value in values]
    ratios = [value / reference for value in judged]
    verdicts = [rule.judge(ratio, value) for ratio, value in zip(ratios, judged, strict=True)]
    heights = _heights(values, rule.share)
    columns = min(COLUMNS, len(values))
    groups = [
        range(c * len(values) // columns, (c + 1) * len(values) // columns)  # neighbors share a cell
        for c in range(columns)
    ]
    shown = [max(group, key=lambda position: verdicts[position]) for group in groups]
    excess = values if rule.share else [_excess(ratio) for ratio in ratios]
    worst = max(range(len(values)), key=lambda position: (verdicts[position], excess[position]))
    words = ""
    if verdicts[worst] >= Verdict.WATCH:
        words = f"{names[worst]}: {rule.describe(ratios[worst], judged[worst])}"
    cells = tuple(Cell(heights[position], verdicts[position]) for position in shown)
    return Strip(rule.title, cells, values[0], values[-1], verdicts[worst], words)


def _excess(ratio: float) -> float:
    """How far a multiple is from 1, on a log scale."""
    if not math.isfinite(ratio) or ratio <= 0:
        return math.inf
    return abs(math.log(ratio))


def _heights(values: Sequence[float], share: bool) -> list[float | None]:
    """Shares as they are; other quantities on a log scale over their own range, of at least two decades (so
    that a factor of 2 does not look like a cliff)."""
    if share:
        return [min(max(value, 0.0), 1.0) if math.isfinite(value) else None for value in values]
    logs = [math.log10(value) if math.isfinite(value) and value > 0 else None for value in values]
    known = [value for value in logs if value is not None]
    if not known:
        return [None] * len(values)
    low, high = min(known), max(known)
    slack = max(0.0, 2.0 - (high - low)) / 2
    low, high = low - slack, high + slack
    return [None if value is None else (value - low) / (high - low) for value in logs]
