"""`cnnlab bench`: how fast a composed experiment trains, and where its time goes. Leaves no run folder behind."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cnnlab.composing.composer import composer
from cnnlab.errors import UsageError
from cnnlab.machine.surroundings import torchrun
from cnnlab.runs.folder import jsonable
from cnnlab.terminal import one_line, say
from cnnlab.verbs.arguments import Parser, answer, checked_experiment, override_parser, parse

if TYPE_CHECKING:
    from cnnlab.sinks.drawing import Drawing

HELP = """cnnlab bench: how fast an experiment trains, and where its time goes.

Usage: cnnlab bench [OVERRIDES] [--rounds N] [--seconds S] [--json] [--config-dir DIR]

Trains the experiment as `cnnlab train` would, on the same device, in short turns that alternate with turns of the same
training without statistics, without augmentation, without data (one batch, ready on the device), and with a bare loop
written by hand. Shows medians with quartiles, what each part costs, the time from process start to the first step,
peak memory, and the share of the roofline. The time of the rounds is about arms x rounds x seconds, after warm-up.

  --rounds N     turns of each arm (default 10)
  --seconds S    length of a turn, at least one step (default 1)

Close other programs first: on a shared machine look at the ratios and their quartiles, not at images a second.

examples:
  cnnlab bench
  cnnlab bench model=resnet20 data=cifar10 augment=[crop,flip] trainer.batch_size=128
  cnnlab bench trainer.step=compiled --rounds 20
  cnnlab bench stats=full --json
"""
ROUNDS, SECONDS = 10, 1.0


def parser() -> Parser:
    made = override_parser("bench")
    made.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    made.add_argument("--seconds", type=float, default=SECONDS, metavar="S")
    return made


def main(arguments: Sequence[str]) -> int:
    args = parse(arguments, parser())
    if args.help and not args.overrides:
        say(HELP.rstrip())
        return 0
    rounds, seconds = args.own.rounds, args.own.seconds
    if rounds < 1:
        raise UsageError(f"--rounds: expected 1 or more, received {rounds}")
    if not 0 < seconds < float("inf"):
        raise UsageError(f"--seconds: expected a number above 0, received {seconds:g}")
    if torchrun().world > 1:
        raise UsageError("cnnlab bench measures one process; start it without torchrun")
    with composer(args.config_dirs, args.config_name, args.trust) as open_composer:
        if args.help or args.show:
            return answer(open_composer, args)
        composed = checked_experiment(open_composer, args)
    from cnnlab.bench.experiment import bench

    with _progress() as progress:
        document = bench(composed, rounds=rounds, seconds=seconds, progress=progress)
    for notice in document["notices"]:
        say(one_line(notice), err=True)
    if args.json:
        say(json.dumps(jsonable(document)))
    else:
        _show(document)
    return 0


@contextmanager
def _progress() -> Iterator[Any]:
    """A line on stderr that is redrawn between turns only, so that drawing takes no time from a turn."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from cnnlab.sinks.drawing import Drawing

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    console = Drawing(sys.stderr)
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as shown:
        task = shown.add_task("building", total=None)

        def tell(what: str, done: int, total: int) -> None:
            shown.update(task, description=what, completed=done, total=total, refresh=console.is_terminal)

        yield tell


# ---- for people ----


def _show(document: Mapping[str, Any]) -> None:
    from cnnlab.sinks.drawing import Drawing

    console = Drawing(sys.stdout, elsewhere=120)
    machine, run = document["machine"], document["run"]
    name = machine["gpu"] or machine["cpu"]
    cores = f"{machine['cores']} core{'s' if machine['cores'] != 1 else ''}"
    console.print(f"{name}, {cores}, torch {machine['torch']}")
    for fact, text in run["facts"].items():
        console.print(f"  {fact:<7} {one_line(text)}")
    _show_arms(console, document)
    _show_costs(console, document)
    _show_roofline(console, document["roofline"])


