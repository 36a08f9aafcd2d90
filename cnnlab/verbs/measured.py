"""What the verbs that measure a network share: overrides or a run folder, where the figure goes, progress."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnlab.composing.composer import Composer
from cnnlab.composing.trust import Trust
from cnnlab.errors import UsageError
from cnnlab.machine.surroundings import shown_path, torchrun
from cnnlab.runs.folder import RunDir
from cnnlab.schema import Device
from cnnlab.terminal import one_line, say
from cnnlab.verbs.arguments import Arguments, Parser, checked_experiment, is_run_folder, override_parser

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cnnlab.train.run import Run

MEASURED = """\
  RUN                 a run folder, at its checkpoint, instead of overrides
  --checkpoint WHICH  last or best (default last)
  --device DEVICE     of a run folder: as trainer.device
  --figure FILE       where the picture goes, as PNG (default: RUN/figures/{verb}.png, or {verb}.png here)
  --no-figure         draws none
  --json              one JSON document on stdout, everything else on stderr
"""
"""Lines for a verb's help."""


def measuring_parser(verb: str) -> Parser:
    """The parser of a verb that takes overrides or a run folder."""
    parser = override_parser(verb)
    parser.add_argument("--checkpoint", choices=["best", "last"])
    parser.add_argument("--device", choices=[device.value for device in Device])
    parser.add_argument("--figure", metavar="FILE")
    parser.add_argument("--no-figure", action="store_true")
    return parser


@dataclass
class Measured:
    """What is measured: the run, built; the folder it is of, if any; in words, what it is and where it stands."""

    run: Run
    folder: Path | None
    title: str


def measured(open_composer: Composer, args: Arguments, *, rate: float | None = None) -> Measured:
    """The run of the overrides at its initialization, or that of a run folder at a checkpoint.

    Args:
        rate: to take the place of `optim.lr=auto`; `None` lets it be found.

    Raises what composing, checking, reading and building do.
    """
    if torchrun().world > 1:
        raise UsageError("this verb measures in one process; start it without torchrun")
    paths = [text for text in args.overrides if is_run_folder(text)]
    own = args.own
    if not paths:
        for flag in ("checkpoint", "device"):
            if getattr(own, flag) is not None:
                typed = f"trainer.device={own.device}" if flag == "device" else "a run folder"
                raise UsageError(f"--{flag}: there is no run folder whose it could be; type {typed}")
        experiment = checked_experiment(open_composer, args)
        if experiment.finds_rate and rate is not None:
            experiment = experiment.with_values({"optim.lr": rate})
        from cnnlab.building.builder import build

        run = build(experiment)
        return _told(Measured(run, None, f"{experiment.name} at initialization, seed {experiment.seed}"))
    if len(paths) > 1 or len(args.overrides) > 1:
        raise UsageError(
            f"expected overrides or one run folder, received {' '.join(map(repr, args.overrides))}; a run folder is "
            "measured as it is"
        )
    from cnnlab.building.standing import standing

    folder = RunDir(paths[0])
    found = standing(folder, own.checkpoint or "last", device=own.device, trust=Trust.of(args.trust, args.config_dirs))
    if found.changes:
        say(f"data: other than the run had: {one_line(found.changes)}", err=True)
    title = f"{shown_path(folder.path)} at its {found.checkpoint} checkpoint, step {found.run.clock.step:,}"
    return _told(Measured(found.run, folder.path, title))


def _told(found: Measured) -> Measured:
    for notice in found.run.notices:
        say(one_line(notice), err=True)
    return found


def figure_path(args: Arguments, folder: Path | None, verb: str) -> Path | None:
    """Where the figure goes; `None` where none is wanted, or none can be drawn, which is then said.

    Raises `UsageError` for a place that is none, before anything is measured.
    """
    from cnnlab.sinks.figures import WITHOUT, can_draw

    own = args.own
    if own.no_figure:
        return None
    if own.figure is not None:
        path = Path(own.figure)
        if path.suffix.lower() != ".png":
            raise UsageError(f"--figure: expected a file NAME.png, received {own.figure!r}")
        if path.is_dir() or not path.parent.is_dir():
            raise UsageError(f"--figure: expected a file in a folder that there is, received {own.figure!r}")
    else:
        path = Path(f"{verb}.png") if folder is None else folder / "figures" / f"{verb}.png"
    if not can_draw():
        if own.figure is not None:
            raise UsageError(f"--figure: {WITHOUT}")
        say(WITHOUT, err=True)
        return None
    return path


def draw(figure: Figure, path: Path, *, quiet: bool) -> None:
    """Writes the figure, shows it where the terminal can, and says where it is."""
    from cnnlab.sinks.figures import save, show

    save(figure, path)
    if not quiet:
        show(figure)
    say(f"{'figure':<24} {one_line(shown_path(path))}", err=quiet)


@contextmanager
def progressing() -> Iterator[Any]:
    """`tell(what, done, total)` redraws a bar on stderr where that is a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from cnnlab.sinks.drawing import Drawing

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    console = Drawing(sys.stderr)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task("building", total=None)

        def tell(what: str, done: int, total: int) -> None:
            shown.update(task, description=what, completed=done, total=total)

        yield tell


def table(rows: Sequence[tuple[str, str]]) -> None:
    """Names and what was found, a line each."""
    for name, text in rows:
        say(f"{name:<24} {text}")
