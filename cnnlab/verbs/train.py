"""`cnnlab train`: composes an experiment, checks it, and runs it; a sweep of them; or goes on with one."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnnlab.config import Composed, Composer, composer
from cnnlab.errors import ConfigError, UsageError
from cnnlab.rundir import RESUMABLE, RunDir, config_hash, environment, flatten
from cnnlab.verbs.arguments import ask_hydra, parse


def main(arguments: Sequence[str]) -> int:
    args = parse(arguments)
    if args.help or (args.show and not args.multirun):
        return ask_hydra(args.raw, args.config_dirs)
    if args.show:
        raise UsageError("--multirun and --cfg do not go together; --cfg job shows one cell, without -m")
    with composer(args.config_dirs) as open_composer:
        if args.multirun:
            from cnnlab.verbs.sweep import sweep

            return sweep(open_composer, args)
        refuse_sweep(open_composer, args.overrides)
        composed = open_composer.compose(args.overrides)
    if composed.config["resume"] is not None:
        composed, folder = resumed(composed)
    else:
        folder = None
    metrics = train(composed, folder, json_output=args.json)
    if args.json:
        print(json.dumps(metrics))
    return 0


def refuse_sweep(open_composer: Composer, overrides: Sequence[str]) -> None:
    cells = open_composer.expand(overrides)
    if len(cells) > 1:
        raise UsageError(
            f"these overrides name {len(cells)} experiments; type -m for a sweep: "
            f"cnnlab train -m {' '.join(overrides)}"
        )


def train(composed: Composed, folder: RunDir | None = None, *, json_output: bool = False) -> dict[str, float]:
    """Checks and runs one experiment, in its own folder; `folder` is given when a run goes on.

    Returns the final metrics. Raises what `fit` and the check raise.
    """
    from cnnlab.builder import build
    from cnnlab.ranks import join, leave
    from cnnlab.sinks.console import Console
    from cnnlab.train import fit
    from cnnlab.validate import check

    going_on = folder is not None
    check(composed)
    ranks = join()
    try:
        if folder is None:
            folder = RunDir(ranks.share(str(composed.run_dir)))
            if ranks.is_main:
                folder.create(composed.config, composed.overrides)
            ranks.wait()
        try:
            run = build(composed, folder, ranks=ranks, resumed=going_on)
        except BaseException as error:
            if ranks.is_main:
                folder.update(status="failed", reason=str(error), config_hash=config_hash(composed.config))
            raise
        if going_on:
            _restore(run)
        if run.is_main:
            console = Console(sys.stderr if json_output else sys.stdout, live=run.trainer.progress)
            for notice in run.notices:
                console.notice(notice)
            _add_sinks(run, console)
            folder.update(**_opening(composed, run))
        return fit(run)
    finally:
        leave()


def _restore(run: Any) -> None:
    """Puts a run where its last checkpoint stood."""
    from cnnlab import checkpoint
    from cnnlab.errors import CheckpointError

    if not run.folder.last.exists():
        raise CheckpointError(
            f"{run.folder.path} has no checkpoint to go on from (it ended before the first one, or ran with "
            "trainer.checkpoint=false); start it again without resume="
        )
    run.state.load_state_dict(checkpoint.load(run.folder.last))
    run.totals.to(run.device)
    if not run.is_main:
        run.totals.load_state_dict({})
    if run.clock.step > run.total_steps:
        raise UsageError(
            f"the run has done {run.clock.step} steps and trainer.epochs={run.epochs} asks for "
            f"{run.total_steps}; type trainer.epochs={-(-run.clock.step // run.steps_per_epoch)} or more"
        )


def _add_sinks(run: Any, console: Any) -> None:
    """The console and TensorBoard, before the checkpointer, which comes last."""
    from cnnlab.sinks.samples import SamplePictures
    from cnnlab.sinks.tensorboard import TensorBoard

    board = TensorBoard(run.folder.tensorboard)
    pictures = [SamplePictures(board)] if run.config["stats"]["pictures"] else []
    run.listeners[-1:-1] = [console, board, *pictures]


def _opening(composed: Composed, run: Any) -> dict[str, Any]:
    return {
        "seed": composed.config["seed"],
        "config_hash": config_hash(composed.config),
        "choices": composed.choices,
        "data_fingerprint": {name: loader.split.fingerprint for name, loader in run.loaders.items()},
        **environment(),
        "device": run.facts["device"],
        "precision": composed.config["trainer"]["precision"] if run.step is None else run.facts["step"].split(", ")[1],
        "step": run.facts["step"],
        "parameters": sum(p.numel() for p in run.model.parameters()),
    }


def resumed(composed: Composed) -> tuple[Composed, RunDir]:
    """The experiment of the run folder that `resume=` names, with the changes that a run may take.

    Raises `UsageError` when anything else is asked to change.
    """
    folder = RunDir(Path(str(composed.config["resume"])))
    config = folder.config()
    refused = []
    for override in composed.overrides:
        key = override.lstrip("+~").partition("=")[0]
        if key == "resume" or key.startswith("hydra."):
            continue
        if key not in RESUMABLE:
            refused.append(
                f"`{override}`: expected one of {', '.join(RESUMABLE)}; {key} may not change when a run goes on, "
                "since it would be another run. Type a new `cnnlab train` for that"
            )
            continue
        section, _, name = key.partition(".")
        config[section][name] = flatten(composed.config)[key]
    if refused:
        raise ConfigError(refused)
    return Composed(config, folder.path, folder.read().get("choices", {}), composed.overrides), folder
