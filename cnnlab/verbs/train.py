"""`cnnlab train`: composes an experiment, checks it, and runs it; a sweep of them; or goes on with one."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from hydra.core.override_parser.types import Override

from cnnlab.composing.composer import Composer, composer
from cnnlab.composing.experiment import Experiment
from cnnlab.composing.overrides import is_plain, line, repeated, wrong_key
from cnnlab.errors import ConfigError, UsageError, short
from cnnlab.runs.folder import PLACES, RESUMABLE, RunDir, flatten, jsonable
from cnnlab.terminal import say
from cnnlab.verbs.arguments import answer, override_parser, parse

LENGTHS = ("trainer.epochs", "trainer.max_steps")
"""What says how long a run is, and so where its schedule stands."""


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
    from cnnlab.building.launch import launch
    from cnnlab.verbs.check import beforehand

    launch(composed, folder, json_output=args.json, first=partial(beforehand, json_output=args.json))
    record = RunDir(composed.run_dir).read()
    if args.json and record:
        names = ("status", "seed", "steps", "epochs", "seconds", "metrics", "best")
        document = {"run": str(composed.run_dir), **{name: record.get(name) for name in names}}
        say(json.dumps(jsonable(document)))
    return 0


def asked(open_composer: Composer, overrides: Sequence[str]) -> tuple[Experiment, RunDir | None]:
    """The checked experiment that the overrides ask for, and the folder of the run that goes on, if any."""
    from cnnlab.building.trial import check, checked

    if any(override.startswith("resume=") for override in overrides):
        parsed = open_composer.parse(overrides)
        given = [override.value() for override in parsed if override.key_or_group == "resume"]
        if isinstance(given[-1], str) and given[-1]:
            experiment, folder = resumed(open_composer, Path(given[-1]), parsed)
            return check(experiment), folder
    experiment = checked(open_composer, overrides)
    if experiment.resume is not None:
        raise UsageError(f"`resume`: type it by itself, as resume={experiment.resume}")
    return experiment, None


def resumed(open_composer: Composer, path: Path, parsed: Sequence[Override]) -> tuple[Experiment, RunDir]:
    """The experiment of a run folder, with the changes that a run may take.

    Raises `ConfigError` for every other change; what only repeats the run's own config is none.
    """
    from cnnlab.building.reopen import reopened

    folder = RunDir(path)
    stored = reopened(folder, open_composer.trust)
    problems, added, longer, values = [], [], [], {}
    for override in parsed:
        if override.key_or_group == "resume":
            continue
        if problem := _refusal(override, stored, open_composer.groups()):
            problems.append(problem)
        elif override.key_or_group in (*RESUMABLE, *PLACES):
            if override.key_or_group in LENGTHS and stored.at(override.key_or_group) != override.value():
                longer.append(line(override))
            values[override.key_or_group] = override.value()
            added.append(line(override))
    if problems:
        problems[-1] += (
            f"\n    What may change: {', '.join(RESUMABLE)}, and where the data is (data.root); "
            "start another run for anything else"
        )
        raise ConfigError(problems)
    curve = stored.node("schedule").name.rpartition(".")[2]
    if longer and curve not in ("Constant", "Plateau"):
        told = f"schedule: {curve}'s curve is that of the new length ({', '.join(longer)}) from here on; what is done"
        say(f"{told} was done at the rates of the old one", err=True)
    return replace(stored.with_values(values), overrides=(*stored.overrides, *added)), folder


def _refusal(override: Override, stored: Experiment, groups: Collection[str]) -> str | None:
    """Why a run cannot go on with this override, or `None`."""
    key, known = override.key_or_group, flatten(stored.config)
    has = stored.choices.get(key, stored.at(key))
    may = key in RESUMABLE or (key in PLACES and key in known)
    if is_plain(override) and (may or (key in {*groups, *known} and has == override.value())):
        return None
    if override.is_hydra_override():
        return f"`{short(line(override))}`: a run goes on in its own folder; leave this out"
    return wrong_key(override, stored.config, stored.choices, groups) or (
        f"`{short(line(override))}`: a run goes on with what it has, {key}={short(str(has))}"
    )
