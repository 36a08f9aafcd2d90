"""`cnnlab eval RUN`: the metrics of a run's checkpoint on one of its splits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnlab.composing.composer import composer
from cnnlab.composing.overrides import is_plain, line, quoted
from cnnlab.composing.trust import TYPED, Trust
from cnnlab.errors import CheckpointError, UsageError
from cnnlab.machine.surroundings import shown_path
from cnnlab.runs.folder import RunDir, jsonable, write_atomically
from cnnlab.terminal import one_line, say
from cnnlab.verbs.arguments import Parser, opening_options

if TYPE_CHECKING:
    from cnnlab.assess.samples import Samples
    from cnnlab.building.evaluation import Found, OpenedData
    from cnnlab.building.opened import Opened
    from cnnlab.composing.experiment import Experiment

EXAMPLES = """examples:
  cnnlab eval outputs/digits-resnet/2026-11-22_10-00-00-1a2b
  cnnlab eval RUN --split val --checkpoint last
  cnnlab eval RUN data.root=/new/place      the run's data, where it has moved; or other data, which is then said
  cnnlab eval RUN data=folder data.root=photos   any data with the same classes, matched by name in any order
  cnnlab eval RUN --per-class                    recall, precision, F1 with their 95 % intervals
  cnnlab eval RUN --figures --top-losses 20      pictures to RUN/figures: confusion, calibration, Grad-CAM of failures
  cnnlab eval RUN --robustness                   accuracy under noise, blur, contrast, JPEG and shift
  cnnlab eval RUN --json
