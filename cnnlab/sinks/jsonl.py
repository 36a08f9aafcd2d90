"""Records as lines of JSON: one document a line, readable while the run goes on. Loads no torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cnnlab.errors import CheckpointError
from cnnlab.runs.disk import append_to, writing


class JsonlSink:
    """Appends records to a file, one line each, handed to the system before `write` returns.

    The file is open only while a line is written (20 µs): there is nothing to close, whatever ends the run. A
    kill can leave at most one torn last line; the next sink on the file cuts it off, so that no record is
    ever glued to it. Non-finite floats become null, since JSON has no name for them.

    Args:
        path: the file; its folder is made.
        digits: significant digits of floats; `None` keeps them exact. Statistics do with 5, at half the size.
    """

    def __init__(self, path: Path, digits: int | None = None):
        self.path = Path(path)
        self._digits = digits
        with writing(self.path):
            append_to(self.path).close()
            self.truncate(self.size())

    def write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(self._plain(record), separators=(",", ":"), allow_nan=False)
        with writing(self.path), append_to(self.path) as file:
            file.write(line.encode() + b"\n")

    def size(self) -> int:
        """Length of the file in bytes, for a checkpoint to remember."""
        try:
            return self.path.stat().st_size
        except FileNotFoundError:  # it vanished; the next record makes it again
            return 0

    def truncate(self, size: int) -> None:
        """Cuts the file to `size` bytes, and from there back to the end of the last whole line.

        A file that is shorter than `size` (it was lost, or copied without its end) keeps the whole lines it
        has.
        """
        keep = _end_of_last_line(self.path, min(size, self.size()))
        if keep != self.size():
            os.truncate(self.path, keep)

    def _plain(self, value: Any) -> Any:
        if isinstance(value, float):
            if not math.isfinite(value):
                return None
            return value if self._digits is None else float(f"{value:.{self._digits}g}")
        if isinstance(value, Mapping):
            return {str(key): self._plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._plain(item) for item in value]
        return value


def _end_of_last_line(path: Path, size: int) -> int:
    """Position after the last newline in the first `size` bytes."""
    block = 1 << 16
    with path.open("rb") as file:
        while size > 0:
            start = max(0, size - block)
            file.seek(start)
            newline = file.read(size - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            size = start
    return 0


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file, in order; none where there is no file. A torn last line is left out.

    Raises `CheckpointError` for a line that is damaged in any other way.
    """
    if not Path(path).exists():
        return
    with Path(path).open("rb") as file:
        for count, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise CheckpointError(f"{path}, line {count} is no JSON document: {error}") from error
