"""The console: a live display on a terminal, plain lines anywhere else. Loads rich for a terminal only."""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from cnnlab import terminal
from cnnlab.errors import DivergedError, InterruptedRun, RolledBack
from cnnlab.machine.surroundings import shown_path
from cnnlab.protocols import Listener
from cnnlab.sinks.health import Verdict, health
from cnnlab.sinks.jsonl import read_records
from cnnlab.sinks.records import figures, is_loss_part
from cnnlab.sinks.snapshot import Snapshot, duration
from cnnlab.terminal import one_line

if TYPE_CHECKING:
    from cnnlab.protocols import StepResult
    from cnnlab.sinks.live import Display

REDRAW_SECONDS = 0.25
SILENT_SECONDS = 30.0
"""Without a line, where there is no live display; then one tells how far it is."""


class Console(Listener):
    """Shows a run to the person who waits for it.

    It reads figures that others have brought to the host: it never waits for the device. Images a second are
    measured from one training record to the next, evaluation left out; the time left counts evaluation in.

    Args:
        stream: where to write; `None` is stdout. A verb with `--json` passes stderr.
        live: whether a terminal gets the live display (`trainer.progress`); other streams never do.
        now: a clock in seconds.
    """

    def __init__(
        self, stream: TextIO | None = None, *, live: bool = True, now: Callable[[], float] = time.perf_counter
    ):
        self._stream = terminal.stream(sys.stdout if stream is None else stream)
        on_terminal = self._stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        self._live = live and on_terminal
        self._now = now
        self._display: Display | None = None
        self._shown = Snapshot()
        self._tested: dict[str, float] = {}
        self._highest_lr = 0.0
        self._start: tuple[float, int] = (0.0, 0)
        self._mark: tuple[float, int] | None = None
        self._drawn = -math.inf
        self._told = -math.inf

    def notice(self, text: str) -> None:
        """One line of text, above the live display where there is one."""
        self._tell([text])

    def _tell(self, lines: Sequence[str]) -> None:
        self._told = self._now()
        text = "\n".join(map(one_line, lines))
        if self._display is not None:
            self._display.print(text)
        else:
            self._stream.write(text + "\n")
            self._stream.flush()

    def on_notice(self, run: Any, text: str) -> None:
        self.notice(text)

    def on_start(self, run: Any) -> None:
        facts = dict(run.facts)
        facts.setdefault("model", type(run.model).__name__)
        if run.resumed:
            facts["resumed"] = f"at step {run.clock.step:,} of {run.total_steps:,}"
        title = shown_path(run.dir) if run.dir else "cnnlab"
        self._shown = Snapshot(title=title, facts=facts, total_steps=run.total_steps, epochs=run.epochs)
        self._shown.lr = self._highest_lr = run.lr()
        self._start, self._mark = (self._now(), run.clock.step), None
        self._tested = {}
        if run.resumed and run.dir:
            for record in read_records(run.dir / "metrics.jsonl"):
                if record.get("step", 0) <= run.clock.step:
                    self._highest_lr = max(self._highest_lr, record.get("lr") or 0.0)
        self._count(run)
        if self._live:
            from cnnlab.sinks.live import Display

            self._display = self._display or Display(self._stream)  # type: ignore[arg-type]
            self._draw(force=True)
        else:
            self._tell([f"{name:<12} {value}" for name, value in facts.items()])

    def on_step(self, run: Any, result: StepResult) -> None:
        if self._mark is None:  # the first step compiles and warms up: speed is measured from its end
            self._mark = (self._now(), run.clock.step)
        if self._display is not None:
            self._count(run)
            self._draw()
        elif self._now() - self._told >= SILENT_SECONDS:
            self._count(run)
            self.notice(f"{self._where(run, run.clock.step)}  {duration(self._shown.seconds_left or 0)} left")

    def on_record(self, run: Any, record: dict[str, Any]) -> None:
        split, found = record["split"], figures(record)
        self._count(run)
        if split == "train":
            self._measure_speed(run)
            self._shown.lr = record.get("lr", self._shown.lr)
        self._mark = (self._now(), run.clock.step)
        self._shown.splits[split] = found
        if split == "test":
            self._tested = found
        if (
            self._display is None or split != "train"
        ):  # the display forgets; scrolled lines are the evaluations' history
            self.notice(self._line(run, record, found))
        self._draw(force=True)

    def on_stats(self, run: Any, record: dict[str, Any]) -> None:
        rate = run.lr()
        self._highest_lr = max(self._highest_lr, rate)
        annealed = max(rate / self._highest_lr, 1e-3) if self._highest_lr else 1.0
        self._shown.health, self._shown.stats_step = health(record, annealed), record["step"]
        self._draw()

    def on_epoch(self, run: Any, figures: dict[str, float]) -> None:
        self._count(run)
        self._mark = (self._now(), run.clock.step)
        self._draw(force=True)

    def on_end(self, run: Any, error: BaseException | None) -> None:
        self._count(run)
        if self._display is not None:
            self._draw(force=True)
            self._display.stop()
            self._display = None
        self._tell(self._last_words(run, error))

    def _count(self, run: Any) -> None:
        shown = self._shown
        shown.step = run.clock.step
        shown.epoch = min(_epoch_of(shown.step, run), run.epochs)
        elapsed, steps = self._now() - self._start[0], shown.step - self._start[1]
        if steps > 0:
            shown.seconds_left = elapsed / steps * max(run.total_steps - shown.step, 0)

    def _measure_speed(self, run: Any) -> None:
        if self._mark is None:
            return
        seconds, steps = self._now() - self._mark[0], run.clock.step - self._mark[1]
        if steps > 0 and seconds > 0:
            self._shown.images_per_second = steps * run.batch_size / seconds

    def _draw(self, force: bool = False) -> None:
        if self._display is None:
            return
        now = self._now()
        if force or now - self._drawn >= REDRAW_SECONDS:
            self._drawn = now
            self._display.update(self._shown)

    def _line(self, run: Any, record: Mapping[str, Any], found: Mapping[str, float]) -> str:
        words = [
            self._where(run, record["step"]),
            f"{record['split']:<5}",
            *(f"{name} {value:.4g}" for name, value in found.items() if not is_loss_part(name)),
        ]
        if record["split"] == "train":
            if record.get("lr") is not None:
                words.append(f"lr {record['lr']:.3g}")
            if self._shown.images_per_second is not None:
                words.append(f"{self._shown.images_per_second:,.0f} images/s")
        return "  ".join(words)

    @staticmethod
    def _where(run: Any, step: int) -> str:
        epoch = str(_epoch_of(step, run)).rjust(len(str(run.epochs)))
        done = str(step).rjust(len(str(run.total_steps)))
        return f"epoch {epoch}/{run.epochs}  step {done}/{run.total_steps}"

    def _last_words(self, run: Any, error: BaseException | None) -> list[str]:
        """The closing block: how it ended, what came of it, what to type next."""
        seconds = self._now() - self._start[0]
        lines = [f"{_status(error)} after {run.clock.step:,} of {run.total_steps:,} steps, {duration(seconds)}"]
        best = run.selection.as_record()
        if best is not None:
            lines.append(f"  best   {best['metric']} {best['value']:.4g} in epoch {best['epoch']}")
        if self._tested:
            kept = {name: value for name, value in self._tested.items() if not is_loss_part(name)}
            lines.append("  test   " + "  ".join(f"{name} {value:.4g}" for name, value in kept.items()))
        for strip in self._shown.health:
            if strip.verdict is Verdict.BAD:
                lines.append(f"  layers {strip.title}, {strip.words}")
        if run.dir:
            path = shown_path(run.dir)
            lines += [
                f"  run    {path}",
                f"  next   tensorboard --logdir {shlex.quote(shown_path(run.dir.parent))}",
                f"         cnnlab eval {shlex.quote(path)}",
            ]
        return lines


def _epoch_of(step: int, run: Any) -> int:
    """The epoch, from 1, that update `step` (updates done) belongs to."""
    return math.ceil(step / run.steps_per_epoch)


def _status(error: BaseException | None) -> str:
    if error is None:
        return "completed"
    if isinstance(error, InterruptedRun | KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, RolledBack):
        return "rolled back"
    return "diverged" if isinstance(error, DivergedError) else "failed"
