"""`cnnlab probe`: what becomes of signals in a network at initialization, beside theory. Nothing is trained."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnlab.composing.composer import Composer, composer
from cnnlab.composing.experiment import Experiment
from cnnlab.composing.overrides import is_for_hydra
from cnnlab.errors import UsageError, short
from cnnlab.machine.surroundings import torchrun
from cnnlab.runs.folder import RunDir, jsonable
from cnnlab.terminal import one_line, say
from cnnlab.verbs.arguments import (
    Arguments,
    Parser,
    answer,
    checked_experiment,
    is_run_folder,
    override_parser,
    parse,
)
from cnnlab.verbs.sweep import checked_cells

if TYPE_CHECKING:
    from cnnlab.sinks.drawing import Drawing

HELP = """cnnlab probe: what becomes of signals in a network at initialization, beside theory.

Usage: cnnlab probe [OVERRIDES] [-m] [--images N] [--figure FILE | --no-figure] [--json] [--config-dir DIR]
       cnnlab probe RUN [RUN ...]

Follows images of the first training batch through the untrained network, and the gradient of their losses back. By
layer: the standard deviation of pre-activations, activations and activation gradients, each beside what mean-field
theory says for these weights, this activation and this norm; the angle between two inputs; the effective rank of the
activations; and the singular values of the input-output Jacobian. Says where the signal dies, if it does, and which
init mends it. With -m, configs are compared in one table and one figure. Of a run folder, it is the network as the run
began. Nothing is trained, and no run folder is made.

  --images N       images that are followed (default 32)
  --figure FILE    where the figure goes (default: figures/probe.png of the run folder, or a new file in
                   OUTPUTS/figures, where OUTPUTS is paths.outputs)
  --no-figure      draws none

examples:
  cnnlab probe model=plain20 init=default
  cnnlab probe -m model=vgg norm=none init=he,xavier,lecun,default
  cnnlab probe -m model=plain20 model.depth=32 norm=none,batch activation=relu,tanh
  cnnlab probe outputs/digits-resnet/2026-11-22_10-00-00-1a2b
  cnnlab probe model=resnet18 data=cifar10 --json --no-figure
