"""What `cnnlab eval` shows, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cnnlab.terminal import one_line, say

MOST_CLASSES = 20
"""Are shown, those with the least recall."""
_RATES = ("recall", "precision", "f1", "iou")


def show(document: Mapping[str, Any], figures: Mapping[str, float], epoch: int, *, per_class: bool) -> None:
    """All of an evaluation but its pictures.

    Args:
        epoch: of the weights.
        document: as `--json` has it.
        figures: those of it that are numbers.
    """
    say(f"{'checkpoint':<24} {document['checkpoint']}, of epoch {epoch}")
    for name, value in figures.items():
        say(f"{name:<24} {value:.4f}")
    for name, (low, high) in document["intervals"].items():
        say(f"{'95 % interval':<24} {low:.4f} to {high:.4f}  {name}, {document['samples']:,} images")
    if document["calibration"]:
        first, second = document["calibration"]["in_words"]
        say(f"{'calibration error':<24} {first}\n{'':<24} {second}")
    classes = document["classes"]
    if any(row["samples"] for row in classes):
        (_with_intervals if per_class else _worst)(classes)
    if "robustness" in document:
        _robustness(document["robustness"])
    if "top_losses" in document:
        _hardest(document["top_losses"])


def _worst(classes: Sequence[Mapping[str, Any]]) -> None:
    found = [row for row in classes if row["samples"]]
    worst = sorted(found, key=lambda row: row["recall"])[:MOST_CLASSES]
    heading = "class" if len(worst) == len(found) else f"worst {MOST_CLASSES} of {len(found)}"
    say(f"\n{heading:<24} {'samples':>9} {'recall':>7} {'precision':>9} {'IoU':>7}  mostly taken for")
    for row in worst:
        recall, precision, iou = ("-" if row[k] is None else f"{row[k]:.4f}" for k in ("recall", "precision", "iou"))
        name, taken_for = one_line(row["class"]), one_line(row["taken_for"] or "")
        say(f"{name:<24} {row['samples']:>9,} {recall:>7} {precision:>9} {iou:>7}  {taken_for}".rstrip())


def _with_intervals(classes: Sequence[Mapping[str, Any]]) -> None:
    """All classes, with those rates that have an interval."""
    rates = [name for name in _RATES if any(f"{name}_interval" in row for row in classes)] or list(_RATES)
    width = max(5, *(len(one_line(row["class"])) for row in classes))
    heads = "".join(f"  {'IoU' if name == 'iou' else 'F1' if name == 'f1' else name:>9} {'95 %':^11}" for name in rates)
    say(f"\n{'class':<{width}} {'samples':>9}{heads}")
    for row in classes:
        cells = ""
        for name in rates:
            value, pair = row.get(name), row.get(f"{name}_interval")
            told = "-" if value is None else f"{value:.4f}"
            cells += f"  {told:>9} " + ("" if pair is None else f"{_rate(pair[0])} to {_rate(pair[1])}").ljust(11)
        say(f"{one_line(row['class']):<{width}} {row['samples']:>9,}{cells}".rstrip())


def _rate(value: float) -> str:
    """`.123`, and `1` for what rounds to it."""
    told = f"{value:.3f}"
    return told.removeprefix("0") if told != "1.000" else "1.00"


def _robustness(found: Mapping[str, Any]) -> None:
    rows = found["corruptions"]
    strengths = max((len(row["values"]) for row in rows.values() if "values" in row), default=0)
    heads = "".join(f" {number:>7}" for number in range(1, strengths + 1))
    say(f"\n{'strength':<10} {'clean':>7}{heads} {'mean':>7}  {found['metric']}, {found['samples']:,} samples")
    for name, row in rows.items():
        if "values" not in row:
            say(f"{name:<10} left out: {one_line(row['left_out'])}")
            continue
        values = "".join(f" {value:>7.4f}" for value in row["values"])
        say(f"{name:<10} {found['clean']:>7.4f}{values} {row['mean']:>7.4f}")
    say(f"{'mean':<10} {found['clean']:>7.4f}{'':{8 * strengths}} {found['mean']:>7.4f}")
    for name, row in rows.items():
        if "values" in row:
            say(f"{name:<10} {row['formula']}")


def _hardest(rows: Sequence[Mapping[str, Any]]) -> None:
    say(f"\n{'loss':>9}  {'true':<16} {'predicted':<24} sample")
    for row in rows:
        guess = one_line(row.get("predicted", ""))
        guess += f" {row['probability']:.3f}" if "probability" in row else ""
        guess += f" IoU {row['iou']:.3f}" if "iou" in row else ""
        say(f"{row['loss']:>9.4f}  {one_line(row.get('label', '')):<16} {guess.strip():<24} {one_line(row['sample'])}")
