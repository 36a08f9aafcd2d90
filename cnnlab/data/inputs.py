"""The image files that a command line names: files, folders, patterns, and lists of them on standard input."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cnnlab.data.found import Walk
from cnnlab.errors import DataError

STANDARD_INPUT = "-"


@dataclass(frozen=True)
class Named:
    """A file that somebody named, or that lies in a folder that somebody named."""

    path: str
    """As it can be opened from here."""
    name: str
    """What files made of it are called after: its place in that folder, or its own name."""


@dataclass(frozen=True)
class Missing:
    """What was named and is not there, or cannot be read."""

    path: str
    reason: str


def named_files(paths: Sequence[str], listed: Callable[[], bytes]) -> Iterator[Named | Missing]:
    """The files in the order in which they were named; what a folder or a pattern holds is sorted by its name.

    A file that is named twice comes twice. In folders, what is hidden or no image by its suffix is passed over; a file
    that is named itself is taken whatever it is called.

    Args:
        paths: of files and folders, patterns where nothing has that name, and `-` for a list.
        listed: the list: paths of files and folders, one a line, or with a zero byte after each.
    """
    for path in paths:
        if path == STANDARD_INPUT:
            for line in _lines(listed()):
                yield from _named(line, pattern=False)
        else:
            yield from _named(path, pattern=True)


def _lines(content: bytes) -> list[str]:
    """As `find -print0` writes them, which takes any name; or as lines, where a name holds no line feed."""
    if b"\0" in content:
        parts = content.split(b"\0")
    else:
        parts = [line.removesuffix(b"\r") for line in content.split(b"\n")]
    return [os.fsdecode(part) for part in parts if part.strip()]


def _named(path: str, *, pattern: bool) -> Iterator[Named | Missing]:
    if os.path.isdir(path):  # noqa: PTH112 (a path stays as it was typed)
        yield from _below(path)
    elif os.path.lexists(path):  # also a link that leads nowhere, of which the reader tells
        yield Named(path, os.path.basename(path))  # noqa: PTH119
    elif pattern and glob.has_magic(path):
        found = sorted(glob.glob(path, recursive=True))  # noqa: PTH207
        if not found:
            yield Missing(path, "no file has a name like this")
        for one in found:
            yield from _named(one, pattern=False)
    else:
        yield Missing(path, "no such file or folder")


def _below(folder: str) -> Iterator[Named | Missing]:
    walk = Walk(Path(folder))
    try:
        names = walk.images(Path(folder), once=False)
    except DataError as error:
        yield Missing(folder, str(error))
        return
    for name, reason in walk.broken:
        yield Missing(os.path.normpath(os.path.join(folder, name)), reason)  # noqa: PTH118
    if not names and not walk.broken:
        yield Missing(folder, "no image in this folder")
    for name in names:
        own = name.removeprefix("./")
        yield Named(os.path.join(folder, own), own)  # noqa: PTH118
