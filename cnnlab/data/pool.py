"""Processes that decode image files while this one does something else."""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import BinaryIO, cast

import cnnlab
from cnnlab.data.decode import READY, Decoded, Item, Recipe, decode_chunk, name_of
from cnnlab.data.threads import fulfil
from cnnlab.errors import DataError
from cnnlab.machine.surroundings import torchrun

PATIENCE = 120.0
"""Seconds that one file may take, unless told."""
_GRACE = 1.0
"""Seconds for a killed process to be gone; one that waits for a disk goes when the disk answers."""
_START = 60.0
"""Seconds, at least, that a process may take to start: a busy machine or a slow disk is no broken file."""
_STARTING = b"\xff" * 8
"""On a board; then the process writes there (`cnnlab.data.decode.serve`)."""


def cores() -> int:
    """Cores that this process may use; under torchrun, its share of the machine's."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, there // torchrun().local_world)


class DecodingPool:
    """Decodes chunks of files in processes of its own; any thread may ask.

    The processes start with the first question. They ignore Ctrl-C, which is this process's to answer, and
    end when the pool is closed or let go of, and when this process ends, even killed: their pipes close then.

    Args:
        workers: how many; 0 starts none, and a chunk is decoded by whoever waits for it.
        patience: seconds that a file may take before its process is given up; `None` waits for ever.
    """

    def __init__(self, workers: int, patience: float | None = PATIENCE) -> None:
        self.workers = workers
        self.patience = patience
        self.said = False
        """Whether its users have been told of dark images."""
        self._lock = threading.Lock()
        self._jobs: _Jobs = queue.SimpleQueue()
        self._decoders: list[_Decoder] = []
        self._stop: weakref.finalize | None = None

    @property
    def pids(self) -> list[int]:
        """Of the processes that have been started."""
        return [decoder.process.pid for decoder in self._decoders]

    def ask(self, items: Sequence[Item], recipe: Recipe) -> Future[Decoded]:
        """The chunk, soon. The future raises `DataError` where the process that decoded it died or does not answer."""
        if self.workers == 0:
            return _Lazy(items, recipe)
        future: Future[Decoded] = Future()
        with self._lock:
            if self._stop is None:
                self._start()
            self._jobs.put((future, items, recipe))
        return future

    def close(self) -> None:
        """Ends the processes. A later question starts them again."""
        with self._lock:
            if self._stop is not None:
                self._stop()
            self._stop, self._decoders, self._jobs = None, [], queue.SimpleQueue()

    def _start(self) -> None:
        self._decoders = [_Decoder(self._jobs) for _ in range(self.workers)]
        over = threading.Event()
        self._stop = weakref.finalize(self, _end, self._decoders, self._jobs, over)
        if self.patience is not None:
            arguments = (self._decoders, self.patience, over)
            threading.Thread(target=_watch, args=arguments, name="cnnlab-patience", daemon=True).start()


_Job = tuple["Future[Decoded]", Sequence[Item], Recipe]
_Jobs = queue.SimpleQueue[_Job | None]


class _Decoder:
    """A process, and the thread that hands it chunks: it waits on the pipe, and the interpreter's lock is free."""

    def __init__(self, jobs: _Jobs) -> None:
        self._board = _board()
        self._write_board(_STARTING)
        self.process = _process(self._board)
        self._job: _Job | None = None
        self._since: tuple[bytes, float] = READY, 0.0
        self.thread = threading.Thread(target=self._work, args=(jobs,), name="cnnlab-decode", daemon=True)
        self.thread.start()

    def _work(self, jobs: _Jobs) -> None:
        while (job := jobs.get()) is not None:
            self._since = READY, time.monotonic()
            self._job = job
            fulfil(job[0], self._answer, job[1], job[2])
            self._job = None
            del job

    def _answer(self, items: Sequence[Item], recipe: Recipe) -> Decoded:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            pickle.dump((items, recipe), self.process.stdin)
            self.process.stdin.flush()
            return pickle.load(self.process.stdout)
        except (EOFError, OSError, ValueError, pickle.UnpicklingError) as error:  # ValueError: its pipe is closed
            raise DataError(
                f"a decoding process died (killed, or crashed by a file) {self._place(items)}; "
                "type data.workers=1 loading.workers=1 to use less memory"
            ) from error

    def look(self, patience: float) -> None:
        """Gives the process up if it has been at one file for longer than `patience` seconds, or does not start."""
        job, (before, began), now = self._job, self._since, time.monotonic()
        if job is None:
            return
        position = self._read_board()
        if position != before:
            self._since = position, now
            return
        limit, what = patience, "an image"
        if position == _STARTING:
            limit, what = max(patience, _START), "the start of a decoding process"
        if now - began > limit:
            with suppress(InvalidStateError):
                job[0].set_exception(
                    DataError(
                        f"expected {what} within {limit:g} seconds, received nothing {self._place(job[1])}: "
                        "a disk does not answer, or the decoding process was stopped; try again, or type "
                        "loading.patience=SECONDS to wait longer"
                    )
                )
            self.process.kill()

    def _place(self, items: Sequence[Item]) -> str:
        """Where in the chunk the process is."""
        position = int.from_bytes(self._read_board(), "little")
        if position < len(items):
            return f"at {name_of(items[position])}"
        return f"between {name_of(items[0])} and {name_of(items[-1])}"

    def _read_board(self) -> bytes:
        with suppress(OSError):
            return os.pread(self._board.fileno(), 8, 0) if self._board is not None else READY
        return READY

    def _write_board(self, position: bytes) -> None:
        with suppress(OSError):
            if self._board is not None:
                os.pwrite(self._board.fileno(), position, 0)

    def close(self) -> None:
        """After the process was killed."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_GRACE)
            self.thread.join(_GRACE)  # it has learnt of the pipe's end
            if not self.thread.is_alive():
                for pipe in (self.process.stdin, self.process.stdout):
                    with suppress(OSError):  # closing flushes, which fails where the process is gone
                        pipe.close()  # type: ignore[union-attr]
                if self._board is not None:
                    self._board.close()


class _Lazy(Future[Decoded]):
    """Decodes when it is waited for."""

    def __init__(self, items: Sequence[Item], recipe: Recipe) -> None:
        super().__init__()
        self._chunk = (items, recipe)

    def result(self, timeout: float | None = None) -> Decoded:
        return decode_chunk(*self._chunk)


_PROGRAM = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
_, board, init, folder, *paths = sys.argv
spec = spec_from_file_location("cnnlab", init, submodule_search_locations=[folder])
sys.modules["cnnlab"] = module_from_spec(spec)
spec.loader.exec_module(sys.modules["cnnlab"])
sys.path += [path for path in paths if path not in sys.path]
from cnnlab.data.decode import serve
serve(int(board))
"""
"""Of a decoding process. This very cnnlab, and for the rest the interpreter's own folders before all others: nothing
that lies in the current folder, or in one of the user's, may take the place of `pickle` or `numpy`."""


