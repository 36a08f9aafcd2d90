"""`cnnlab explain RUN --trust`: how far each method's maps can be trusted, measured and shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cnnlab.errors import UsageError
from cnnlab.terminal import one_line, say
from cnnlab.verbs.measured import progressing

if TYPE_CHECKING:
    from cnnlab.building.evaluation import OpenedData
    from cnnlab.building.opened import Opened
    from cnnlab.explain import Subject
    from cnnlab.explain.examples import Examples
    from cnnlab.explain.trust import Measured, Report

LEAST = 5
"""Images to measure on: fewer have no interval worth the name."""


def measure(
    network: Opened,
    subject: Subject,
    on: Examples | tuple[str, OpenedData, int],
    target: str,
    methods: Sequence[str],
    layers: Sequence[str],
    region: str,
) -> Report:
    """The report on one's own images, or on so many of a split of data, of which more is known.

    Args:
        target: the first one that was asked for; of `topK` the highest.

    Raises `UsageError` for fewer than `LEAST` images.
    """
    import torch

    from cnnlab.building.known import batch_of, examples_of, known_of
    from cnnlab.explain import score_of
    from cnnlab.explain.trust import Known, report

    batch = None
    if isinstance(on, tuple):
        split, data, count = on
        batch = batch_of(network, split, data, count)
        on = examples_of(batch, split)
    if len(on.names) < LEAST:
        raise UsageError(f"--trust: expected {LEAST} images or more to measure on, received {len(on.names)}")
    wanted = "predicted" if target not in subject.classes and target.removeprefix("top").isdecimal() else target
    with subject.undisturbed(), torch.no_grad():
        outputs = subject.outputs(on.prepared)
        score = score_of(subject, outputs, wanted, truth=on.truth, region=region)
    known = Known() if batch is None else known_of(network, split, data, batch, score)
    with progressing() as tell:
        return report(
            subject,
            on.prepared,
            score,
            methods,
            layers,
            known=known,
            target=wanted,
            tell=lambda done, of, what: tell(what, done, of),
        )


def show(report: Report) -> None:
    """A table: a row a method, a column a measure."""
    names = list(dict.fromkeys(name for each in report.methods for name in each.measures))
    wide = max(len(each.title) for each in report.methods)
    say(f"\ntrust, on {report.images} images, of `{one_line(report.target)}`: score / floor, NO: not above it")
    say(f"{'method':<{wide}}  " + " ".join(f"{name:>15}" for name in names))
    for each in report.methods:
        cells = [_cell(name, each.measures.get(name)) for name in names]
        empty = f"  {each.without_evidence} without evidence" if each.without_evidence else ""
        say(f"{one_line(each.title):<{wide}}  " + " ".join(f"{cell:>15}" for cell in cells) + empty)
    if report.effects:
        taken = ", ".join(f"{name} {each.mean:+.2f}" for name, each in report.effects.items())
        say(f"taking a part away lowers the score, on average, by: {taken}")


def _cell(name: str, found: Measured | None) -> str:
    if found is None or not found.score.known:
        return "-"
    floor = "" if name == "randomization" else f" / {found.floor:.2f}"
    return f"{found.score.mean:.2f}{floor}{'   ' if found.beats else ' NO'}"
