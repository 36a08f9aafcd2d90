"""`cnnlab check`: what is wrong with an experiment, before it trains."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cnnlab.composing.composer import composer
from cnnlab.errors import UsageError
from cnnlab.machine.surroundings import torchrun
from cnnlab.runs.folder import RunDir, jsonable
from cnnlab.terminal import one_line, say
from cnnlab.verbs.arguments import Parser, answer, checked_experiment, override_parser, parse
from cnnlab.verbs.measured import progressing

if TYPE_CHECKING:
    from cnnlab.composing.experiment import Experiment
    from cnnlab.diagnose.checks import Finding

HELP = """cnnlab check: what is wrong with an experiment, before it trains.

Usage: cnnlab check [OVERRIDES] [--strict] [--json]

Builds the experiment and measures: labels and classes, inputs, images that are in two splits (turned and mirrored
ones, too), memory; the loss at the start against that of a network which knows nothing, penalties, gradients (that all
arrive, that no sample's leaks into another's, that they are those of the loss), whether the outputs depend on the
image, whether a few samples can be learned by heart, whether the rate is where a range test finds the loss to fall, and
whether the data is faster than the step. Nothing is written and nothing of it stays.

  --strict    exit 2 where a verdict is watch or bad (otherwise findings are exit 0)
  --json      one JSON document on stdout, everything else on stderr

examples:
  cnnlab check
  cnnlab check model=vgg data=folder data.root=photos
  cnnlab check model=resnet18 data=cifar10 optim.lr=3 --strict
"""
COLOURS = {"good": "green", "watch": "yellow", "bad": "red", "unknown": "bright_black"}


def parser() -> Parser:
    made = override_parser("check")
    made.add_argument("--strict", action="store_true")
    return made


def main(arguments: Sequence[str]) -> int:
    args = parse(arguments, parser())
    if args.help and not args.overrides:
        say(HELP.rstrip())
        return 0
    with composer(args.config_dirs, args.config_name, args.trust) as open_composer:
        if args.help or args.show:
            return answer(open_composer, args)
        experiment = checked_experiment(open_composer, args)
    found, notices = found_in(experiment)
    for notice in notices:
        say(one_line(notice), err=True)
    if args.json:
        say(json.dumps(jsonable({"what": experiment.name, "findings": [described(finding) for finding in found]})))
    else:
        show(found)
    wrong = [finding.name for finding in found if finding.verdict in ("watch", "bad")]
    if wrong and args.own.strict:
        raise UsageError(f"check: {len(wrong)} of {len(found)} are not well ({', '.join(wrong)})")
    return 0


def found_in(experiment: Experiment) -> tuple[list[Finding], list[str]]:
    """What the checks find in a run that is built for them alone, and what building it told."""
    from cnnlab.building.builder import build
    from cnnlab.diagnose.checks import check_run

    with progressing() as tell:
        run = build(experiment)
        return list(check_run(run, progress=tell)), run.notices


def beforehand(experiment: Experiment, folder: RunDir, *, json_output: bool = False) -> None:
    """For `cnnlab train check=true`: tells what the checks find and keeps it in `run.json`, as `check`. The run that
    trains is another one, built after it.

    Raises `UsageError` where something is bad, under `check=strict`.
    """
    if not experiment.check:
        return
    if torchrun().world > 1:
        say("check: it is made in one process; `cnnlab check` makes it without torchrun", err=True)
        return
    found, _ = found_in(experiment)
    show(found, err=json_output)
    folder.update(check=[described(finding) for finding in found])
    bad = [finding.name for finding in found if finding.verdict == "bad"]
    if bad and experiment.check == "strict":
        raise UsageError(f"check=strict: {', '.join(bad)}; type check=true to train all the same")


def described(finding: Finding) -> dict[str, Any]:
    return {
        "check": finding.name,
        "verdict": finding.verdict.value,
        "evidence": finding.evidence,
        "advice": finding.advice,
    }


def show(findings: Sequence[Finding], *, err: bool = False) -> None:
    """A table of the verdicts with their evidence, and what to do, for people."""
    from rich.table import Table
    from rich.text import Text

    from cnnlab.sinks.drawing import Drawing

    console = Drawing(sys.stderr if err else sys.stdout, elsewhere=120)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        table.add_row(
            console.plain(finding.name),
            Text(finding.verdict.value, COLOURS[finding.verdict.value]),
            console.plain(finding.evidence),
        )
        if finding.advice:
            table.add_row("", "", Text("→ ").append(console.plain(finding.advice)))
    console.print(table)
    count = {verdict: sum(finding.verdict == verdict for finding in findings) for verdict in COLOURS}
    told = ", ".join(f"{number} {verdict}" for verdict, number in count.items() if number)
    console.print(f"{len(findings)} checks: {told}")
