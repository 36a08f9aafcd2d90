"""`cnnlab train -m`: every combination in its own run folder, one table at the end."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode

from cnnlab.composing.composer import Composer, make_importable
from cnnlab.composing.experiment import Experiment
from cnnlab.composing.hydra_private import BASIC_SWEEPER, Callbacks
from cnnlab.composing.launching import handed_over, require_hydras_parts
from cnnlab.composing.overrides import is_for_hydra
from cnnlab.errors import CheckpointError, CnnlabError, ConfigError, DataError, InterruptedRun, Terminated, UsageError
from cnnlab.machine.interrupts import number_of
from cnnlab.machine.surroundings import here, torchrun
from cnnlab.runs.folder import SCHEMA_VERSION, RunDir, claim, config_hash, write_json
from cnnlab.runs.stored import json_object
from cnnlab.terminal import guarded, one_line, say
from cnnlab.verbs.arguments import Arguments
from cnnlab.verbs.sweep_table import over_seeds, report

FINISHED = ("completed", "diverged")
"""Ends of a cell that would come out alike if it began again."""


def sweep(open_composer: Composer, args: Arguments) -> int:
    """Checks every cell before the first one starts, runs them through Hydra's launcher, and sums up.

    A cell that fails or diverges is recorded with its own error and the rest goes on; the exit code is 1.

    Raises:
        ConfigError: with every problem of every cell.
        InterruptedRun: SIGINT, SIGTERM or SIGHUP arrived; `sweep.json` says what was done.
    """
    if torchrun().world > 1:
        raise UsageError("a sweep runs its cells one by one; start torchrun for each of them, without -m")
    cells = open_composer.cells(args.overrides)
    folder = SweepDir(checked_cells(open_composer, cells))
    launch = _launcher(open_composer, folder.path, cells, json_output=args.json)
    folder.create()
    began = time.perf_counter()
    with claim(folder.path / ".lock", f"{folder.path}: another process is running this sweep"):
        try:
            launch()
        except KeyboardInterrupt as stop:
            raise _interruption(stop, folder) from stop
        except BaseException:
            folder.write()
            raise
        records = folder.write(over=True)
    report(records, folder.path, time.perf_counter() - began, json_output=args.json)
    return 0 if all(record["status"] == "completed" for record in records) else 1


def _interruption(stop: KeyboardInterrupt, folder: SweepDir) -> InterruptedRun:
    number = signal.Signals(number_of(stop))
    states = [record["status"] for record in folder.write()]
    told = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return InterruptedRun(
        f"the sweep was interrupted by {number.name}: {told}; see {folder.json}. "
        f"Go on with: the same command and hydra.sweep.dir={folder.path}",
        number,
    )


def checked_cells(open_composer: Composer, cells: Sequence[Sequence[str]]) -> list[Experiment]:
    from cnnlab.building.trial import checked

    composed: list[Experiment] = []
    problems: dict[str, list[str]] = {}
    unusable: list[DataError] = []
    for number, cell in enumerate(cells):
        try:
            composed.append(checked(open_composer, cell, number))
            if composed[-1].resume is not None:
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


class SweepDir:
    """The folder of a sweep, and `sweep.json` in it."""

    def __init__(self, cells: Sequence[Experiment]):
        first = cells[0].sweep_dir
        assert first is not None
        self.path = first
        self.json = first / "sweep.json"
        self.cells = cells
        # Each cell was composed with a stamp of its own; where they go is told by the first one.
        self.runs = [first / c.run_dir.relative_to(c.sweep_dir) if c.sweep_dir else first for c in cells]

    def create(self) -> None:
        """Makes the folder, or finds the same sweep in it, which then goes on.

        Raises `UsageError` if something else is there, or if cells would share a folder.
        """
        if len(set(self.runs)) < len(self.runs):
            raise UsageError(
                "hydra.sweep.subdir gives several cells one folder; two runs never share one. Type "
                "'hydra.sweep.subdir=${hydra.job.num}', or name there what differs"
            )
        before = self._recorded()
        taken = next((path for path in (self.json, *self.runs) if os.path.exists(path)), None)  # noqa: PTH110 (too long: told below)
        if taken is not None and before != self._asked():
            found = "another sweep" if before is not None else f"{taken.name}, which is no part of a sweep,"
            raise UsageError(f"{self.path} holds {found} already; type another hydra.sweep.dir")
        try:
            self.write()
        except OSError as error:
            raise UsageError(
                f"{self.path}: the sweep cannot be written there ({error.strerror}); type another "
                "paths.outputs or hydra.sweep.dir"
            ) from error

    def _asked(self) -> list[tuple[list[str], str]]:
        return [(list(cell.overrides), config_hash(cell.config)) for cell in self.cells]

    def _recorded(self) -> list[tuple[list[str], str]] | None:
        """What `sweep.json` says was asked for; `None` where there is none to read."""
        try:
            cells = json_object(self.json)["cells"]
            return [(cell["overrides"], cell["config_hash"]) for cell in cells]
        except (CheckpointError, KeyError, TypeError):
            return None

    def write(self, *, over: bool = False) -> list[dict[str, Any]]:
        """Writes `sweep.json` from the cells' own `run.json`, and returns its cells.

        When the sweep is `over`, a cell of which there is nothing has lost its process. One that another process
        still runs (a job that outlived the sweep that started it) is told as running.
        """
        records = []
        for number, (cell, path) in enumerate(zip(self.cells, self.runs, strict=True)):
            found = _outcome(RunDir(path), over)
            records.append(
                {
                    "cell": number,
                    "run": os.path.relpath(path, self.path),
                    "overrides": list(cell.overrides),
                    "config_hash": config_hash(cell.config),
                    "status": found.get("status", "pending"),
                    "reason": found.get("reason"),
                    "seconds": found.get("seconds"),
                    "metrics": found.get("metrics", {}),
                    "best": found.get("best"),
                }
            )
        document = {"schema_version": SCHEMA_VERSION, "cells": records, "over_seeds": over_seeds(records)}
        write_json(self.json, document)
        return records


def _outcome(run: RunDir, over: bool) -> dict[str, Any]:
    """The cell's `run.json`, and what else tells how it does."""
    try:
        status, record = run.status(), run.read()
    except CheckpointError as error:
        return {"status": "failed", "reason": str(error)}
    if status is None and over:
        return {"status": "failed", "reason": "its process ended without a word"}
    if status == "killed":
        return {"reason": "its process is gone; it had not begun", **record, "status": status}
    return {**record, "status": status or "pending"}


