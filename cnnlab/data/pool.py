"""Processes that decode image files while this one does something else."""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from cnnlab.data.decode import Decoded, Item, Recipe, decode_chunk, name_of
from cnnlab.errors import DataError


def cores() -> int:
    """Cores that this process may use; under torchrun, its share of the machine's."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, there // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class DecodingPool:
    """Decodes chunks of files in processes of its own; any thread may ask.

    The processes start with the first question. They ignore Ctrl-C, which is this process's to answer, and
    end when the pool is closed or let go of, and when this process ends, even killed: their pipes close then.

    Args:
        workers: how many; 0 starts none, and a chunk is decoded by whoever waits for it.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._lock = threading.Lock()
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None
        self._stop: weakref.finalize | None = None

    def ask(self, items: Sequence[Item], recipe: Recipe) -> Future[Decoded]:
        """The chunk, soon. The future raises `DataError` where the process that decoded it died."""
        if self.workers == 0:
            return _Lazy(items, recipe)
        with self._lock:
            if self._threads is None:
                self._start()
            assert self._threads is not None
            return self._threads.submit(self._answer, items, recipe)

    def close(self) -> None:
        """Ends the processes. A later question starts them again."""
        with self._lock:
            if self._stop is not None:
                self._stop()
            self._threads = self._stop = None
            self._idle = queue.SimpleQueue()

    def _start(self) -> None:
        processes = [_process() for _ in range(self.workers)]
        for process in processes:
            self._idle.put(process)
        # A thread a process: it waits on the pipe, and the interpreter's lock is free meanwhile.
        self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="cnnlab-decode")
        self._stop = weakref.finalize(self, _end, processes, self._threads)

    def _answer(self, items: Sequence[Item], recipe: Recipe) -> Decoded:
        idle = self._idle
        process = idle.get()
        assert process.stdin is not None and process.stdout is not None
        try:
            pickle.dump((items, recipe), process.stdin)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except (EOFError, OSError, ValueError, pickle.UnpicklingError) as error:  # ValueError: its pipe is closed
            raise DataError(
                f"a decoding process died (killed, or crashed by a file) between {name_of(items[0])} and "
                f"{name_of(items[-1])}; type data.workers=1 loading.workers=1 to use less memory"
            ) from error
        finally:
            idle.put(process)


class _Lazy(Future[Decoded]):
    """Decodes when it is waited for."""

    def __init__(self, items: Sequence[Item], recipe: Recipe) -> None:
        super().__init__()
        self._chunk = (items, recipe)

    def result(self, timeout: float | None = None) -> Decoded:
        return decode_chunk(*self._chunk)


def _process() -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(
        [sys.executable, "-m", "cnnlab.data.decode"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )


def _end(processes: Sequence[subprocess.Popen[bytes]], threads: ThreadPoolExecutor) -> None:
    """They hold nothing that a kill could lose."""
    threads.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
    threads.shutdown()  # whoever waited on a pipe has learnt of its end
    for process in processes:
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # closing flushes, which fails where the process is gone
                pipe.close()  # type: ignore[union-attr]