def _show_arms(console: Drawing, document: Mapping[str, Any]) -> None:
    from rich.table import Table

    rounds, batch = document["rounds"], document["run"]["batch_size"]
    table = Table(title=f"Training, batch {batch}: medians of {rounds} interleaved turns", title_justify="left")
    for heading in ("arm", "images/s", "quartiles", "ms a step", "to full"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    full = document["arms"]["full"]["images_per_second"]["median"]
    for name, arm in document["arms"].items():
        rate = arm["images_per_second"]
        table.add_row(
            console.plain(name),
            f"{rate['median']:,.1f}",
            f"{rate['low']:,.1f} - {rate['high']:,.1f}",
            _milliseconds(arm["step_seconds"]["median"]),
            f"{rate['median'] / full:.3f}",
        )
    console.print(table)


def _show_costs(console: Drawing, document: Mapping[str, Any]) -> None:
    from cnnlab.inspect.summary import memory

    lines: list[tuple[str, str]] = []
    if document["ratio_to_bare_loop"] is not None:
        lines.append(("to bare loop", f"{_spread(document['ratio_to_bare_loop'])} of its images/s"))
    costs = document["costs"]
    if costs["statistics"] is not None:
        found = costs["statistics"]
        lines.append(
            ("statistics", f"{_percent(found['overhead'], 'of the time')}, sampling one step in {found['every']}")
        )
        lines.append(("", f"{found['run_seconds']:.2f} s of the whole run go into samples"))
        lines.append(("", f"a sampled step takes {_spread(found['sampled_step'])} steps more"))
        lines.append(("", f"a step that is not sampled takes {_percent(found['idle'], 'longer')}"))
    for name in ("augmentation", "data"):
        if costs[name] is not None:
            lines.append((name, _percent(costs[name], "of the time")))
    start = document["start"]
    if start["first_step_seconds"] is not None:
        rate = f"; with it, a run of {document['run']['steps']:,} steps trains {start['images_per_second']:,} images/s"
        lines.append(("start", f"{start['first_step_seconds']:.2f} s from process start to the first step{rate}"))
    peak = document["memory"]
    if peak["peak_bytes"] is not None:
        lines.append(("peak memory", f"{memory(peak['peak_bytes'])}: {peak['of']}"))
    for name, text in lines:
        console.print(f"{name:<13} {text}")


def _spread(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.3f} ({spread['low']:.3f} - {spread['high']:.3f})"


def _percent(spread: Mapping[str, float], what: str) -> str:
    """A cost; where its quartiles lie on both sides of zero it is not told from none."""
    shown = f"{spread['median']:.2%} ({spread['low']:.2%} - {spread['high']:.2%}) {what}"
    return f"{shown}, within the noise" if spread["low"] <= 0 <= spread["high"] else shown


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.0f}" if seconds >= 0.1 else f"{1000 * seconds:.3g}"


def _show_roofline(console: Drawing, found: Mapping[str, Any]) -> None:
    from rich.table import Table

    from cnnlab.inspect.summary import memory, quantity

    title = (
        f"Roofline: {found['share']:.1%} of it; a step takes {_milliseconds(found['step_seconds'])} ms, "
        f"at least {_milliseconds(found['least_step_seconds'])}"
    )
    table = Table(title=title, title_justify="left", caption_justify="left", caption_style="")
    table.caption = (
        f"{quantity(found['matmul_flops_per_second'])}FLOP/s in matrix products, "
        f"{memory(found['copy_bytes_per_second'])}/s in copies, measured here; each layer: the slower of the two"
    )
    for heading in ("layer", "type", "FLOP", "moved", "bound by", "share"):
        table.add_column(heading, justify="left" if heading in ("layer", "type", "bound by") else "right")
    for layer in found["top"]:
        flops, moved = f"{quantity(layer['flops'])}", memory(layer["bytes"])
        name, kind = console.plain(layer["name"]), console.plain(layer["type"])
        table.add_row(name, kind, flops, moved, layer["bound"], f"{layer['share']:.1%}")
    console.print(table)
