"""An evaluation as figures: confusion, calibration, IoU, robustness. Drawn by matplotlib, the extra `figures`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cnnlab.assess.calibration import Calibration
from cnnlab.assess.intervals import wilson
from cnnlab.sinks.figures import COLOURS, blank
from cnnlab.sinks.picture import shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_NAMES, MOST_NUMBERS = 60, 20
"""Classes up to which a confusion matrix has names at its sides, and numbers in its cells."""


def confusion(counts: Tensor, names: Sequence[str], unit: str) -> Figure:
    """Rows are the truth and sum to 1; a cell's number is its count.

    Args:
        counts: (classes, classes).
        unit: what is counted: `images`, `pixels`.
    """
    counts = counts.double().cpu()
    total = counts.sum(1, keepdim=True)
    share = torch.where(total > 0, counts / total, torch.nan)
    classes = len(names)
    side = min(16.0, max(4.5, 2.2 + 0.42 * min(classes, 30)))
    figure, ax = blank(side + 1.2, side)
    ax.set_facecolor("0.85")  # of classes that do not occur
    ax.spines[:].set_visible(False)
    image = ax.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=ax, label="share of the class", fraction=0.046, pad=0.02)
    ax.set_xlabel("predicted")
    ax.set_ylabel(f"true ({unit})")
    if classes <= MOST_NAMES:
        words = [shortened(name, 18) for name in names]
        size = 9 if classes <= 30 else 6
        ax.set_xticks(range(classes), words, rotation=45, ha="right", rotation_mode="anchor", fontsize=size)
        ax.set_yticks(range(classes), words, fontsize=size)
        _plain([*ax.get_xticklabels(), *ax.get_yticklabels()])
    if classes <= MOST_NUMBERS:
        for row in range(classes):
            for column in range(classes):
                number = int(counts[row, column])
                if number:
                    dark = share[row, column] > 0.5
                    ax.text(column, row, _short(number), ha="center", va="center", fontsize=7,
                            color="white" if dark else "0.2")  # fmt: skip
    return figure


def reliability(found: Calibration, unit: str) -> Figure:
    """Accuracy against confidence, with each bin's 95 % interval where answers are independent; and their number."""
    figure, axes = blank(5.2, 5.6, 2, 1)
    upper, lower = axes
    upper.get_gridspec().set_height_ratios([3, 1])
    bins, width = found.bins, 1 / len(found.bins)
    rows = [row for row in bins.tolist() if row[0]]
    at = [confidence / count for count, confidence, _ in rows]
    accuracy = [right / count for count, _, right in rows]
    upper.plot([0, 1], [0, 1], color="0.6", linewidth=1, label="calibrated")
    upper.bar(
        at,
        [a - c for a, c in zip(accuracy, at)],
        bottom=at,
        width=0.6 * width,
        color=COLOURS[1],
        alpha=0.35,
        label="gap",
    )
    if found.chance is not None:
        ends = [wilson(right, count) for count, _, right in rows]
        bars = [[a - low for a, (low, _) in zip(accuracy, ends)], [high - a for a, (_, high) in zip(accuracy, ends)]]
        upper.errorbar(at, accuracy, yerr=bars, fmt="o", markersize=4, color=COLOURS[0], elinewidth=1, label="95 %")
    else:
        upper.plot(at, accuracy, "o", markersize=4, color=COLOURS[0], label="accuracy")
    upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    upper.legend(frameon=False, fontsize=8, loc="upper left")
    upper.set_title(f"ECE {found.ece:.4f}, {len(bins)} bins of equal width", fontsize=10)
    lower.bar(
        [(number + 0.5) * width for number in range(len(bins))],
        bins[:, 0].tolist(),
        width=0.9 * width,
        color=COLOURS[0],
    )
    lower.set(xlim=(0, 1), xlabel="confidence", ylabel=unit)
    return figure


def overlaps(values: Tensor, of: str) -> Figure:
    """How many images have which IoU.

    Args:
        values: (N,); NaN counts nowhere.
        of: what overlaps: `mean IoU of an image`, `IoU of a box`.
    """
    known = values.double()[values.isfinite()]
    figure, ax = blank(5.6, 3.6)
    ax.hist(known.numpy(), bins=[number / 20 for number in range(21)], color=COLOURS[0], rwidth=0.9)
    if len(known):
        for value, name, line in ((known.mean(), "mean", "-"), (known.median(), "median", "--")):
            ax.axvline(value.item(), color=COLOURS[1], linestyle=line, label=f"{name} {value.item():.3f}")
        ax.legend(frameon=False, fontsize=8)
    ax.set(xlim=(0, 1), xlabel=of, ylabel="images")
    return figure


def robustness(found: Mapping[str, Any]) -> Figure:
    """The metric by strength, a line each corruption."""
    figure, ax = blank(6.4, 4.2)
    strengths: Sequence[int] = range(1)
    for number, (name, row) in enumerate(found["corruptions"].items()):
        if "values" in row:
            values = [found["clean"], *row["values"]]
            strengths = range(len(values))
            ax.plot(strengths, values, marker="o", markersize=3, color=COLOURS[number % len(COLOURS)], label=name)
    ax.set_xticks(list(strengths), ["clean", *map(str, strengths[1:])])
    ax.set(xlabel="strength", ylabel=found["metric"], title=f"{found['samples']:,} samples, mean {found['mean']:.4f}")
    if found["metric"].rpartition("/")[2] != "loss":
        ax.set_ylim(0, 1)
    ax.title.set_fontsize(10)
    ax.legend(frameon=False, fontsize=8)
    return figure


def _plain(texts: Sequence[Any]) -> None:
    """What people wrote is text: no `$formula$`."""
    for text in texts:
        text.set_parse_math(False)


def _short(number: float) -> str:
    """In at most four letters: 950, 1.2k, 37k, 4.1M."""
    units = iter(("", "k", "M", "G", "T"))
    unit = next(units)
    while round(number) >= 1000:
        number, unit = number / 1000, next(units)
    return f"{number:.1f}{unit}" if unit and number < 9.95 else f"{number:.0f}{unit}"