# ---- running the cells ----


def _launcher(
    open_composer: Composer, folder: Path, cells: Sequence[Sequence[str]], *, json_output: bool
) -> Callable[[], None]:
    """What runs the cells: Hydra's launcher, one after another, or by joblib, Slurm, Ray.

    Its sweeper has nothing left to do: the cells are listed and checked. Raises `UsageError` for another one.
    """
    lines = [open_composer.lines(cell) for cell in cells]
    shared = [text for text in lines[0] if all(text in cell for cell in lines)]
    quoted = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    # A cell's own .hydra is written by the run itself.
    settings = [*shared, f"hydra.sweep.dir='{quoted}'", "hydra.output_subdir=null"]
    config = open_composer.load(settings, RunMode.MULTIRUN)
    if config.hydra.sweeper._target_ != BASIC_SWEEPER:
        raise UsageError("hydra/sweeper: all cells are checked before the first one starts; type hydra/sweeper=basic")
    require_hydras_parts(config.hydra)
    callbacks = Callbacks(config)
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=HydraContext(config_loader=open_composer.hydra.config_loader, callbacks=callbacks),
        task_function=partial(run_cell, config_dirs=open_composer.config_dirs, json_output=json_output),
        config=config,
    )
    own = [[text for text in cell if not is_for_hydra(text)] for cell in lines]  # Hydra adds its settings to each
    size = config.hydra.sweeper.max_batch_size or len(own)

    def launch() -> None:
        callbacks.on_multirun_start(config=config, config_name=open_composer.config_name)
        for start in range(0, len(own), size):
            launcher.launch(own[start : start + size], initial_job_idx=start)
        callbacks.on_multirun_end(config=config, config_name=open_composer.config_name)

    return launch


def run_cell(config: Any, *, config_dirs: Sequence[str], json_output: bool) -> None:
    """One cell, as Hydra's launcher calls it: runs it, or goes on with it, in the folder that Hydra made.

    A failure of its own is recorded there and not raised; an interruption ends the sweep.
    """
    with guarded():  # a launcher's process has streams of its own
        _run_cell(config, config_dirs, json_output)


def _run_cell(config: Any, config_dirs: Sequence[str], json_output: bool) -> None:
    from cnnlab.building.launch import launch
    from cnnlab.building.trial import read
    from cnnlab.verbs.check import beforehand

    make_importable([*config_dirs, here()])
    experiment = read(handed_over(config, config_dirs))
    label = f"cell {HydraConfig.get().job.num}"
    run = RunDir(experiment.run_dir)
    try:
        if run.status() in FINISHED:
            say(f"\n{label}: done before", err=json_output)
            return
        say(f"\n{label}: {one_line(' '.join(experiment.overrides))}", err=json_output)
        # One that ended before its first checkpoint begins again, under its claim: nobody else's folder is touched.
        goes_on = run if run.last.exists() else None
        launch(
            experiment, goes_on, json_output=json_output, again=True, first=partial(beforehand, json_output=json_output)
        )
    except InterruptedRun as error:  # a launcher keeps what is an Exception and goes on with the next cell
        number = error.exit_code - 128
        raise (KeyboardInterrupt() if number == signal.SIGINT else Terminated(number)) from error
    except (Exception, SystemExit) as error:
        kind = "" if isinstance(error, CnnlabError) else f"{type(error).__name__}: "
        say(f"{label}: {kind}{error}", err=True)
    finally:
        _free_gpu_memory()


def _free_gpu_memory() -> None:
    """The next cell of this process gets what the last one had; cycles keep tensors alive until they are collected."""
    import torch

    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
