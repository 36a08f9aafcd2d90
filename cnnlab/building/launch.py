"""Running one checked experiment in a folder of its own: claimed, recorded, and with its listeners."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

from cnnlab.building.builder import build
from cnnlab.composing.experiment import Experiment
from cnnlab.errors import RolledBack
from cnnlab.inspect.flops import forward_flops
from cnnlab.machine.interrupts import watcher
from cnnlab.machine.ranks import join, leave
from cnnlab.runs import data_files
from cnnlab.runs.environment import environment
from cnnlab.runs.folder import RunDir, config_hash
from cnnlab.sinks.usual import attach
from cnnlab.terminal import say
from cnnlab.train import fit


def launch(
    experiment: Experiment,
    folder: RunDir | None = None,
    *,
    json_output: bool = False,
    again: bool = False,
    first: Callable[[Experiment, RunDir], None] | None = None,
) -> dict[str, float]:
    """Runs one checked experiment, in its own folder; `folder` is given when a run goes on.

    Args:
        again: see `RunDir.create`.
        first: what looks at the experiment before it is built, once the folder is there; on rank 0, and not where a run
            goes on. What it raises ends the run.

    Returns the final metrics. Raises what `build` and `fit` raise.
    """
    ranks = join()
    going_on = folder is not None
    try:
        folder = folder or RunDir(ranks.share(str(experiment.run_dir)))
        if going_on and ranks.is_main:
            folder.require_kinds()
        with folder.claimed() if ranks.is_main else nullcontext():
            if not going_on and ranks.is_main:
                folder.create(experiment.config, experiment.overrides, again=again)
            ranks.wait()
            if ranks.is_main:
                watcher.on_forced_end = folder.record_forced_end
            try:
                if first is not None and not going_on and ranks.is_main:
                    first(experiment, folder)
                run = _started(experiment, folder, ranks, going_on, json_output)
            except BaseException as error:
                if ranks.is_main and not going_on:  # a run that could not go on stays what it was
                    with suppress(OSError):
                        folder.record_failure(error, config_hash=config_hash(experiment.config))
                raise
            started = [run]
            del run  # `_fitted` alone holds it, and can give its memory up
            return _fitted(experiment, started, json_output)
    except Exception as error:
        if folder is not None and os.path.exists(folder.error):  # noqa: PTH110 (a path may be too long to exist)
            error.add_note(f"The traceback is in {folder.error}")
        raise
    except KeyboardInterrupt as error:
        if folder is not None and folder.last.exists():
            error.add_note(f"its last checkpoint stands. Go on with: cnnlab train resume={folder.path}")
        raise
    finally:
        watcher.on_forced_end = None
        leave()


def _fitted(experiment: Experiment, started: list[Any], json_output: bool) -> dict[str, float]:
    """`fit`, and where the run goes back to a checkpoint, the same again from there, as after `resume=`.

    Args:
        started: the run, which is taken out of it.
    """
    run = started.pop()
    folder, ranks = run.folder, run.ranks
    while True:
        try:
            return fit(run)
        except RolledBack as back:
            if ranks.is_main:
                say(str(back), err=True)
        del run  # its memory is needed
        run = _started(experiment, folder, ranks, True, json_output)


def _started(experiment: Experiment, folder: RunDir, ranks: Any, going_on: bool, json_output: bool) -> Any:
    """The run, built, with its listeners, and with what is known of it in `run.json`."""
    run = build(experiment, folder, ranks=ranks, resumed=going_on)
    if not run.is_main:
        return run
    if going_on:
        if folder.read().get("status") == "running":  # and yet the folder could be claimed
            run.notices.insert(
                0, f"run: its process was killed; it goes on from its checkpoint of step {run.clock.step}"
            )
        run.notices[:0] = folder.lost()
        folder.write_config(experiment.config, experiment.overrides)
        folder.error.unlink(missing_ok=True)
    console = attach(run, folder, sys.stderr if json_output else sys.stdout)
    for notice in run.notices:
        console.notice(notice)
    data_files.write(folder.path, run.files)
    folder.update(**_opening(experiment, run))
    return run


def _opening(experiment: Experiment, run: Any) -> dict[str, Any]:
    return {
        "seed": experiment.seed,
        "config_hash": config_hash(experiment.config),
        "choices": experiment.choices,
        "config_dirs": list(experiment.config_dirs),
        "classes": list(run.task.class_names(run.spec)),
        "samples": {name: len(loader.split) for name, loader in run.loaders.items()},
        "left_out": [{"file": name, "reason": reason} for name, reason in run.left_out],
        "data_fingerprint": {name: loader.split.fingerprint for name, loader in run.loaders.items()},
        **environment(),
        "device": run.facts["device"],
        "precision": run.precision.value,
        "step": run.facts["step"],
        **({} if run.weights is None else {"weights": run.weights}),
        "data_path": run.facts["data path"],
        "stored_whole": run.loaders["train"].split.stored,
        **_rate(run),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "flops": forward_flops(run.model, (run.spec.channels, *run.spec.size)),
    }


def _rate(run: Any) -> dict[str, Any]:
    """The base rate, where it was found and not typed; and in the session that found it, how."""
    if not run.experiment.finds_rate:
        return {}
    found: dict[str, Any] = {"lr": float(run.optimizer.param_groups[0]["base_lr"])}
    return found if run.curve is None else {**found, "range_test": run.curve.described()}
