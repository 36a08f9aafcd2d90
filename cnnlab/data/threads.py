"""Threads that nobody has to wait for: a read that never returns must not keep a run from ending."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, TypeVar

Result = TypeVar("Result")
_Jobs = queue.SimpleQueue[Callable[[], None] | None]


class Threads:
    """Does what it is given in a few threads, in order, and hands the results out as futures.

    Python's own executor waits at the interpreter's end for whatever runs; these threads are left behind.

    Args:
        count: of the threads.
        name: of each, for who looks at the process.
    """

    def __init__(self, count: int, name: str) -> None:
        jobs: _Jobs = queue.SimpleQueue()
        self._jobs = jobs
        self._threads = [threading.Thread(target=_work, args=(jobs,), name=name, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()
        self._end = weakref.finalize(self, _dismiss, jobs, count)

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """`function(*arguments)`, soon."""
        future: Future[Result] = Future()
        self._jobs.put(lambda: fulfil(future, function, *arguments))
        return future

    def close(self, seconds: float = 0.0) -> None:
        """Takes no more. Waits at most so long for what has begun; who wants the rest dropped cancels its futures."""
        self._end()
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))


def fulfil(future: Future[Result], function: Callable[..., Result], *arguments: Any) -> None:
    """Gives the future what the function returns or raises, unless it was cancelled or has been answered meanwhile."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function(*arguments)
    except BaseException as error:
        with suppress(InvalidStateError):
            future.set_exception(error)
    else:
        with suppress(InvalidStateError):
            future.set_result(result)


def _work(jobs: _Jobs) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # what it holds must not live until the next one


def _dismiss(jobs: _Jobs, count: int) -> None:
    for _ in range(count):
        jobs.put(None)
