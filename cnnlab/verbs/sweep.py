"""`cnnlab train -m`: every combination in its own run folder, one table at the end."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cnnlab.config import Composed, Composer, CONFIG_NAME, config_root, make_importable, register_resolvers
from cnnlab.errors import CnnlabError, ConfigError, InterruptedRun, UsageError
from cnnlab.rundir import RunDir, config_hash, jsonable, write_atomically
from cnnlab.verbs.arguments import Arguments


def sweep(open_composer: Composer, args: Arguments) -> int:
    """Checks every cell before the first one starts, runs them through Hydra's launcher, and sums up.

    A cell that fails or diverges is recorded with its own error and the rest goes on; the exit code is then 1.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("a sweep runs its cells one by one; start torchrun for each of them, without -m")
    cells = open_composer.expand(args.overrides)
    composed = _checked(open_composer, cells)
    folder = _sweep_dir(args, composed)
    raw = [*args.raw, f"hydra.sweep.dir={folder}", "hydra.sweep.subdir=${hydra.job.num}"]
    _write(folder, composed)
    began = time.perf_counter()
    try:
        _launch(raw, args.config_dirs, folder)
    finally:
        records = _write(folder, composed)
    _report(records, folder, time.perf_counter() - began, json_output=args.json)
    return 0 if all(record["status"] == "completed" for record in records) else 1


def _checked(open_composer: Composer, cells: Sequence[Sequence[str]]) -> list[Composed]:
    from cnnlab.validate import check

    composed, problems = [], []
    for cell in cells:
        try:
            one = open_composer.compose(cell)
            if one.config["resume"] is not None:
                raise ConfigError(["`resume`: one run goes on at a time; type it without -m"])
            check(one)
            composed.append(one)
        except ConfigError as error:
            label = " ".join(cell)
            problems += [f"{problem}\n      in the cell: {label}" for problem in error.problems]
    if problems:
        raise ConfigError(_once(problems))
    return composed


def _once(problems: Sequence[str]) -> list[str]:
    """The same problem of many cells once, with the first cell and a count."""
    cells: dict[str, list[str]] = {}
    for problem in problems:
        text, _, cell = problem.partition("\n      in the cell: ")
        cells.setdefault(text, []).append(cell)
    return [
        f"{text}\n      in {'the cell' if len(found) == 1 else f'{len(found)} cells, first'}: {found[0]}"
        for text, found in cells.items()
    ]


def _sweep_dir(args: Arguments, composed: Sequence[Composed]) -> Path:
    given = [o.partition("=")[2] for o in args.overrides if o.startswith("hydra.sweep.dir=")]
    if given:
        return Path(given[-1])
    first = composed[0]
    return Path(first.config["paths"]["outputs"]) / "sweeps" / first.run_dir.name


def _launch(raw: Sequence[str], config_dirs: Sequence[str], folder: Path) -> None:
    """Hands the sweep to Hydra: its sweeper expands it, its launcher (basic, joblib, Slurm, Ray) runs the cells."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    register_resolvers()
    make_importable([Path(directory) for directory in config_dirs])
    GlobalHydra.instance().clear()
    kept, sys.argv = sys.argv, ["cnnlab", *raw]
    try:
        hydra.main(version_base="1.3", config_path=str(config_root()), config_name=CONFIG_NAME)(run_cell)()
    finally:
        sys.argv = kept


def run_cell(config: Any) -> float | None:
    """One cell, as Hydra's launcher calls it: runs it in the folder that Hydra made, and never raises for a
    failure of its own. Returns the final value of the monitored metric, for sweepers that optimize."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from cnnlab.verbs.train import train

    hydra = HydraConfig.get()
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    values = {str(key): value for key, value in plain.items() if key != "hydra"}
    folder = Path(hydra.runtime.output_dir)
    composed = Composed(values, folder, dict(hydra.runtime.choices), tuple(hydra.overrides.task))
    print(f"\ncell {hydra.job.num}: {' '.join(composed.overrides)}", flush=True)
    try:
        metrics = train(composed)
    except InterruptedRun:
        raise
    except Exception as error:
        record = RunDir(folder)
        if record.read().get("status") in (None, "running"):
            record.update(status="failed", reason=f"{type(error).__name__}: {error}")
        label = "" if isinstance(error, CnnlabError) else f"{type(error).__name__}: "
        print(f"cell {hydra.job.num}: {label}{error}", file=sys.stderr, flush=True)
        return None
    return next(iter(metrics.values()), None)


def _write(folder: Path, composed: Sequence[Composed]) -> list[dict[str, Any]]:
    """Writes `sweep.json` from the cells' own `run.json`, and returns its cells."""
    records = []
    for number, cell in enumerate(composed):
        found = RunDir(folder / str(number)).read()
        records.append(
            {
                "cell": number,
                "overrides": list(cell.overrides),
                "config_hash": config_hash(cell.config),
                "status": found.get("status", "pending"),
                "reason": found.get("reason"),
                "seconds": found.get("seconds"),
                "metrics": found.get("metrics", {}),
                "best": found.get("best"),
            }
        )
    document = {"schema_version": 1, "cells": records}
    write_atomically(folder / "sweep.json", (json.dumps(jsonable(document), indent=2) + "\n").encode())
    return records


def _report(records: Sequence[Mapping[str, Any]], folder: Path, seconds: float, *, json_output: bool) -> None:
    if json_output:
        print(json.dumps(jsonable({"folder": str(folder), "cells": records})))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(records)} cells in {seconds:.0f} s: {folder}", title_justify="left")
    varied = [key for key in _keys(records) if len({_value(record, key) for record in records}) > 1]
    names = list(dict.fromkeys(name for record in records for name in record["metrics"]))
    for heading in ("cell", *varied, "status", *names, "seconds"):
        table.add_column(heading, justify="right" if heading in names or heading == "seconds" else "left")
    for record in records:
        figures = [f"{record['metrics'][n]:.4g}" if n in record["metrics"] else "" for n in names]
        cells = [_value(record, key) for key in varied]
        taken = "" if record["seconds"] is None else f"{record['seconds']:.1f}"
        table.add_row(str(record["cell"]), *cells, record["status"], *figures, taken)
    console = Console()
    console.print(table)
    failures = [record for record in records if record["status"] != "completed"]
    for record in failures:
        console.print(f"cell {record['cell']} {record['status']}: {record['reason']}", markup=False)


def _keys(records: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(o.partition("=")[0] for record in records for o in record["overrides"]))


def _value(record: Mapping[str, Any], key: str) -> str:
    return next((o.partition("=")[2] for o in record["overrides"] if o.partition("=")[0] == key), "")