def _process(board: BinaryIO | None) -> subprocess.Popen[bytes]:
    init = cnnlab.__file__
    number = -1 if board is None else board.fileno()
    paths = [os.path.abspath(path) for path in sys.path if path]  # noqa: PTH100 (what is not there stays as it is)
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _PROGRAM, str(number), init, os.path.dirname(init), *paths],  # noqa: PTH120
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=() if board is None else (number,),
    )


def _board() -> BinaryIO | None:
    """A file of eight bytes that a process writes the position of its file to; `None` where none can be inherited."""
    if os.name != "posix":
        return None
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("cnnlab"), "r+b", buffering=0)  # type: ignore[return-value]
    return cast(BinaryIO, tempfile.TemporaryFile(buffering=0))


def _watch(decoders: Sequence[_Decoder], patience: float, over: threading.Event) -> None:
    while not over.wait(min(1.0, patience / 4)):
        for decoder in decoders:
            decoder.look(patience)


def _end(decoders: Sequence[_Decoder], jobs: _Jobs, over: threading.Event) -> None:
    """The processes hold nothing that a kill could lose."""
    over.set()
    with suppress(queue.Empty):
        while job := jobs.get_nowait():
            job[0].cancel()
    for decoder in decoders:
        jobs.put(None)
        decoder.process.kill()
    for decoder in decoders:
        decoder.close()
