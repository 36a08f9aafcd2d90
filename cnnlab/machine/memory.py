"""Out of memory, in words: what was asked for, and what there was. Loads no torch."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_ASKED = re.compile(r"tried to allocate (\d+) bytes")
_SIGNS = (
    "DefaultCPUAllocator",
    "std::bad_alloc",
    "Cannot allocate memory",
    "not enough memory",
    "failed to map segment",
)
"""What torch's RuntimeError says when a CPU's memory is at its end; a GPU's has a class of its own."""

_ONEDNN = {"could not create a primitive", "could not create a memory object", "could not execute a primitive"}
"""All that oneDNN says then. What it has no kernel for, it calls a primitive *descriptor* that could not be created."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error, of whichever library, says that memory is at its end: a GPU's, a CPU's, or Python's own."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, RuntimeError) and str(error).strip() in _ONEDNN:
        return True
    return isinstance(error, RuntimeError | OSError | ImportError) and any(sign in str(error) for sign in _SIGNS)


TRAINING = (
    "type a smaller trainer.batch_size, or trainer.accumulate=2 for the same batch in two pieces "
    "(trainer.auto_accumulate=true finds as many as it takes); trainer.eval_batch_size=64, if it was in an evaluation"
)
READING = "one image at a time was tried, too; raise the limit (ulimit -v), end other programs, or take another device"
"""What to do where a run is read: its network is given fewer images at once by itself."""


def out_of_memory(error: BaseException, remedy: str = TRAINING) -> str:
    """One message for an error that `is_out_of_memory`: what was being allocated, what was there, what to type."""
    if type(error).__name__ == "OutOfMemoryError":
        return f"the device has not enough memory; {remedy}\n({error})"
    asked, left = _ASKED.search(str(error)), available()
    words = [f"{int(asked[1]) / 2**20:,.1f} MiB were asked for"] if asked else []
    words += [] if left is None else [f"about {left / 2**20:,.0f} MiB are left"]
    figures = f" ({', '.join(words)})" if words else ""
    return f"this process has not enough memory{figures}; {remedy}"


SPARE = 128 << 20
"""Bytes that are kept for what is not foreseen."""


@contextmanager
def spared(size: int) -> Iterator[None]:
    """For the block, so many bytes of the process's limit (`ulimit -v`) are taken, but no memory is: what is done
    inside works with so much less. Where they cannot be had, none are."""
    block = None
    with suppress(OSError, ValueError):
        block = mmap.mmap(-1, size)
    try:
        yield
    finally:
        if block is not None:
            block.close()


def available() -> int | None:
    """Bytes that this process can still get, by the system's free memory and by its own limit (`ulimit -v`); `None`
    where neither is known."""
    found = []
    with suppress(OSError, ValueError):
        table = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(table["MemAvailable"].split()[0]) * 1024)
    with suppress(ImportError, OSError, ValueError):
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            found.append(max(0, limit - pages * resource.getpagesize()))
    return min(found, default=None)
