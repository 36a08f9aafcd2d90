"""What a page shows of a run folder. What is missing or damaged there is left out, and the page says so."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cnnlab.page.charts import Chart, chart
from cnnlab.runs.folder import RunDir
from cnnlab.sinks.jsonl import read_records
from cnnlab.sinks.records import by_depth, current, figures
from cnnlab.terminal import one_line

MOST_PICTURES = 24
"""Of `explain/` that are shown."""
MOST_CLASSES = 100
"""Rows of the table of classes."""
MOST_BYTES = 8 << 20
"""Of a picture or a document that is taken in."""
_PNG = b"\x89PNG\r\n\x1a\n"
_BY_DEPTH = (("activation/std", "std of activations"), ("activation_gradient/std", "std of their gradients"))
_RATES = {"recall": "recall", "precision": "precision", "f1": "F1", "iou": "IoU"}
_SHOWN_FACTS = (
    *("device", "precision", "step", "parameters", "flops", "steps", "epochs", "seconds", "images_per_second"),
    *("seed", "config_hash", "git_commit", "platform"),
)


@dataclass
class Picture:
    """`source` is the image itself, as a `data:` address."""

    title: str
    source: str
    about: str = ""
    wide: bool = False
    """Whether it is a row of panels, which is not made smaller."""


@dataclass
class Contents:
    """In words and numbers; nothing in it is markup."""

    title: str
    folder: str
    status: str
    reason: str
    headline: list[tuple[str, str]]
    facts: list[tuple[str, str]]
    choices: list[tuple[str, str]]
    overrides: list[str]
    curves: list[Chart]
    evaluation: Mapping[str, Any] | None
    drawn: list[Picture]
    explained: list[Picture]
    notices: list[str] = field(default_factory=list)


def contents_of(folder: RunDir, pictures: Path | None = None) -> Contents:
    """
    Args:
        pictures: where those of `cnnlab explain` are; `None` takes the run's own.

    Raises `UsageError` where there is no run.
    """
    record, notices = folder.read(), list[str]()
    if not record:
        notices.append("run.json is gone or empty: what it told of the run is lost")
    explained, more = _explained(pictures or folder.path / "explain")
    notices += more
    left_out = record.get("left_out") or []
    if left_out:
        notices.append(f"{len(left_out):,} files of the data could not be read, and were left out")
    return Contents(
        title=one_line(_name(folder)),
        folder=one_line(folder.path.name),
        status=one_line(record.get("status") or "unknown"),
        reason=one_line(record.get("reason") or ""),
        headline=list(_headline(record)),
        facts=[(name.replace("_", " "), _told(record[name])) for name in _SHOWN_FACTS if record.get(name) is not None],
        choices=[(name, one_line(value)) for name, value in _choices(record)],
        overrides=_overrides(folder),
        curves=[*_curves(folder), *_depth(folder)],
        evaluation=_evaluation(folder, notices),
        drawn=list(_figures(folder.path / "figures")),
        explained=explained,
        notices=notices,
    )


def _name(folder: RunDir) -> str:
    try:
        return str(folder.config().get("name") or folder.path.name)
    except Exception:  # a folder's config may be anything; its name is no reason to go without a page
        return folder.path.name


def _overrides(folder: RunDir) -> list[str]:
    try:
        return [one_line(text) for text in folder.overrides()]
    except Exception:
        return []


def _told(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return one_line(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def _headline(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in (record.get("metrics") or {}).items():
        if isinstance(value, int | float) and name.rpartition("/")[2] not in ("data_loss", "penalty"):
            yield one_line(name), f"{value:.4g}"
    best = record.get("best")
    if isinstance(best, Mapping) and isinstance(best.get("value"), int | float):
        yield f"best {one_line(best.get('metric', ''))}", f"{best['value']:.4g} in epoch {one_line(best.get('epoch'))}"


def _choices(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    choices = record.get("choices")
    if isinstance(choices, Mapping):
        yield from ((name, value) for name, value in sorted(choices.items()) if value not in (None, "none", "default"))


# ---- curves ----


def _records(path: Path, schema: int) -> list[dict[str, Any]]:
    try:
        return list(current(read_records(path), schema))
    except Exception:  # a torn file of somebody's: the page goes without its curves
        return []


def _curves(folder: RunDir) -> Iterator[Chart]:
    """Of each figure a chart, with a line each split: the loss first, then the metrics, then the rate."""
    lines: dict[str, dict[str, list[tuple[float, float | None]]]] = {}
    for record in _records(folder.metrics, folder.schema):
        split, step = one_line(record.get("split")), record.get("step")
        if split == "test" or not isinstance(step, int):
            continue
        shown = {**figures(record), **({"lr": record["lr"]} if record.get("lr") is not None else {})}
        for name, value in shown.items():
            if name.partition("/")[0] not in ("data_loss", "penalty"):
                lines.setdefault(one_line(name), {}).setdefault(split, []).append((step, value))
    order = sorted(lines, key=lambda name: (name != "loss", name == "lr"))
    for name in order:
        found = chart(name, lines[name] if name != "lr" else {"lr": lines[name].get("train", [])}, "step")
        if found is not None:
            yield found


def _depth(folder: RunDir) -> Iterator[Chart]:
    """The layers' statistics at the first, the middle and the last sampled step."""
    described: dict[str, Any] = {}
    samples: list[dict[str, Any]] = []
    for record in _records(folder.stats, folder.schema):
        described |= {key: record[key] for key in ("layers", "tensors") if key in record}
        samples.append({**described, **record})
    chosen = {each["step"]: each for each in (samples[at] for at in (0, len(samples) // 2, -1))} if samples else {}
    for quantity, words in _BY_DEPTH:
        lines = {}
        for step, record in chosen.items():
            values = by_depth(record).get(quantity)
            if values is not None:
                lines[f"step {step:,}"] = [(float(at), value) for at, value in enumerate(values[1])]
        found = chart(words, lines, "layer, the first on the left", log=True) if lines else None
        if found is not None:
            yield found


# ---- evaluation and pictures ----


def _evaluation(folder: RunDir, notices: list[str]) -> Mapping[str, Any] | None:
    found = _document(folder.path / "figures" / "evaluation.json")
    if found is None:
        return None
    split = found.get("split", "test")
    values = {name: value for name, value in found.items() if isinstance(value, float) and name.startswith(f"{split}/")}
    classes = [row for row in found.get("classes") or [] if isinstance(row, Mapping)]
    rates = [name for name in _RATES if any(name in row for row in classes)]
    if len(classes) > MOST_CLASSES:
        notices.append(f"{MOST_CLASSES} of {len(classes):,} classes are shown, those with the least recall")
        classes = sorted(classes, key=lambda row: row.get("recall") or 0)[:MOST_CLASSES]
    return {
        "about": one_line(
            f"{found.get('samples', '?')} images of {split}, checkpoint {found.get('checkpoint')}, data "
            f"{found.get('data')}"
        ),
        "figures": [
            (one_line(name), f"{value:.4f}", _interval((found.get("intervals") or {}).get(name)))
            for name, value in values.items()
        ],
        "calibration": [one_line(line) for line in (found.get("calibration") or {}).get("in_words", [])],
        "rates": [(_RATES[name], any(row.get(f"{name}_interval") is not None for row in classes)) for name in rates],
        "classes": [
            {
                "name": one_line(row.get("class")),
                "samples": _told(row.get("samples")),
                "cells": [(_rate(row.get(name)), _interval(row.get(f"{name}_interval"))) for name in rates],
                "taken_for": one_line(row.get("taken_for") or ""),
            }
            for row in classes
        ],
        "robustness": _robustness(found.get("robustness")),
        "top_losses": [
            [_told(row.get("loss")), *(one_line(row.get(name, "")) for name in ("label", "predicted", "sample"))]
            for row in found.get("top_losses") or []
        ],
    }


def _robustness(found: Any) -> Mapping[str, Any] | None:
    if not isinstance(found, Mapping):
        return None
    return {
        "about": one_line(f"{found.get('metric')} of {found.get('samples')} samples"),
        "rows": [
            {
                "name": one_line(name),
                "cells": [_rate(found.get("clean")), *map(_rate, row["values"]), _rate(row["mean"])],
                "formula": one_line(row.get("formula", "")),
            }
            for name, row in found["corruptions"].items()
            if "values" in row
        ],
        "mean": _rate(found.get("mean")),
    }


def _rate(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "-"


def _interval(pair: Any) -> str:
    if not isinstance(pair, Sequence) or len(pair) != 2:
        return ""
    return f"{_rate(pair[0])} to {_rate(pair[1])}"


def _figures(folder: Path) -> Iterator[Picture]:
    for path in sorted(folder.glob("*.png")):
        if (source := _source(path)) is not None:
            name = one_line(path.stem.removeprefix("eval-").replace("-", " "))
            yield Picture(name, source, wide=name == "top losses")


def _explained(folder: Path) -> tuple[list[Picture], list[str]]:
    """The pictures that `maps.json` names, and what is told of those that are not shown."""
    document = _document(folder / "maps.json") or {}
    found, rows = [], [row for row in document.get("images") or [] if isinstance(row, Mapping)]
    for row in rows[:MOST_PICTURES]:
        path = folder / Path(str(row.get("picture"))).name  # of this folder, whatever it says
        if (source := _source(path)) is not None:
            empty = {one_line(r.get("method")) for r in row.get("maps") or [] if r.get("evidence", "some") != "some"}
            about = f"no evidence in {', '.join(sorted(empty))}" if empty else ""
            found.append(Picture(one_line(row.get("image")), source, about))
    more = len(rows) - MOST_PICTURES
    return found, [f"{more:,} further pictures are in the folder explain"] if more > 0 else []


def _source(path: Path) -> str | None:
    try:
        if not path.is_file() or path.stat().st_size > MOST_BYTES:
            return None
        content = path.read_bytes()
    except OSError:
        return None
    return f"data:image/png;base64,{base64.b64encode(content).decode()}" if content.startswith(_PNG) else None


def _document(path: Path) -> dict[str, Any] | None:
    try:
        if not path.is_file() or path.stat().st_size > MOST_BYTES:
            return None
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
