"""The console, as a log file and as a terminal see it."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import pytest
from sink_helpers import fake_run, metric_record, stats_record

from cnnlab.errors import DivergedError, InterruptedRun
from cnnlab.sinks.console import Console, duration


class Clock:
    """Seconds that a test lets pass."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


class Terminal(io.StringIO):
    def isatty(self):
        return True


def console(stream=None, **options):
    clock = Clock()
    return Console(stream or io.StringIO(), now=clock, **options), clock


def steps(listener, run, clock, until, seconds_each=0.1):
    while run.clock.step < until:
        run.clock.step += 1
        clock.seconds += seconds_each
        listener.on_step(run, None)


def test_a_log_has_one_plain_line_a_record():
    stream = io.StringIO()
    listener, clock = console(stream)
    run = fake_run()
    listener.on_start(run)
    start = stream.getvalue()
    assert "digits [1,257 train]" in start and "Linear" in start
    steps(listener, run, clock, 5)
    listener.on_record(run, metric_record(5, "train", accuracy=0.25))
    listener.on_stats(run, stats_record(5))
    steps(listener, run, clock, 10)
    listener.on_record(run, metric_record(10, "val", accuracy=0.123456))
    listener.on_epoch(run, {})
    lines = stream.getvalue()[len(start) :].splitlines()
    assert lines == [
        "epoch 1/3  step  5/30  train  loss 1  accuracy 0.25  lr 0.1  320 images/s",
        "epoch 1/3  step 10/30  val    loss 1  accuracy 0.1235",
    ]
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", stream.getvalue()), "no control characters"


def test_every_line_is_flushed():
    class Counting(io.StringIO):
        flushed = 0

        def flush(self):
            self.flushed += 1

    stream = Counting()
    listener, _ = console(stream)
    listener.on_start(fake_run())
    listener.on_record(fake_run(step=5), metric_record(5, "train"))
    assert stream.flushed == 2


def test_speed_leaves_out_the_first_step_and_the_evaluation():
    stream = io.StringIO()
    listener, clock = console(stream)
    run = fake_run()
    listener.on_start(run)
    steps(listener, run, clock, 1, seconds_each=60)  # compiles
    steps(listener, run, clock, 5, seconds_each=0.5)
    listener.on_record(run, metric_record(5, "train"))
    assert stream.getvalue().splitlines()[-1].endswith(" 64 images/s")
    clock.seconds += 30  # evaluates
    listener.on_record(run, metric_record(5, "val"))
    steps(listener, run, clock, 10, seconds_each=0.25)
    listener.on_record(run, metric_record(10, "train"))
    assert stream.getvalue().splitlines()[-1].endswith(" 128 images/s")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "completed"),
        (InterruptedRun("SIGINT", 2), "interrupted"),
        (DivergedError("nan"), "diverged"),
        (RuntimeError("ours"), "failed"),
    ],
)
def test_the_closing_block(tmp_path, monkeypatch, error, status):
    monkeypatch.chdir(tmp_path)
    stream = io.StringIO()
    listener, clock = console(stream)
    run = fake_run(tmp_path / "outputs" / "my digits" / "a1")
    listener.on_start(run)
    for step, accuracy in ((10, 0.5), (20, 0.9), (30, 0.7)):
        steps(listener, run, clock, step, seconds_each=2)
        listener.on_record(run, metric_record(step, "val", accuracy=accuracy))
        run.selection.offer(accuracy, step // 10)
    listener.on_stats(run, stats_record(30, **{"activation/dead": [0.0, 0.9, 0.0]}))
    listener.on_record(run, metric_record(30, "test", accuracy=0.85))
    before = len(stream.getvalue())
    listener.on_end(run, error)
    assert stream.getvalue()[before:].splitlines() == [
        f"{status} after 30 of 30 steps, 1:00",
        "  best   val/accuracy 0.9 in epoch 2",
        "  test   loss 1  accuracy 0.85",
        "  layers dead units, layer1.relu: 90% dead",
        "  run    outputs/my digits/a1",
        "  next   tensorboard --logdir 'outputs/my digits'",
        "         cnnlab eval 'outputs/my digits/a1'",
    ]


def test_of_equal_values_the_epoch_is_told_whose_weights_were_kept():
    stream = io.StringIO()
    listener, clock = console(stream)
    run = fake_run()
    listener.on_start(run)
    for step in (10, 20, 30):
        steps(listener, run, clock, step)
        listener.on_record(run, metric_record(step, "val", accuracy=0.9))
        run.selection.offer(0.9, step // 10)
    listener.on_end(run, None)
    assert "best   val/accuracy 0.9 in epoch 3" in stream.getvalue()


def test_a_resumed_run_says_where_it_goes_on(tmp_path):
    stream = io.StringIO()
    listener, _ = console(stream)
    listener.on_start(fake_run(tmp_path, step=20, resumed=True))
    assert "resumed      at step 20 of 30" in stream.getvalue()


def test_a_long_silence_is_broken():
    stream = io.StringIO()
    listener, clock = console(stream)
    run = fake_run()
    listener.on_start(run)
    steps(listener, run, clock, 9, seconds_each=5)
    assert stream.getvalue().splitlines()[-1] == "epoch 1/3  step  6/30  2:00 left"


def test_a_reader_that_has_gone_does_not_end_the_run():
    read, write = os.pipe()
    with os.fdopen(write, "w") as stream:
        listener, _ = console(stream)
        os.close(read)
        listener.notice("nobody reads this")
        listener.notice("nor this")
        assert os.fstat(stream.fileno()).st_rdev == Path(os.devnull).stat().st_rdev, "from now on it writes to nowhere"


def test_an_end_before_the_first_step_is_told():
    stream = io.StringIO()
    listener, _ = console(stream)
    run = fake_run()
    listener.on_start(run)
    listener.on_end(run, RuntimeError("no memory"))
    assert "failed after 0 of 30 steps" in stream.getvalue()


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "40")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


def drawn(stream, since=0):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()[since:]).replace("\r", "")


