"""What came of a sweep: its cells side by side, and the means of those that differ in their seed alone."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cnnlab.runs.folder import jsonable
from cnnlab.terminal import one_line, say


def report(records: Sequence[Mapping[str, Any]], folder: Path, seconds: float, *, json_output: bool = False) -> None:
    """The table of a sweep's cells and the reasons of those that did not complete; or all of it as JSON."""
    seeds = over_seeds(records)
    if json_output:
        document = {"sweep": str(folder), "seconds": round(seconds, 3), "cells": records, "over_seeds": seeds}
        say(json.dumps(jsonable(document)))
        return
    from rich.table import Table

    from cnnlab.sinks.drawing import Drawing
    from cnnlab.sinks.records import is_loss_part

    console = Drawing(sys.stdout, elsewhere=200)
    console.print(f"\n{len(records)} cells in {seconds:.0f} s: {one_line(folder)}", soft_wrap=True)
    table = Table()
    varied = _varied(records)
    measured = dict.fromkeys(name for record in records for name in record["metrics"])
    names = [name for name in measured if not is_loss_part(name)]
    for heading in ("cell", *varied, "status", *names, "seconds"):
        table.add_column(
            console.plain(heading), justify="right" if heading in (*names, "seconds") else "left", overflow="fold"
        )
    for record in records:
        table.add_row(
            str(record["cell"]),
            *(console.plain(_value(record, key)) for key in varied),
            record["status"],
            *(_figure(record["metrics"].get(name)) for name in names),
            "" if record["seconds"] is None else f"{record['seconds']:.1f}",
        )
    console.print(table)
    _show_over_seeds(console, seeds, names)
    for record in records:
        if record["status"] != "completed":
            reason = f"cell {record['cell']} {record['status']}: {record['reason']}"
            written = folder / record["run"] / "error.txt"
            seen = f" (traceback in {written})" if written.exists() else ""
            console.print(reason + seen, soft_wrap=True)


def over_seeds(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of cells that differ in their seed alone: `overrides` in common, how many `runs` completed, and for each metric
    their `mean` and `std` (with n - 1, as of a sample; `None` for one run). Empty where no seeds are swept."""
    varied = _varied(records)
    if "seed" not in varied:
        return []
    alike: dict[tuple[tuple[str, str], ...], list[Mapping[str, Any]]] = {}
    for record in records:
        key = tuple((name, _value(record, name)) for name in varied if name != "seed")
        alike.setdefault(key, []).extend([record] if record["status"] == "completed" else [])
    groups = []
    for key, runs in alike.items():
        names = dict.fromkeys(name for run in runs for name in run["metrics"])
        found = {name: [run["metrics"].get(name) for run in runs] for name in names}
        known = {name: [value for value in values if value is not None] for name, values in found.items()}
        metrics = {
            name: {"mean": statistics.mean(own), "std": statistics.stdev(own) if len(own) > 1 else None}
            for name, own in known.items()
            if own
        }
        groups.append({"overrides": dict(key), "runs": len(runs), "metrics": metrics})
    return groups


def _show_over_seeds(console: Any, groups: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    from rich.table import Table

    if not groups:
        return
    table = Table(title="over the seeds: mean ± standard deviation", title_justify="left")
    varied = list(groups[0]["overrides"])
    for heading in (*varied, "runs", *names):
        table.add_column(console.plain(heading), justify="left" if heading in varied else "right", overflow="fold")
    for group in groups:
        found = [group["metrics"].get(name) for name in names]
        table.add_row(*map(console.plain, group["overrides"].values()), str(group["runs"]), *map(_mean_and_std, found))
    console.print(table)


def _mean_and_std(found: Mapping[str, float | None] | None) -> str:
    if found is None:
        return ""
    return f"{found['mean']:.4f}" if found["std"] is None else f"{found['mean']:.4f} ± {found['std']:.4f}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _varied(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys in which the cells differ."""
    return [key for key in _keys(records) if len({_value(record, key) for record in records}) > 1]


def _keys(records: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(o.partition("=")[0] for record in records for o in record["overrides"]))


def _value(record: Mapping[str, Any], key: str) -> str:
    return next((o.partition("=")[2] for o in record["overrides"] if o.partition("=")[0] == key), "")