"""
IMAGES = 32
MAX_ROWS = 40
"""Layers shown before the middle of a deeper network is left out; --json and the figure have them all."""


@dataclass(frozen=True)
class Subject:
    """An experiment, what tells it from the others, and the run that it was read from."""

    experiment: Experiment
    label: str
    run: RunDir | None = None


def parser() -> Parser:
    made = override_parser("probe")
    made.add_argument("--images", type=int, default=IMAGES, metavar="N")
    made.add_argument("--figure", metavar="FILE")
    made.add_argument("--no-figure", action="store_true")
    return made


def main(arguments: Sequence[str]) -> int:
    args = parse(arguments, parser())
    if args.help and not args.overrides:
        say(HELP.rstrip())
        return 0
    _require_sense(args)
    with composer(args.config_dirs, args.config_name, args.trust) as open_composer:
        if args.help or args.show:
            return answer(open_composer, args)
        subjects = _subjects(open_composer, args)
    figure = _figure_path(subjects, args)
    from cnnlab.diagnose.probe import SCHEMA_VERSION, probe

    found: list[dict[str, Any]] = []
    with _progress(len(subjects)) as told:
        for number, subject in enumerate(subjects):
            document = probe(subject.experiment, images=args.own.images, tell=told(number, subject.label))
            about = {"label": subject.label, "overrides": list(subject.experiment.overrides)}
            found.append({**about, "run": None if subject.run is None else str(subject.run.path), **document})
    if args.json:
        document = {"schema_version": SCHEMA_VERSION, "configs": found, "figure": figure and str(figure)}
        say(json.dumps(jsonable(document)))
    else:
        _show(found)
    if figure is not None:  # what was measured is told before a disk can refuse its picture
        from cnnlab.diagnose.probe_figure import drawn
        from cnnlab.sinks.figures import save

        save(drawn(found, [subject.label for subject in subjects]), figure)
        if not args.json:
            say(f"figure: {one_line(str(figure))}")
    return 0


def _require_sense(args: Arguments) -> None:
    if args.own.images < 2:
        raise UsageError(f"--images: expected 2 or more, of which angles are taken, received {args.own.images}")
    if args.own.figure is not None and args.own.no_figure:
        raise UsageError("--figure and --no-figure: expected one of them")
    if args.own.figure is not None and not args.own.figure.lower().endswith(".png"):
        raise UsageError(f"--figure: expected a file that ends in .png, received {short(args.own.figure)}")
    if torchrun().world > 1:
        raise UsageError("cnnlab probe looks at one process's network; start it without torchrun")


# ---- what is probed ----


def _subjects(open_composer: Composer, args: Arguments) -> list[Subject]:
    """The experiments that the command line asks for, checked. Raises what a run of them would."""
    folders = [text for text in args.overrides if is_run_folder(text)]
    if folders:
        others = [text for text in args.overrides if text not in folders]
        if others or args.multirun:
            other = others[0] if others else "-m"
            raise UsageError(f"`{short(other)}`: a run folder has its own config; leave this out, or the folders")
        return [_of_run(open_composer, Path(text)) for text in folders]
    if not args.multirun:
        experiment = _fresh(checked_experiment(open_composer, args))
        return [Subject(experiment, " ".join(experiment.overrides) or experiment.name)]
    cells = open_composer.cells(args.overrides)
    experiments = [_fresh(cell) for cell in checked_cells(open_composer, cells)]
    return [Subject(e, label) for e, label in zip(experiments, labels(cells), strict=True)]


def _fresh(experiment: Experiment) -> Experiment:
    if experiment.resume is not None:
        raise UsageError(f"`resume`: type the run folder by itself, cnnlab probe {experiment.resume}")
    return experiment


def _of_run(open_composer: Composer, path: Path) -> Subject:
    from cnnlab.building.reopen import reopened
    from cnnlab.building.trial import check

    folder = RunDir(path)
    # Which device the run was on does not matter to what it began with, and it may not be here.
    experiment = reopened(folder, open_composer.trust).with_values({"trainer.device": "auto"})
    return Subject(check(experiment), path.name, folder)


def labels(cells: Sequence[Sequence[str]]) -> list[str]:
    """What tells the cells of a sweep apart: the overrides that not all of them have."""
    own = [[text for text in cell if not is_for_hydra(text)] for cell in cells]
    shared = [text for text in own[0] if all(text in cell for cell in own)]
    return [" ".join(text for text in cell if text not in shared) or " ".join(cell) for cell in own]


def _figure_path(subjects: Sequence[Subject], args: Arguments) -> Path | None:
    """Where the figure goes; `None` where none is wanted, or can be had.

    Raises `UsageError` where it was asked for, and matplotlib is not there.
    """
    from cnnlab.sinks.figures import WITHOUT, can_draw

    if args.own.no_figure:
        return None
    if not can_draw():
        if args.own.figure is not None:
            raise UsageError(f"--figure: {WITHOUT}, or --no-figure")
        say(WITHOUT, err=True)
        return None
    if args.own.figure is not None:
        return Path(args.own.figure)
    first = subjects[0]
    if len(subjects) == 1 and first.run is not None:
        return first.run.path / "figures" / "probe.png"
    return first.experiment.outputs / "figures" / f"probe-{time.strftime('%Y-%m-%d_%H-%M-%S')}.png"


@contextmanager
def _progress(count: int) -> Iterator[Callable[[int, str], Callable[[str], None]]]:
    """A line on stderr that says which config is looked at, and how."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from cnnlab.sinks.drawing import Drawing

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    console = Drawing(sys.stderr)
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as shown:
        task = shown.add_task("", total=count)

        def told(number: int, label: str) -> Callable[[str], None]:
            def tell(what: str) -> None:
                text = f"{one_line(label)}: {what}" if count > 1 else what
                shown.update(task, description=text, completed=number, refresh=console.is_terminal)

            return tell

        yield told


# ---- for people ----


def _show(found: Sequence[Mapping[str, Any]]) -> None:
    from cnnlab.sinks.drawing import Drawing

    console = Drawing(sys.stdout, elsewhere=140)
    if len(found) == 1:
        _show_layers(console, found[0])
        _show_jacobian(console, found[0])
    else:
        _show_configs(console, found)
    for probed in found:
        _show_verdict(console, probed, named=len(found) > 1)


