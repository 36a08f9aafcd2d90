"""`cnnlab eval RUN`: the metrics of a run's checkpoint on one of its splits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cnnlab.composing.composer import composer
from cnnlab.composing.overrides import is_plain, line, quoted
from cnnlab.composing.trust import TYPED, Trust
from cnnlab.errors import CheckpointError, UsageError
from cnnlab.runs.folder import RunDir, jsonable
from cnnlab.schema import Device
from cnnlab.terminal import one_line, say
from cnnlab.verbs.arguments import TRUST, Parser

if TYPE_CHECKING:
    from cnnlab.building.evaluation import Found
    from cnnlab.building.opened import Opened
    from cnnlab.composing.experiment import Experiment

MOST_CLASSES = 20
"""Are shown, those with the least recall."""
EXAMPLES = """examples:
  cnnlab eval outputs/digits-resnet/2026-11-22_10-00-00-1a2b
  cnnlab eval RUN --split val --checkpoint last
  cnnlab eval RUN data.root=/new/place      the run's data, where it has moved; or other data, which is then said
  cnnlab eval RUN data=folder data.root=photos   any data with the same classes, matched by name in any order
  cnnlab eval RUN --json
"""


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        "eval",
        "Evaluates a run's checkpoint, as a whole and class by class; the run folder is left as it is.",
        EXAMPLES,
    )
    parser.add_argument("run", help="a run folder")
    where = "data.root=FOLDER where the data is now, or other data"
    parser.add_argument("data", nargs="*", metavar="data=OPTION", help=where)
    parser.add_argument("--split", choices=["train", "val", "test"], default="test")
    parser.add_argument("--checkpoint", choices=["best", "last"], default="best")
    parser.add_argument("--device", choices=[device.value for device in Device], help="as trainer.device")
    parser.add_argument("--config-dir", action="append", default=[], metavar="DIR", help="where your own parts are")
    parser.add_argument("--trust", **TRUST)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    args = parser.parse_all(arguments)
    folder = RunDir(args.run)
    trust = Trust.of(args.trust, args.config_dir)
    network, found = found_on(folder, args.split, args.checkpoint, args.device, args.data, trust)
    data = found.data or "as it was"
    for notice in network.notices:
        say(one_line(notice), err=True)
    status = folder.read().get("status")
    if args.json:
        about = {"checkpoint": network.checkpoint, "status": status, "data": data, "classes": found.classes}
        say(json.dumps(jsonable({**found.figures, **about})))
        return 0
    if status == "killed":
        say(f"{'run':<24} killed; cnnlab train resume={one_line(str(folder.path))} goes on with it")
    if found.data:
        say(f"{'data':<24} other than the run had: {one_line(found.data)}")
    _show(folder, network.checkpoint, found.figures, found.classes)
    return 0


def _show(folder: RunDir, which: str, figures: Mapping[str, float], classes: Sequence[Mapping[str, Any]]) -> None:
    best = folder.read().get("best") or {}
    epoch = f", of epoch {best['epoch']}" if which == "best" and "epoch" in best else ""
    say(f"{'checkpoint':<24} {which}{epoch}")
    for name, value in figures.items():
        say(f"{name:<24} {value:.4f}")
    found = [row for row in classes if row["samples"]]
    worst = sorted(found, key=lambda row: row["recall"])[:MOST_CLASSES]
    if not worst:
        return
    heading = "class" if len(worst) == len(found) else f"worst {MOST_CLASSES} of {len(found)}"
    say(f"\n{heading:<24} {'samples':>9} {'recall':>7} {'precision':>9} {'IoU':>7}  mostly taken for")
    for row in worst:
        recall, precision, iou = ("-" if row[k] is None else f"{row[k]:.4f}" for k in ("recall", "precision", "iou"))
        name, taken_for = one_line(row["class"]), one_line(row["taken_for"] or "")
        say(f"{name:<24} {row['samples']:>9,} {recall:>7} {precision:>9} {iou:>7}  {taken_for}".rstrip())


def evaluate_run(folder: RunDir, split: str, which: str = "best", device: str | None = None) -> dict[str, float]:
    """The metrics of `found_on`, by themselves."""
    return found_on(folder, split, which, device)[1].figures


def found_on(
    folder: RunDir,
    split: str,
    which: str,
    device: str | None = None,
    data: Sequence[str] = (),
    trust: Trust = TYPED,
) -> tuple[Opened, Found]:
    """The network of the checkpoint `which` of a run, and what it does on `split`.

    Args:
        data: overrides of the data; without them, data that is not what the run had is refused.

    Raises:
        UsageError: no run folder, one that names code that nobody vouches for (see `cnnlab.composing.trust`), or
            an override of something else.
        CheckpointError: its checkpoint is missing, damaged or another's, or its data has changed.
    """
    from cnnlab.building.evaluation import data_for, evaluate
    from cnnlab.building.opened import open_run

    network = open_run(folder, which, device=device, trust=trust)
    found = data_for(network, with_data(network, data, trust) if data else None)
    if found.changes and not data:
        raise CheckpointError(
            "the data is not what this run had, so its test split may hold what it was trained on: "
            f"{found.changes}. {_remedy(network)}"
        )
    return network, evaluate(network, split, found)


def _remedy(network: Opened) -> str:
    from cnnlab.train.origin import where

    config = network.experiment.config
    place = where(config)
    if place is None:
        return "Put it back"
    key, word = place
    here = f"{key}={config['data'][key.removeprefix('data.')]}"
    here = quoted(here) if set(here) & set("*?[]{}, ") else here
    return (
        f"Put it back, or say where it is: cnnlab eval {network.folder.path} {key}={word}; "
        f"to evaluate on it as it is now, type {here}"
    )


def with_data(network: Opened, typed: Sequence[str], trust: Trust) -> Experiment:
    """The run's experiment with what was typed of its data: `data=OPTION`, `data.KEY=VALUE`.

    Raises `UsageError` for anything else, `ConfigError` for values that the data set refuses.
    """
    from cnnlab.building.evaluation import fitting_values
    from cnnlab.building.trial import read

    own = network.experiment
    with composer([*trust.folders, *own.config_dirs], trusted=trust.names) as open_composer:
        parsed = open_composer.parse(list(typed))
        option = next((override for override in parsed if override.key_or_group == "data"), None)
        node = own.node("data")
        if option is not None:
            composed = open_composer.compose([line(option)])
            node = replace(node, config=composed.config["data"])
    given = {override.key_or_group.partition(".")[2]: override for override in parsed if override is not option}
    for name, override in given.items():
        known = override.key_or_group.startswith("data.") and name in (node.config or {}) and not name.startswith("_")
        if not known or not is_plain(override):
            names = ", ".join(f"data.{key}" for key in node.settings)
            raise UsageError(f"`{line(override)}`: expected data=OPTION, or one of {names}; all else is the run's")
    values = {name: override.value() for name, override in given.items()}
    if option is not None:
        values |= fitting_values(network, node.config or {}, list(given), node.takes)
    return read(own.with_values({"data": {**(node.config or {}), **values}}))
