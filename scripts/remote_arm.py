"""An arm of a benchmark in a process of its own, as its users would run it.

Threads, the allocator and the treatment of denormal numbers are settings of a process: in a common one, each arm would
train with what another one has set. Between its turns the process stands still with all that it has started, so that
nobody computes, spins or fetches data in another arm's turn.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from cnnlab.bench.rounds import Arm

Make = Callable[..., tuple[Arm, str]]
"""Makes an arm and a word on it, in the process that it will live in; a function that can be imported by its name."""


class RemoteArm(Arm):
    """An arm that `make(*arguments)` makes in a new process, at its first turn.

    Args:
        name: as it is reported.
        threads: of torch, in that process; `None` for torch's own choice.

    Raises:
        RuntimeError: in a turn, with what went wrong in the process.
    """

    def __init__(self, name: str, make: Make, *arguments: Any, threads: int | None = None):
        super().__init__(name, ())
        self.note = ""
        context = multiprocessing.get_context("spawn")
        self._pipe, self._far_end = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(self._far_end, make, arguments, threads), name=name, daemon=False
        )

    def run(self, steps: int) -> tuple[int, int]:
        if self._process.pid is None:
            self._process.start()
            self._far_end.close()
            self.note = self._answer()
        self._signal("SIGCONT")
        self._pipe.send(steps)
        images, sampled = self._answer()
        self._signal("SIGSTOP")
        return images, sampled

    def close(self) -> None:
        if self._process.pid is None:
            return
        self._signal("SIGCONT")
        with suppress(OSError):  # it may have ended by itself
            self._pipe.send(None)
        self._process.join(timeout=30)
        self._signal("SIGKILL")  # what it may have left behind

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join(timeout=5)
            raise RuntimeError(f"{self.name}: its process ended with {self._process.exitcode}") from None
        if isinstance(answer, BaseException):
            raise RuntimeError(f"{self.name}: {answer}") from answer
        return answer

    def _signal(self, name: str) -> None:
        """To the process and all that it has started: it leads a group of its own."""
        number = getattr(signal, name, None)
        if number is None:  # Windows
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid or 0, number)


def _serve(pipe: Connection, make: Make, arguments: tuple[Any, ...], threads: int | None) -> None:
    """Makes the arm, and does as many updates as it is told to, until it is told `None`."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C reaches the parent alone, which ends this process in `close`
    warnings.simplefilter("ignore")
    if threads is not None:
        torch.set_num_threads(threads)
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            arm, note = make(*arguments)
            pipe.send(note)
            while (steps := pipe.recv()) is not None:
                result = arm.run(steps)
                if torch.cuda.is_initialized():
                    torch.cuda.synchronize()
                pipe.send(result)
            arm.close()
        except EOFError:  # the parent is gone
            pass
        except Exception as error:
            pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))
