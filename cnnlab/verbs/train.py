"""`cnnlab train`: composes an experiment, checks it, and runs it; a sweep of them; or goes on with one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override

from cnnlab.config import Composed, Composer, composer
from cnnlab.errors import ConfigError, UsageError, short
from cnnlab.interrupts import watcher
from cnnlab.overrides import is_plain, line, repeated, wrong_key
from cnnlab.rundir import PLACES, RESUMABLE, RunDir, config_hash, environment, flatten, jsonable
from cnnlab.terminal import say
from cnnlab.verbs.arguments import answer, override_parser, parse
from cnnlab.verbs.reopen import reopened


def main(arguments: Sequence[str]) -> int:
    args = parse(arguments, override_parser("train"))
    with composer(args.config_dirs, args.config_name, args.trust) as open_composer:
        if args.help or args.show:
            return answer(open_composer, args)
        if args.multirun:
            from cnnlab.verbs.sweep import sweep

            return sweep(open_composer, args)
        composed, folder = asked(open_composer, args.overrides)
        for key, lines in repeated(open_composer.parse(args.overrides)).items():
            say(f"{key} is given {len(lines)} times; {short(lines[-1])}, the last one, holds", err=True)
    train(composed, folder, json_output=args.json)
    record = RunDir(composed.run_dir).read()
    if args.json and record:
        names = ("status", "seed", "steps", "epochs", "seconds", "metrics", "best")
        document = {"run": str(composed.run_dir), **{name: record.get(name) for name in names}}
        say(json.dumps(jsonable(document)))
    return 0


def asked(open_composer: Composer, overrides: Sequence[str]) -> tuple[Composed, RunDir | None]:
    """The checked experiment that the overrides ask for, and the folder of the run that goes on, if any."""
    from cnnlab.validate import check, checked

    if any(override.startswith("resume=") for override in overrides):
        parsed = open_composer.parse(overrides)
        given = [override.value() for override in parsed if override.key_or_group == "resume"]
        if isinstance(given[-1], str) and given[-1]:
            composed, folder = resumed(open_composer, Path(given[-1]), parsed)
            check(composed)
            return composed, folder
    composed = checked(open_composer, overrides)
    if composed.config["resume"] is not None:
        raise UsageError(f"`resume`: type it by itself, as resume={composed.config['resume']}")
    return composed, None


def train(
    composed: Composed, folder: RunDir | None = None, *, json_output: bool = False, again: bool = False
) -> dict[str, float]:
    """Runs one checked experiment, in its own folder; `folder` is given when a run goes on.

    Args:
        again: see `RunDir.create`.

    Returns the final metrics. Raises what `build` and `fit` raise.
    """
    from cnnlab.ranks import join, leave
    from cnnlab.train import fit

    ranks = join()
    going_on = folder is not None
    try:
        folder = folder or RunDir(ranks.share(str(composed.run_dir)))
        with folder.claimed() if ranks.is_main else nullcontext():
            if not going_on and ranks.is_main:
                folder.create(composed.config, composed.overrides, again=again)
            ranks.wait()
            if ranks.is_main:
                watcher.on_forced_end = folder.record_forced_end
            try:
                run = _started(composed, folder, ranks, going_on, json_output)
            except BaseException as error:
                if ranks.is_main and not going_on:  # a run that could not go on stays what it was
                    with suppress(OSError):
                        folder.record_failure(error, config_hash=config_hash(composed.config))
                raise
            return fit(run)
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


def _started(composed: Composed, folder: RunDir, ranks: Any, going_on: bool, json_output: bool) -> Any:
    """The run, built, with its listeners, and with what is known of it in `run.json`."""
    from cnnlab.builder import build
    from cnnlab.sinks.usual import attach

    run = build(composed, folder, ranks=ranks, resumed=going_on)
    if not run.is_main:
        return run
    if going_on:
        if folder.read().get("status") == "running":  # and yet the folder could be claimed
            run.notices.insert(
                0, f"run: its process was killed; it goes on from its checkpoint of step {run.clock.step}"
            )
        folder.write_config(composed.config, composed.overrides)
        folder.error.unlink(missing_ok=True)
    console = attach(run, folder, sys.stderr if json_output else sys.stdout)
    for notice in run.notices:
        console.notice(notice)
    folder.update(**_opening(composed, run))
    return run


def _opening(composed: Composed, run: Any) -> dict[str, Any]:
    from cnnlab.flops import forward_flops

    return {
        "seed": composed.config["seed"],
        "config_hash": config_hash(composed.config),
        "choices": composed.choices,
        "config_dirs": list(composed.config_dirs),
        "classes": list(run.task.class_names(run.spec)),
        "samples": {name: len(loader.split) for name, loader in run.loaders.items()},
        "left_out": [{"file": name, "reason": reason} for name, reason in run.left_out],
        "data_fingerprint": {name: loader.split.fingerprint for name, loader in run.loaders.items()},
        **environment(),
        "device": run.facts["device"],
        "precision": run.precision.value,
        "step": run.facts["step"],
        "data_path": run.facts["data path"],
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "flops": forward_flops(run.model, (run.spec.channels, *run.spec.size)),
    }


# ---- going on ----


def resumed(open_composer: Composer, path: Path, parsed: Sequence[Override]) -> tuple[Composed, RunDir]:
    """The experiment of a run folder, with the changes that a run may take.

    Raises `ConfigError` for every other change; what only repeats the run's own config is none.
    """
    folder = RunDir(path)
    stored = reopened(folder, open_composer.trust)
    problems, added = [], []
    for override in parsed:
        if override.key_or_group == "resume":
            continue
        if problem := _refusal(override, stored, open_composer.groups()):
            problems.append(problem)
        elif override.key_or_group in (*RESUMABLE, *PLACES):
            section, _, name = override.key_or_group.partition(".")
            stored.config[section][name] = override.value()
            added.append(line(override))
    if problems:
        problems[-1] += (
            f"\n    What may change: {', '.join(RESUMABLE)}, and where the data is (data.root); "
            "start another run for anything else"
        )
        raise ConfigError(problems)
    return replace(stored, overrides=(*stored.overrides, *added)), folder


def _refusal(override: Override, stored: Composed, groups: Collection[str]) -> str | None:
    """Why a run cannot go on with this override, or `None`."""
    key, config = override.key_or_group, stored.config
    has = stored.choices.get(key, flatten(config).get(key, config.get(key)))
    may = key in RESUMABLE or (key in PLACES and key in flatten(config))
    if is_plain(override) and (may or (key in {*groups, *flatten(config)} and has == override.value())):
        return None
    if override.is_hydra_override():
        return f"`{short(line(override))}`: a run goes on in its own folder; leave this out"
    return wrong_key(override, config, stored.choices, groups) or (
        f"`{short(line(override))}`: a run goes on with what it has, {key}={short(str(has))}"
    )
