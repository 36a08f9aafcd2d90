"""What a disk does to a run: full, read-only, gone, or without the folder that was there a moment ago."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from cnnlab.errors import DiskError

_log = logging.getLogger(__name__)

_OF_RUNS = "type paths.outputs=FOLDER to write elsewhere"
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def writing(path: Path, elsewhere: str | None = None) -> Iterator[None]:
    """An `OSError` of the block becomes a `DiskError` that names `path` and says what to do.

    Args:
        elsewhere: what to type to write in another place; `None` for a file of a run.
    """
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        raise DiskError(f"{path} could not be written: {_in_words(path, error, elsewhere)}", error) from error


def _in_words(path: Path, error: OSError, elsewhere: str | None) -> str:
    reason = error.strerror or str(error)
    again = " and go on with resume=RUN" if elsewhere is None else ""
    elsewhere = elsewhere or _OF_RUNS
    if error.errno in _FULL:
        return f"{reason} ({free(path)}); free space{again}, or {elsewhere}"
    if error.errno in _FORBIDDEN:
        return f"{reason}; make the folder writable, or {elsewhere}"
    if error.errno == errno.EFBIG:
        return f"{reason}; raise the limit (ulimit -f unlimited), or {elsewhere}"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{reason}; raise the limit (ulimit -n 4096)"
    return f"{reason}; look at the disk, or {elsewhere}"


def free(path: Path) -> str:
    """How much room there is where `path` lies."""
    for folder in (path, *path.parents):
        try:
            return f"{shutil.disk_usage(folder).free:,} bytes are free"
        except OSError:
            continue
    return "no room is left"


def ensure(folder: Path) -> None:
    """Makes the folder where there is none; one that was there before, and vanished, with a warning."""
    with suppress(OSError):  # the current folder was removed
        folder = folder.absolute()
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        if folder in _made:
            _log.warning("%s vanished and was made again; what it held is lost", folder)
    _made.add(folder)


_made: set[Path] = set()
"""By this process, or found by it."""


def append_to(path: Path) -> BinaryIO:
    """Opens a file to append to, in a folder that is there, if need be again."""
    ensure(path.parent)
    return path.open("ab")


def overwrite(path: Path, content: bytes) -> None:
    """Writes a small file anew in the blocks that it has: what a full disk still allows.

    Not atomic, so it is the second choice.

    Raises `OSError` if `content` is longer than those blocks, or the disk refuses that, too; the file is then as it
    was.
    """
    number = os.open(path, os.O_RDWR)
    try:
        status = os.fstat(number)
        if len(content) > max(getattr(status, "st_blocks", 0) * 512, status.st_size):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        before = os.pread(number, status.st_size, 0)
        try:
            if os.pwrite(number, content, 0) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.ftruncate(number, len(content))
            os.fsync(number)
        except OSError:
            os.pwrite(number, before, 0)
            os.ftruncate(number, len(before))
            raise
    finally:
        os.close(number)