def _show_layers(console: Drawing, probed: Mapping[str, Any]) -> None:
    from rich.table import Table

    title = f"{probed['model']}, init {probed['init']}: {probed['images']} images, untrained"
    table = Table(title=console.plain(title), title_justify="left", caption_justify="left", caption_style="")
    table.caption = (
        "standard deviations (gradients: root mean square), beside what mean-field theory says; angle between two "
        "inputs in degrees;\neffective rank of the activations of all inputs together (Roy & Vetterli 2007)"
    )
    table.add_column("layer", overflow="fold")
    headings = ("before", "theory", "after", "theory", "gradient", "theory", "angle", "theory", "rank")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    entry = probed["input"]
    table.add_row("(input)", *[""] * 6, _number(entry["angle"]), "", _number(entry["effective_rank"]))
    rows = [*probed["layers"], *probed["outputs"]]
    head = MAX_ROWS // 2 if len(rows) > MAX_ROWS else len(rows)
    for row in rows[:head]:
        table.add_row(console.plain(row["name"]), *_cells(row))
    if head < len(rows):
        table.add_row(f"... {len(rows) - MAX_ROWS:,} more")
        for row in rows[-(MAX_ROWS - head) :]:
            table.add_row(console.plain(row["name"]), *_cells(row))
    console.print(table)


def _cells(row: Mapping[str, Any]) -> list[str]:
    theory = row["theory"] or {}
    pairs = [(row[key], theory.get(key)) for key in ("pre_std", "std", "gradient", "angle")]
    return [_number(value) for pair in pairs for value in pair] + [_number(row["effective_rank"])]


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:.1e}" if value != 0 and not 1e-3 <= abs(value) < 1e4 else f"{value:.3g}"


def _show_jacobian(console: Drawing, probed: Mapping[str, Any]) -> None:
    found = probed["jacobian"]
    values = found["singular_values"]
    of = found["output"] if found["exact"] else f"{len(values)} random directions of {found['output']}"
    console.print(
        f"Jacobian of {one_line(of)} by the image: singular values {_number(values[0])} to {_number(values[-1])}, "
        f"condition {_number(found['condition']) or 'infinite'}"
    )


def _show_configs(console: Drawing, found: Sequence[Mapping[str, Any]]) -> None:
    from rich.table import Table

    title = f"Signals of {len(found)} untrained networks, first layer → last"
    table = Table(title=console.plain(title), title_justify="left", caption_justify="left", caption_style="")
    table.caption = (
        "signal: standard deviation between inputs; gradient of the activations; angle between two inputs in degrees;\n"
        "effective rank of the activations; J: largest and smallest singular value of the input-output Jacobian"
    )
    table.add_column("config", overflow="fold")
    for heading in ("signal", "gradient", "angle", "rank", "J"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict")
    for probed in found:
        layers, values = probed["layers"], probed["jacobian"]["singular_values"]
        cells = ["", "", "", ""]
        if layers:
            ends = layers[0], layers[-1]
            cells = [_ends(ends, key) for key in ("signal", "gradient", "angle", "effective_rank")]
        verdict = ", ".join(finding["kind"] for finding in probed["findings"]) or "fine"
        table.add_row(console.plain(probed["label"]), *cells, f"{_number(values[0])}, {_number(values[-1])}", verdict)
    console.print(table)


def _ends(layers: Sequence[Mapping[str, Any]], key: str) -> str:
    return " → ".join(_number(layer[key]) or "-" for layer in layers)


def _show_verdict(console: Drawing, probed: Mapping[str, Any], *, named: bool) -> None:
    head = f"{one_line(probed['label'])}: " if named else ""
    if not probed["findings"]:
        if not named:
            console.print("fine: signal and gradient reach all layers")
        return
    for finding in probed["findings"]:
        console.print(f"{head}{one_line(finding['text'])}")
    if probed["because"]:
        console.print(f"{head}{probed['because']}")
    remedy = probed["mended_by"]
    if remedy is None:
        console.print(f"{head}none of the usual inits mends it; type model=resnet18, or fewer layers")
    else:
        console.print(f"{head}mended by {remedy} (tried: nothing is found then)")
