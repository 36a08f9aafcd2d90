"""`cnnlab train -m`: every combination in its own run folder, one table at the end."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import OmegaConf

from cnnlab.config import Composed, Composer, make_importable
from cnnlab.errors import CnnlabError, ConfigError, DataError, InterruptedRun, Terminated, UsageError
from cnnlab.rundir import SCHEMA_VERSION, RunDir, config_hash, jsonable, write_json
from cnnlab.verbs.arguments import Arguments

BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
UNFINISHED = ("pending", "running")


def sweep(open_composer: Composer, args: Arguments) -> int:
    """Checks every cell before the first one starts, runs them through Hydra's launcher, and sums up.

    A cell that fails or diverges is recorded with its own error and the rest goes on; the exit code is then 1.

    Raises:
        ConfigError: with every problem of every cell.
        InterruptedRun: SIGINT or SIGTERM arrived; `sweep.json` says what was done.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("a sweep runs its cells one by one; start torchrun for each of them, without -m")
    cells = open_composer.cells(args.overrides)
    sweep_ = Sweep(_checked(open_composer, cells))
    sweep_.create()
    began = time.perf_counter()
    try:
        _launch(open_composer, sweep_.folder, cells, json_output=args.json)
    except KeyboardInterrupt as stop:
        records = sweep_.write()
        number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
        done = sum(record["status"] not in UNFINISHED for record in records)
        raise InterruptedRun(
            f"the sweep was interrupted by {number.name} with {done} of {len(records)} cells begun; "
            f"{sweep_.folder / 'sweep.json'} says what came of each",
            number,
        ) from stop
    except BaseException:
        sweep_.write()
        raise
    records = sweep_.write(over=True)
    report(records, sweep_.folder, time.perf_counter() - began, json_output=args.json)
    return 0 if all(record["status"] == "completed" for record in records) else 1


def _checked(open_composer: Composer, cells: Sequence[Sequence[str]]) -> list[Composed]:
    from cnnlab.validate import checked

    composed: list[Composed] = []
    problems: dict[str, list[str]] = {}
    unusable: list[DataError] = []
    for number, cell in enumerate(cells):
        try:
            composed.append(checked(open_composer, cell, number))
            if composed[-1].config["resume"] is not None:
                raise ConfigError(["`resume`: one run goes on at a time; type it without -m"])
        except ConfigError as error:
            for problem in error.problems:
                problems.setdefault(problem, []).append(" ".join(cell))
        except DataError as error:
            unusable.append(DataError(f"{error} (in the cell {' '.join(cell)})"))
    if problems:
        raise ConfigError(_in_cells(problem, found, len(cells)) for problem, found in problems.items())
    if unusable:
        raise unusable[0]
    return composed


def _in_cells(problem: str, found: Sequence[str], total: int) -> str:
    if len(found) == total:
        return problem
    where = "in the cell" if len(found) == 1 else f"in {len(found)} cells, first"
    return f"{problem}\n      {where}: {found[0]}"


class Sweep:
    """The folder of a sweep, and `sweep.json` in it."""

    def __init__(self, cells: Sequence[Composed]):
        first = cells[0].sweep_dir
        assert first is not None
        self.folder = first
        self.cells = cells
        # Each cell was composed with a stamp of its own; where they go is told by the first one.
        self.runs = [first / c.run_dir.relative_to(c.sweep_dir) if c.sweep_dir else first for c in cells]

    def create(self) -> None:
        """Raises `UsageError` if a sweep is there already, or if cells would share a folder."""
        if len(set(self.runs)) < len(self.runs):
            raise UsageError(
                "hydra.sweep.subdir gives several cells one folder; two runs never share one. Type "
                "'hydra.sweep.subdir=${hydra.job.num}', or name there what differs"
            )
        taken = [path for path in (self.folder / "sweep.json", *self.runs) if path.exists()]
        if taken:
            raise UsageError(f"{taken[0]} is there already; two sweeps never share a folder. Type another hydra.sweep.dir")
        try:
            self.write()
        except OSError as error:
            raise UsageError(
                f"{self.folder}: the sweep cannot be written there ({error.strerror}); type another paths.outputs"
            ) from error

    def write(self, *, over: bool = False) -> list[dict[str, Any]]:
        """Writes `sweep.json` from the cells' own `run.json`, and returns its cells.

        When the sweep is `over`, a cell that says it is running has lost its process.
        """
        records = []
        for number, (cell, path) in enumerate(zip(self.cells, self.runs, strict=True)):
            run = RunDir(path)
            if over and run.read().get("status") in (None, "running"):
                run.update(status="failed", reason="its process ended without a word", config_hash=config_hash(cell.config))
            found = run.read()
            records.append(
                {
                    "cell": number,
                    "run": os.path.relpath(path, self.folder),
                    "overrides": list(cell.overrides),
                    "config_hash": config_hash(cell.config),
                    "status": found.get("status", "pending"),
                    "reason": found.get("reason"),
                    "seconds": found.get("seconds"),
                    "metrics": found.get("metrics", {}),
                    "best": found.get("best"),
                }
            )
        write_json(self.folder / "sweep.json", {"schema_version": SCHEMA_VERSION, "cells": records})
        return records


