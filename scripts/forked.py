"""`cnnlab` in forked processes: for campaigns of thousands of tiny runs, whose start would take most of their time.

A parent imports all that a run imports, without computing anything; each run is a fork of it, in a session of its
own, which begins where `cnnlab` itself begins (`cnnlab.cli.main`) and ends as it ends, signals, locks, watcher and all.
So a run of 20 steps takes one second instead of six. What a start does beside it (imports, the command line of the
operating system) is not what these campaigns look at; `scripts/signals.py`, which does, starts real ones.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

TINY = (
    "data.limit=100",
    "trainer.device=cpu",
    "trainer.threads=1",
    "trainer.batch_size=32",
    "trainer.epochs=5",
    "trainer.log_every=3",
    "stats.every=2",
    "stats.max_overhead=null",
)
"""20 steps, 4 an epoch, the last one of 4 samples; statistics by steps alone, not rarer on a busy machine."""


@dataclass(frozen=True)
class Ended:
    """`code`: the exit code, or minus the signal that ended it; `None` where it took too long, and was killed."""

    code: int | None
    errors: str
    seconds: float


class Forked:
    """One run of `cnnlab`, going on.

    Args:
        hook: called in the new process before anything else.
    """

    def __init__(self, arguments: Sequence[str], place: Path, hook: Callable[[], None] | None = None):
        place.mkdir(parents=True, exist_ok=True)
        self._place = place
        self.began = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._become(arguments, hook)
            finally:
                os._exit(70)

    def _become(self, arguments: Sequence[str], hook: Callable[[], None] | None) -> None:
        os.setsid()
        os.environ["PWD"] = str(self._place)
        os.chdir(self._place)
        for number, name in ((0, os.devnull), (1, "stdout"), (2, "stderr")):
            descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(descriptor, number)
            os.close(descriptor)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        sys.argv = ["cnnlab", *arguments]
        from cnnlab.cli import main

        if hook is not None:
            hook()
        code = main()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                with suppress(OSError, ValueError):
                    stream.flush()
        os._exit(code)

    def kill(self, number: int = signal.SIGKILL) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, timeout: float = 900) -> Ended:
        """How it ended; what does not within `timeout` seconds is killed with all that it started."""
        while True:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                code: int | None = os.waitstatus_to_exitcode(status)
                break
            if time.monotonic() - self.began > timeout:
                with suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                code = None
                break
            time.sleep(0.002)
        errors = (self._place / "stderr").read_text(errors="replace") if (self._place / "stderr").exists() else ""
        return Ended(code, errors, time.monotonic() - self.began)


def cnnlab(
    arguments: Sequence[str], place: Path, hook: Callable[[], None] | None = None, timeout: float = 900
) -> Ended:
    """Runs `cnnlab` with `arguments` in the folder `place`, where its stdout and stderr go, too."""
    return Forked(arguments, place, hook).wait(timeout)


def finished(arguments: Sequence[str], place: Path) -> None:
    """As `cnnlab`. Raises `SystemExit` with what it said where it did not end with 0."""
    ended = cnnlab(arguments, place)
    if ended.code != 0:
        raise SystemExit(f"cnnlab {' '.join(arguments)} ended with {ended.code}:\n{ended.errors}")


def warm(place: Path) -> None:
    """Imports what a run, its resume and its evaluation import: found by letting a fork run them."""
    import_module("cnnlab.cli")
    folder = place / "warming"
    listed = place / "modules"
    for arguments in (["train", *TINY, "model=cnn", f"hydra.run.dir={folder}"], ["eval", str(folder)]):

        def list_modules(read: int = 0) -> None:
            end = os._exit

            def note(code: int) -> None:
                listed.write_text("\n".join(sys.modules))
                end(code)

            os._exit = note  # type: ignore[assignment]

        finished(arguments, place)
        cnnlab(
            arguments[:1] + (["resume=" + str(folder)] if arguments[0] == "train" else [str(folder)]),
            place,
            list_modules,
        )
        for name in listed.read_text().splitlines():
            if name != "__main__" and not name.startswith("_remote_module"):
                with suppress(Exception):
                    import_module(name)
