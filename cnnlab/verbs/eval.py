"""`cnnlab eval RUN`: the metrics of a run's checkpoint on one of its splits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cnnlab.composing.composer import composer
from cnnlab.composing.overrides import is_plain, line, quoted
from cnnlab.composing.trust import TYPED, Trust
from cnnlab.errors import CheckpointError, UsageError, short
from cnnlab.runs.folder import RunDir, jsonable
from cnnlab.schema import Device, StepKind
from cnnlab.terminal import one_line, say
from cnnlab.verbs.arguments import TRUST, Parser
from cnnlab.verbs.reopen import reopened

MOST_CLASSES = 20
"""Are shown, those with the least recall."""
EXAMPLES = """examples:
  cnnlab eval outputs/digits-resnet/2026-11-22_10-00-00-1a2b
  cnnlab eval RUN --split val --checkpoint last
  cnnlab eval RUN data.root=/new/place      the run's data, where it has moved; or other data, which is then said
  cnnlab eval RUN --json
"""


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        "eval",
        "Evaluates a run's checkpoint, as a whole and class by class; the run folder is left as it is.",
        EXAMPLES,
    )
    parser.add_argument("run", help="a run folder")
    parser.add_argument("data", nargs="*", metavar="data.KEY=VALUE", help="where the data is now, or other data")
    parser.add_argument("--split", choices=["train", "val", "test"], default="test")
    parser.add_argument("--checkpoint", choices=["best", "last"], default="best")
    parser.add_argument("--device", choices=[device.value for device in Device], help="as trainer.device")
    parser.add_argument("--config-dir", action="append", default=[], metavar="DIR", help="where your own parts are")
    parser.add_argument("--trust", **TRUST)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    args = parser.parse_all(arguments)
    folder = RunDir(args.run)
    trust = Trust.of(args.trust, args.config_dir)
    found = opened(folder, args.split, args.checkpoint, args.device, args.data, trust)
    status = folder.read().get("status")
    if args.json:
        about = {"checkpoint": found.checkpoint, "status": status, "data": found.data, "classes": found.classes}
        say(json.dumps(jsonable({**found.figures, **about})))
        return 0
    if status == "killed":
        say(f"{'run':<24} killed; cnnlab train resume={one_line(str(folder.path))} goes on with it")
    if found.data != "as it was":
        say(f"{'data':<24} other than the run had: {one_line(found.data)}")
    _show(folder, found.checkpoint, found.figures, found.classes)
    return 0


@dataclass
class Found:
    """What an evaluation found: the checkpoint taken, the data (`as it was`, or how it differs), the figures."""

    checkpoint: str
    data: str
    figures: dict[str, float]
    classes: list[dict[str, Any]]


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


def weights(folder: RunDir, wanted: str, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The checkpoint to take, by name, and its content: of a run that was never evaluated, and so has no best one,
    the last.

    Raises `CheckpointError` where it is missing, damaged, another run's, or not the one that val chose.
    """
    from cnnlab.train.origin import chosen, load_own

    if not folder.last.exists() and not folder.best.exists():
        raise CheckpointError(f"{folder.path} has no checkpoint; to have one: {folder.begin_again()}")
    if wanted == "best" and not folder.last.exists():  # a copy of what matters
        return "best", load_own(folder, "best", config)
    last = load_own(folder, "last", config)
    best = chosen(folder, config, last["selection"], last) if wanted == "best" else None
    return ("last", last) if best is None else ("best", best)


def evaluate_run(folder: RunDir, split: str, which: str = "best", device: str | None = None) -> dict[str, float]:
    """The metrics of `opened`, by themselves."""
    return opened(folder, split, which, device).figures


def opened(
    folder: RunDir,
    split: str,
    which: str,
    device: str | None = None,
    data: Sequence[str] = (),
    trust: Trust = TYPED,
) -> Found:
    """The metrics of the checkpoint `which` of a run on `split`, named as in its `run.json`; and what became of each
    class (see `cnnlab.tasks.metrics.by_class`).

    It computes as the run did (precision, layout and decoder), where it finds the kind of device that the run had.

    Args:
        data: overrides of the data; without them, data that is not what the run had is refused.

    Raises:
        UsageError: no run folder, one that names code that nobody vouches for (see `cnnlab.composing.trust`), or
            an override of something else.
        CheckpointError: its checkpoint is missing, damaged or another's, or its data has changed.
    """
    from cnnlab.building.builder import build
    from cnnlab.building.trial import check
    from cnnlab.data.loader import Loader
    from cnnlab.train.loop import measure
    from cnnlab.train.origin import recorded_data, where
    from cnnlab.train.run import describe_sums

    composed = reopened(folder, trust)
    config = composed.config
    which, state = weights(folder, which, config)
    origin = state["origin"]
    _take(config, data)
    if device is not None:
        config["trainer"]["device"] = device
    choices = {**origin["choices"]}
    if "step" in choices:  # no step is taken: none is tried, compiled or captured
        config["trainer"]["step"] = choices["step"] = StepKind.eager.value
    check(composed)
    run = build(composed, resumed=True, choices=choices)
    before, now = recorded_data(origin), run.origin.data
    found = run.origin.changes(origin, folder.path)
    if found and not data:
        remedy = "Put it back"
        if place := where(config):
            key, word = place
            here = f"{key}={config['data'][key.removeprefix('data.')]}"
            here = quoted(here) if set(here) & set("*?[]{}, ") else here
            remedy += f", or say where it is: cnnlab eval {folder.path} {key}={word}; "
            remedy += f"to evaluate on it as it is now, type {here}"
        raise CheckpointError(
            f"the data is not what this run had, so its test split may hold what it was trained on: {found}. {remedy}"
        )
    _require_alike(before, now)
    run.state.load_state_dict(state, only=("model", "normalize", *run.interventions.of_evaluation()), path=folder.path)
    run.listeners.clear()
    loader = run.loaders["val"]
    if split == "train":  # as the network is evaluated: neither augmented nor shuffled
        source = run.loaders["train"].split
        size = min(loader.batch_size, len(source))
        loader = Loader(source, size, seed=0, shuffle=False, device=run.device, transform=loader.transform)
    elif split == "test":
        loader = run.loaders["test"]
    sums = measure(run, loader)
    classes = run.task.by_class(sums)
    figures = {f"{split}/{metric}": value for metric, value in describe_sums(run.task, sums).items()}
    return Found(which, found or "as it was", figures, classes)


def _take(config: dict[str, Any], overrides: Sequence[str]) -> None:
    """Puts `data.KEY=VALUE` into the config. Raises `UsageError` for anything else."""
    with composer() as open_composer:
        parsed = open_composer.parse(list(overrides)) if overrides else []
    for override in parsed:
        group, _, name = override.key_or_group.partition(".")
        if group != "data" or not is_plain(override) or name not in config["data"] or name.startswith("_"):
            names = ", ".join(f"data.{key}" for key in config["data"] if not key.startswith("_"))
            raise UsageError(f"`{line(override)}`: expected one of {names}; all else is the run's")
        config["data"][name] = override.value()


def _require_alike(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` for data whose classes or images the network was not made for."""
    for name in ("classes", "mask_classes", "channels", "size"):
        if name in before and before[name] != now[name]:
            raise CheckpointError(
                f"this network was trained for {name} {short(str(before[name]))}, and the data has "
                f"{short(str(now[name]))}; lay it out alike (class folders of the same names), "
                "and type data.size and data.channels of the run"
            )