# ---- running the cells ----


def _launch(open_composer: Composer, folder: Path, cells: Sequence[Sequence[str]], *, json_output: bool) -> None:
    """Hands the cells to Hydra's launcher: one after another, or by joblib, Slurm, Ray.

    Its sweeper has nothing left to do: the cells are listed and checked.
    """
    # The settings of Hydra go to the whole sweep; a cell's own .hydra is written by the run itself.
    of_hydra = [o.input_line for o in open_composer.parse(cells[0]) if o.is_hydra_override()]
    quoted = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    settings = [*of_hydra, f"hydra.sweep.dir='{quoted}'", "hydra.output_subdir=null"]
    master = open_composer.load(settings, RunMode.MULTIRUN)
    callbacks = Callbacks(master)
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=HydraContext(config_loader=open_composer.hydra.config_loader, callbacks=callbacks),
        task_function=partial(run_cell, config_dirs=open_composer.config_dirs, json_output=json_output),
        config=master,
    )
    lines = [open_composer.lines(cell) for cell in cells]
    own = [[line for line in cell if line not in of_hydra] for cell in lines]
    size = master.hydra.sweeper.get("max_batch_size") or len(own)
    callbacks.on_multirun_start(config=master, config_name=open_composer.config_name)
    for start in range(0, len(own), size):
        launcher.launch(own[start : start + size], initial_job_idx=start)
    callbacks.on_multirun_end(config=master, config_name=open_composer.config_name)


def run_cell(config: Any, *, config_dirs: Sequence[str], json_output: bool) -> None:
    """One cell, as Hydra's launcher calls it: runs it in the folder that Hydra made.

    A failure of its own is recorded there and not raised; an interruption ends the sweep.
    """
    from cnnlab.verbs.train import train

    make_importable(config_dirs)
    hydra = HydraConfig.get()
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    values = {str(key): value for key, value in plain.items()}
    folder, choices = Path(hydra.runtime.output_dir), dict(hydra.runtime.choices)
    composed = Composed(values, folder, choices, tuple(hydra.overrides.task), tuple(config_dirs))
    out = sys.stderr if json_output else sys.stdout
    print(f"\ncell {hydra.job.num}: {' '.join(composed.overrides)}", file=out, flush=True)
    try:
        train(composed, json_output=json_output)
    except InterruptedRun as error:  # a launcher keeps what is an Exception and goes on with the next cell
        print(f"cell {hydra.job.num}: {error}", file=sys.stderr, flush=True)
        terminated = error.exit_code == 128 + signal.SIGTERM
        raise (Terminated if terminated else KeyboardInterrupt) from error
    except (Exception, SystemExit) as error:
        label = "" if isinstance(error, CnnlabError) else f"{type(error).__name__}: "
        print(f"cell {hydra.job.num}: {label}{error}", file=sys.stderr, flush=True)
        run = RunDir(folder)
        if run.read().get("status") in (None, "running"):
            run.record_failure(error)
    finally:
        gc.collect()  # the next cell gets the memory


# ---- the end ----


def report(
    records: Sequence[Mapping[str, Any]], folder: Path, seconds: float, *, json_output: bool = False
) -> None:
    """The table of a sweep's cells and the reasons of those that did not complete; or all of it as JSON."""
    if json_output:
        print(json.dumps(jsonable({"sweep": str(folder), "seconds": round(seconds, 3), "cells": records})))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(f"\n{len(records)} cells in {seconds:.0f} s: {folder}", markup=False)
    table = Table()
    varied = [key for key in _keys(records) if len({_value(record, key) for record in records}) > 1]
    names = list(dict.fromkeys(name for record in records for name in record["metrics"]))
    for heading in ("cell", *varied, "status", *names, "seconds"):
        table.add_column(heading, justify="right" if heading in (*names, "seconds") else "left", overflow="fold")
    for record in records:
        table.add_row(
            str(record["cell"]),
            *(_value(record, key) for key in varied),
            record["status"],
            *(_figure(record["metrics"].get(name)) for name in names),
            "" if record["seconds"] is None else f"{record['seconds']:.1f}",
        )
    console.print(table)
    for record in records:
        if record["status"] != "completed":
            reason = f"cell {record['cell']} {record['status']}: {record['reason']}"
            written = folder / record["run"] / "error.txt"
            seen = f" (traceback in {written})" if written.exists() else ""
            console.print(reason + seen, markup=False, soft_wrap=True)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _keys(records: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(o.partition("=")[0] for record in records for o in record["overrides"]))


def _value(record: Mapping[str, Any], key: str) -> str:
    return next((o.partition("=")[2] for o in record["overrides"] if o.partition("=")[0] == key), "")