def test_a_terminal_gets_a_live_display_with_everything_on_it(terminal):
    listener, clock = console(terminal)
    run = fake_run()
    listener.on_start(run)
    steps(listener, run, clock, 15)
    listener.on_record(run, metric_record(15, "train", accuracy=0.25))
    listener.notice("a line from elsewhere")
    listener.on_stats(run, stats_record(15, 1000, **{"activation/std": [0.98**layer for layer in range(1000)]}))
    listener.on_record(run, metric_record(15, "val", accuracy=0.5))
    before = len(terminal.getvalue())
    listener.on_epoch(run, {})
    shown = drawn(terminal, before)
    for words in ("digits [1,257 train]", "epoch 2/3", "step 15/30", "320 images/s", "0:01 left", "lr 0.1"):
        assert words in shown
    assert re.search(r"train +1 +0\.25", shown) and re.search(r"val +1 +0\.5", shown)
    assert "layer999" in shown and "update/weight" in shown
    assert len(shown.strip().splitlines()) <= 20, "a thousand layers fit"
    assert "a line from elsewhere" in drawn(terminal)
    listener.on_end(run, None)
    assert terminal.getvalue().count("\x1b[?25h") == 1, "the cursor is given back"


def test_a_narrow_terminal_still_names_the_sick_layer(terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    listener, clock = console(terminal)
    run = fake_run()
    listener.on_start(run)
    steps(listener, run, clock, 5)
    listener.on_stats(run, stats_record(5, 40, **{"activation/dead": [0.0] * 39 + [0.9]}))
    before = len(terminal.getvalue())
    listener.on_end(run, None)
    assert re.search("▁█ +layer39.relu: 90% dead", drawn(terminal, before))


def test_the_display_is_redrawn_at_a_bounded_rate(terminal):
    listener, clock = console(terminal)
    run = fake_run(total_steps=10_000, steps_per_epoch=5_000)
    listener.on_start(run)
    steps(listener, run, clock, 1000, seconds_each=0.001)
    assert drawn(terminal).count("epoch ") <= 6
    listener.on_end(run, None)


@pytest.mark.parametrize("reason", ["progress off", "dumb terminal"])
def test_plain_lines_on_a_terminal_when_asked_or_needed(terminal, monkeypatch, reason):
    if reason == "dumb terminal":
        monkeypatch.setenv("TERM", "dumb")
    listener, _ = console(terminal, live=reason != "progress off")
    listener.on_start(fake_run())
    listener.on_record(fake_run(step=5), metric_record(5, "train"))
    listener.on_end(fake_run(step=5), None)
    assert "\x1b" not in terminal.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.7, "1:00"), (754, "12:34"), (3723, "1:02:03")])
def test_duration(seconds, text):
    assert duration(seconds) == text
