"""Ctrl-C, SIGTERM and SIGHUP: what they mean where, and an end that comes whatever the process is busy with.

Outside of a run's steps a signal unwinds as an exception, so that folders are left tidy. During the steps the run
answers them itself (`answered_by`): the first one saves at the next step, a second Ctrl-C unwinds at once.

Python hears signals between two of its own instructions only. A compiler, a frozen decoder or a hanging disk is none,
and neither must the interpreter's own end wait for them. So the program (not a library that is called from Python)
has a watcher, a thread that wakes up with each signal: what has not ended `PATIENCE` seconds after a signal that
nobody answers, or `GRACE` seconds after a second Ctrl-C, is ended, with every process that it started. Files are
written so that a kill at any moment loses none.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cnnlab.errors import Terminated

PATIENCE = 3.0
"""Seconds that unwinding may take."""
GRACE = 0.4
"""Seconds that it may take after a second Ctrl-C."""
LAST_WORDS = 0.2
"""Seconds for `on_forced_end`."""

HEARD = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

Handler = Callable[[int, Any], Any]


def raises(number: int, frame: Any) -> None:
    """The handler that unwinds."""
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)


def number_of(error: KeyboardInterrupt) -> int:
    """The signal that an interruption came from."""
    return error.number if isinstance(error, Terminated) else int(signal.SIGINT)


@contextmanager
def answered_by(handler: Handler, then: Handler | None = None) -> Iterator[None]:
    """In the block, the signals call `handler`; who started the process with `nohup` ignores SIGHUP, and so do we.

    Behind it they call `then`, or (without one) whatever they called before.

    Without effect outside of the main thread, which alone hears signals.
    """
    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in HEARD:
            if number != getattr(signal, "SIGHUP", None) or signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, then or before)


class Watcher:
    """Ends the process when an interruption does not.

    `on_forced_end` is called before a forced end, for a last word to a file; it gets `LAST_WORDS` seconds.
    """

    def __init__(self) -> None:
        self.on_forced_end: Callable[[int], None] | None = None
        self._answers: Callable[[], bool] = lambda: False
        self._ctrl_c = 0
        self._deadline: tuple[float, int] | None = None
        self._changed = threading.Condition()

    def heard(self, number: int) -> None:
        """A signal has arrived."""
        if number not in HEARD:
            return
        self._ctrl_c += number == signal.SIGINT
        if self._ctrl_c >= 2 and number == signal.SIGINT:
            self.expect_end(number, GRACE)
        elif not self._answers():
            self.expect_end(number)

    @contextmanager
    def answered(self, answers: Callable[[], bool]) -> Iterator[None]:
        """In the block, a single signal starts no clock while `answers()`: somebody acts upon it between two steps."""
        before, self._answers = self._answers, answers
        try:
            yield
        finally:
            self._answers = before

    def expect_end(self, number: int, seconds: float = PATIENCE) -> None:
        """The process ends within so many seconds, by itself or by force."""
        with self._changed:
            end = time.monotonic() + seconds
            if self._deadline is None or end < self._deadline[0]:
                self._deadline = end, number
                self._changed.notify()

    def start(self) -> None:
        """Watches from now on, until the process ends."""
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(read,), name="cnnlab-signals", daemon=True).start()
        threading.Thread(target=self._wait, name="cnnlab-deadline", daemon=True).start()

    def _listen(self, read: int) -> None:
        while heard := os.read(read, 64):
            for number in heard:
                self.heard(number)

    def _wait(self) -> None:
        while True:
            with self._changed:
                while self._deadline is None or time.monotonic() < self._deadline[0]:
                    self._changed.wait(None if self._deadline is None else self._deadline[0] - time.monotonic())
                _, number = self._deadline
            self._end(number)

    def _end(self, number: int) -> None:
        try:
            if self.on_forced_end is not None:
                words = threading.Thread(target=self.on_forced_end, args=(number,), daemon=True)
                words.start()
                words.join(LAST_WORDS)
            kill_descendants()
        finally:
            os._exit(128 + number)


watcher = Watcher()
"""The program's; it watches nothing unless the program has started it."""


def kill_descendants() -> None:
    """Kills what this process started, and what that started (where there is a `/proc`): none is left behind."""
    for child in descendants(os.getpid()):
        with suppress(OSError):
            os.kill(child, signal.SIGKILL)


def descendants(process: int) -> list[int]:
    """The processes below one, from Linux's `/proc`; elsewhere none are known."""
    children: dict[int, list[int]] = {}
    # Not by a glob, which raises where a process ends while it looks.
    for name in filter(str.isdigit, os.listdir("/proc")) if sys.platform == "linux" else ():  # noqa: PTH208
        with suppress(OSError, ValueError, IndexError):
            stat = Path("/proc", name, "stat").read_text(errors="replace")
            parent = int(stat.rpartition(")")[2].split()[1])  # the name before it may hold anything
            children.setdefault(parent, []).append(int(name))
    found, below = [], [process]
    while below:
        below = [child for parent in below for child in children.get(parent, [])]
        found += below
    return found
