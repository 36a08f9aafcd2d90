"""Who writes a folder: the process that holds the lock file in it. Loads no torch.

The operating system drops a lock with its process, however that ends: so a reader sees whether anybody is at work.
Where a file system has no locks, the process that the file names is looked for, on its own machine.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cnnlab.errors import UsageError

_PATIENCE = 0.25
"""Seconds: a reader that looks whether anybody holds the lock holds it itself for some microseconds."""


@contextmanager
def claim(path: Path, refusal: str) -> Iterator[None]:
    """Holds the lock file `path` for the block.

    Raises:
        UsageError: with `refusal`, if another process holds it.
        OSError: nothing can be written there.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        locked = _lock(descriptor, exclusive=True)
        deadline = time.monotonic() + _PATIENCE
        while locked is False and time.monotonic() < deadline:
            time.sleep(0.02)
            locked = _lock(descriptor, exclusive=True)
        holder = _holder(descriptor)
        if locked is False or (locked is None and _lives(holder)):
            known = f" (process {holder['pid']} on {holder['host']})" if holder else ""
            raise UsageError(f"{refusal}{known}; wait until it ends")
        _write(descriptor, json.dumps(_this_process()).encode())
        try:
            yield
        finally:
            with suppress(OSError):  # a full disk, or one that is gone, must not hide what ended the block
                _write(descriptor, b"")
    finally:
        os.close(descriptor)


def held(path: Path) -> bool | None:
    """Whether a process holds the lock file `path`; `None` where that cannot be told."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # another user's
        return None
    try:
        locked = _lock(descriptor, exclusive=False)
        if locked is not None:
            return not locked
        holder = _holder(descriptor)
        if holder and holder["host"] != platform.node():
            return None
        return _lives(holder)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, exclusive: bool) -> bool | None:
    """Whether the lock could be had; `None` where there are no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def _write(descriptor: int, content: bytes) -> None:
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, content)


def _holder(descriptor: int) -> dict[str, Any]:
    """The process that the file names; `{}` where it names none."""
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        found = json.loads(os.read(descriptor, 4096))
        return {"pid": int(found["pid"]), "host": str(found["host"]), "began": str(found["began"])}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}


def _this_process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": platform.node(), "began": _began(os.getpid())}


def _lives(holder: dict[str, Any]) -> bool:
    """Whether the process is there. One of another machine counts as gone: a job that was moved must go on."""
    if not holder or holder["host"] != platform.node() or holder["pid"] <= 0 or os.name == "nt":
        return False  # on Windows, to ask is to end it
    try:
        os.kill(holder["pid"], 0)
    except PermissionError:
        pass
    except (OSError, OverflowError):
        return False
    return _began(holder["pid"]) == holder["began"]


def _began(pid: int) -> str:
    """When a process began, in the system's own count, so that one that got a dead one's number is not taken for it;
    the empty text where the system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
