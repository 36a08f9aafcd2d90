"""Records as lines of JSON: one document a line, readable while the run goes on. Loads no torch."""

from __future__ import annotations

import json
import logging
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cnnlab.runs import stored
from cnnlab.runs.disk import append_to, writing

_log = logging.getLogger(__name__)
_KINDS: dict[str, stored.Kind] = {
    "step": stored.COUNT,
    "epoch": stored.COUNT,
    "split": stored.TEXT,
    "lr": stored.or_null(stored.NUMBER),
    "layers": stored.TEXTS,
    "tensors": stored.TEXTS,
}
"""What every reader of a record relies on."""


class JsonlSink:
    """Appends records to a file, one line each, handed to the system before `write` returns.

    The file is open only while a line is written (20 µs): there is nothing to close, whatever ends the run. A
    kill can leave at most one torn last line; the next sink on the file cuts it off, so that no record is
    ever glued to it. Non-finite floats become null, since JSON has no name for them.

    Args:
        path: the file; its folder is made.
        digits: significant digits of floats; `None` keeps them exact. Statistics do with 5, at half the size.

    Raises:
        CheckpointError: for anything but a file in its place.
    """

    def __init__(self, path: Path, digits: int | None = None):
        self.path = Path(path)
        self._digits = digits
        self._summed = -1, 0
        """A size of the file, and its checksum."""
        self._left = 0
        """The file's size after the last line."""
        stored.require_file(self.path)
        with writing(self.path):
            append_to(self.path).close()
            self.truncate(self.size())

    def write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(self._plain(record), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        with writing(self.path), append_to(self.path) as file:
            size, (known, checksum) = file.tell(), self._summed
            file.write(line)
        if size < self._left:
            _log.warning("%s was cut or taken away while the run went on; the records that it held are lost", self.path)
        self._left = size + len(line)
        if size == known:
            self._summed = size + len(line), zlib.crc32(line, checksum)

    def size(self) -> int:
        """Length of the file in bytes, for a checkpoint to remember."""
        try:
            return self.path.stat().st_size
        except FileNotFoundError:  # it vanished; the next record makes it again
            return 0

    def checksum(self) -> int:
        """CRC-32 of the file, for a checkpoint to remember; read once, then kept up to date."""
        size = self.size()
        if self._summed[0] != size:
            self._summed = size, stored.checksum(self.path, size) if size else 0
        return self._summed[1]

    def require(self, size: int, checksum: int) -> None:
        """Raises `CheckpointError` if the first `size` bytes, where there are so many, are not those that had this
        checksum."""
        if self.size() >= size and stored.checksum(self.path, size) != checksum:
            raise stored.altered(self.path, "records")

    def truncate(self, size: int) -> None:
        """Cuts the file to `size` bytes, and from there back to the end of the last whole line.

        A file that is shorter than `size` (it was lost, or copied without its end) keeps the whole lines it
        has.
        """
        keep = _end_of_last_line(self.path, min(size, self.size()))
        if keep != self.size():
            os.truncate(self.path, keep)
            self._summed = -1, 0
        self._left = keep

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
    for count, record in enumerate(stored.json_lines(Path(path), _KINDS), start=1):
        if "step" not in record:
            raise stored.damaged(Path(path), f"line {count}: expected a record with a `step`")
        yield record