"""


def main(arguments: Sequence[str]) -> int:
    args = parser().parse_all(arguments)
    _require_sense(args)
    folder = RunDir(args.run)
    trust = Trust.of(args.trust, args.config_dir)
    network, data = opened_with_data(folder, args.checkpoint, args.device, args.data, trust)
    from cnnlab.assess.samples import Samples
    from cnnlab.building.evaluation import evaluate
    from cnnlab.verbs.eval_tables import show

    samples = Samples(network.task)
    found = evaluate(network, args.split, data, samples)
    for notice in network.notices:
        say(one_line(notice), err=True)
    status = folder.read().get("status")
    document = {**found.figures, **_document(network, status, found, args.split, samples)}
    pictures = _further(args, network, data, found, samples, document)
    if args.json:
        say(json.dumps(jsonable(document)))
        return 0
    if status == "killed":
        say(f"{'run':<24} killed; cnnlab train resume={one_line(str(folder.path))} goes on with it")
    if found.data:
        say(f"{'data':<24} other than the run had: {one_line(found.data)}")
    show(document, found.figures, network.epoch, per_class=args.per_class)
    for path in pictures:
        say(f"{'figure':<24} {one_line(shown_path(path))}")
    return 0


def parser() -> Parser:
    made = Parser(
        "eval",
        "Evaluates a run's checkpoint, as a whole and class by class, with 95 % intervals and calibration.\n"
        "The run folder is left as it is, but for pictures that are asked for.",
        EXAMPLES,
    )
    made.add_argument("run", help="a run folder")
    where = "data.root=FOLDER where the data is now, or other data"
    made.add_argument("data", nargs="*", metavar="data=OPTION", help=where)
    made.add_argument("--split", choices=["train", "val", "test"], default="test")
    made.add_argument("--per-class", action="store_true", help="show all classes, with the intervals of their figures")
    made.add_argument(
        "--top-losses",
        type=int,
        metavar="N",
        help="show the N samples with the highest losses, and draw their Grad-CAM",
    )
    made.add_argument(
        "--robustness",
        action="store_true",
        help="evaluate under noise, blur, contrast, JPEG and shift, five strengths each",
    )
    made.add_argument("--samples", type=int, metavar="N", help="of the split, for --robustness (2000)")
    made.add_argument("--figures", action="store_true", help="draw confusion, calibration, IoU and robustness")
    made.add_argument("--out", metavar="DIR", help="where pictures go (RUN/figures)")
    opening_options(made)
    made.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return made


def _require_sense(args: Any) -> None:
    """Raises `UsageError` for flags that go for nothing, before anything is computed."""
    for name, value in (("--top-losses", args.top_losses), ("--samples", args.samples)):
        if value is not None and value < 1:
            raise UsageError(f"{name}: expected a number from 1 on, received {value}")
    if args.samples is not None and not args.robustness:
        raise UsageError("--samples: is of --robustness; all else is of the whole split")
    if args.out is not None and not (args.figures or args.top_losses):
        raise UsageError("--out: there is nothing to write; type --figures or --top-losses N")
    if args.out is not None and Path(args.out).exists() and not Path(args.out).is_dir():
        raise UsageError(f"--out: expected a folder, received the file {args.out}")
    if args.figures:
        from cnnlab.sinks.figures import WITHOUT, can_draw

        if not can_draw():
            raise UsageError(f"--figures: {WITHOUT}")


def _document(network: Opened, status: Any, found: Found, split: str, samples: Samples) -> dict[str, Any]:
    """For `--json`, beside the figures."""
    from cnnlab.assess import intervals
    from cnnlab.assess.calibration import in_words

    calibration = samples.calibration()
    told = None if calibration is None else {**calibration.described(), "in_words": in_words(calibration)}
    return {
        "checkpoint": network.checkpoint,
        "status": status,
        "data": found.data or "as it was",
        "split": split,
        "samples": len(samples.found["loss"]),
        "classes": intervals.by_class(found.classes, found.sums.get("confusion"), samples.found),
        "intervals": {
            name: list(pair) for name, pair in intervals.of_figures(found.figures, split, samples.found).items()
        },
        "calibration": told,
    }


def _further(
    args: Any, network: Opened, data: OpenedData, found: Found, samples: Samples, document: dict[str, Any]
) -> list[Path]:
    """Measures and draws what was asked for, adds it to the document, and returns the pictures."""
    from cnnlab.verbs import eval_pictures as pictures

    folder = Path(args.out) if args.out else network.folder.path / "figures"
    written: list[Path] = []
    if args.robustness:
        from cnnlab.assess.robustness import robustness
        from cnnlab.verbs.measured import progressing

        with progressing() as tell:
            document["robustness"] = robustness(network, args.split, data, samples=args.samples, tell=tell)
    if args.top_losses:
        rows = samples.hardest(args.top_losses)
        document["top_losses"] = [
            {"sample": data.name(args.split, row["index"]), **row}
            for row in samples.described(rows, network.task.class_names(network.spec))
        ]
        written += pictures.top_losses(network, args.split, data, document["top_losses"], folder)
    if args.figures:
        written += pictures.figures(network.task, found, samples, document, folder)
    if written:
        document["pictures"] = [str(path) for path in written]
    if args.figures:
        write_atomically(
            folder / "evaluation.json", json.dumps(jsonable(document), indent=1).encode(), pictures.ELSEWHERE
        )
    return written


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
    """The network of the checkpoint `which` of a run, and what it does on `split`; see `opened_with_data`."""
    from cnnlab.building.evaluation import evaluate

    network, found = opened_with_data(folder, which, device, data, trust)
    return network, evaluate(network, split, found)


def opened_with_data(
    folder: RunDir, which: str, device: str | None = None, data: Sequence[str] = (), trust: Trust = TYPED
) -> tuple[Opened, OpenedData]:
    """The network of the checkpoint `which` of a run, and the data to evaluate it on.

    Args:
        data: overrides of the data; without them, data that is not what the run had is refused.

    Raises:
        UsageError: no run folder, one that names code that nobody vouches for (see `cnnlab.composing.trust`), or
            an override of something else.
        CheckpointError: its checkpoint is missing, damaged or another's, or its data has changed.
    """
    from cnnlab.building.evaluation import data_for
    from cnnlab.building.opened import open_run

    network = open_run(folder, which, device=device, trust=trust)
    found = data_for(network, with_data(network, data, trust) if data else None)
    if found.changes and not data:
        raise CheckpointError(
            "the data is not what this run had, so its test split may hold what it was trained on: "
            f"{found.changes}. {_remedy(network)}"
        )
    return network, found


def _remedy(network: Opened) -> str:
    place = network.experiment.data_place
    if place is None:
        return "Put it back"
    here = f"{place.option}={place.value}"
    here = quoted(here) if set(here) & set("*?[]{}, ") else here
    return (
        f"Put it back, or say where it is: cnnlab eval {network.folder.path} {place.option}={place.word}; "
        f"to evaluate on it as it is now, type {here}"
    )


def with_data(network: Opened, typed: Sequence[str], trust: Trust) -> Experiment:
    """The run's experiment with what was typed of its data: `data=OPTION`, `data.KEY=VALUE`.

    Raises `UsageError` for anything else, `ConfigError` for values that the data set refuses.
    """
    from cnnlab.building.evaluation import fitting_values
    from cnnlab.building.trial import read
    from cnnlab.composing.experiment import Node

    own = network.experiment
    with composer([*trust.folders, *own.config_dirs], trusted=trust.names) as open_composer:
        parsed = open_composer.parse(list(typed))
        option = next((override for override in parsed if override.key_or_group == "data"), None)
        node = own.node("data")
        if option is not None:
            composed = open_composer.compose([line(option)])
            node = Node.of(composed, "data")
    given = {override.key_or_group.partition(".")[2]: override for override in parsed if override is not option}
    for name, override in given.items():
        known = override.key_or_group.startswith("data.") and node.states(name)
        if not known or not is_plain(override):
            names = ", ".join(f"data.{key}" for key in node.settings)
            raise UsageError(f"`{line(override)}`: expected data=OPTION, or one of {names}; all else is the run's")
    values = {name: override.value() for name, override in given.items()}
    if option is not None:
        values |= fitting_values(network, node, list(given))
    return read(own.with_values({"data": node.with_settings(**values).config}))
