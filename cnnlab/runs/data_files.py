"""The files of each split, as a run had them: kept in its folder, to say what has become of them.

Whether data is the same is told by its fingerprint; this only explains how it is not. So a record that is missing or
damaged explains nothing, and refuses nothing.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cnnlab.runs.folder import write_atomically

NAME = "files.json.gz"
MOST_FILES = 200_000
"""That are recorded: some 2 MB, and a second. Of more, the counts and fingerprints in `run.json` tell."""
_MOST_BYTES = 64 << 20
_GZIP = 31
_SHOWN = 3

Files = Mapping[str, Mapping[str, int]]
"""By split: each file's name in its data set, and its length in bytes."""


def write(folder: Path, files: Files) -> bool:
    """Keeps them, where there are any and not too many; returns whether it did. Raises `DiskError`."""
    if not 0 < sum(map(len, files.values())) <= MOST_FILES:
        return False
    packer = zlib.compressobj(6, zlib.DEFLATED, _GZIP)
    text = json.dumps({split: list(own.items()) for split, own in files.items()}, separators=(",", ":")) + "\n"
    write_atomically(folder / NAME, packer.compress(text.encode()) + packer.flush())
    return True


def read(folder: Path) -> Files | None:
    """What `write` kept; `None` where there is nothing, or nothing that can be read."""
    path = folder / NAME
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return None
        unpacker = zlib.decompressobj(_GZIP)
        text = unpacker.decompress(path.read_bytes(), _MOST_BYTES)
        if not unpacker.eof:
            return None
        return {str(split): {str(name): int(size) for name, size in own} for split, own in json.loads(text).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, zlib.error):
        return None


def compared(before: Files, now: Files) -> str:
    """In words, how the files differ; the empty text where neither their names nor lengths nor splits do."""
    was, has = _split_of(before), _split_of(now)
    told = []
    for words, names in (("gone", was.keys() - has.keys()), ("new", has.keys() - was.keys())):
        if names:
            told.append(f"{len(names):,} {words} ({_first(sorted(names))})")
    common = was.keys() & has.keys()
    moves: dict[tuple[str, str], list[str]] = {}
    for name in sorted(common):
        for split in sorted(has[name] - was[name]):
            for left in sorted(was[name] - has[name]) or sorted(was[name]):
                moves.setdefault((left, split), []).append(name)
    # First what was trained on, and is now measured.
    largest = sorted(moves.items(), key=lambda move: (move[0][0] != "train", -len(move[1])))
    told += [f"{len(names):,} of {one} now in {other} ({names[0]})" for (one, other), names in largest[:2]]
    if largest[2:]:
        told.append(f"{sum(len(names) for _, names in largest[2:]):,} more in another split")
    lengths = [{name: size for own in files.values() for name, size in own.items()} for files in (before, now)]
    other = sorted(name for name in common if lengths[0][name] != lengths[1][name])
    if other:
        told.append(f"{len(other):,} of another length ({_first(other)})")
    return f"files: {', '.join(told)}" if told else ""


def _split_of(files: Files) -> dict[str, set[str]]:
    """The splits of each file; some have several."""
    found: dict[str, set[str]] = {}
    for split, own in files.items():
        for name in own:
            found.setdefault(name, set()).add(split)
    return found


def _first(names: list[Any]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown}, ..."
