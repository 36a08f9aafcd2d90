"""The way to the person in front: whatever is written to stdout and stderr goes through here.

- **It never ends a run.** A terminal that vanished (EIO), a full disk behind `>`, a reader that left, a stream that is
  closed or `None`: from then on the text goes nowhere.
- **It never tells the terminal what to do.** What people wrote (names of classes and files, overrides) may hold
  control characters, or characters that turn the direction of writing: they are shown as escapes.
- **It fits.** What an encoding lacks is shown as an escape, or by an ASCII character where it is drawn by us.

Loads no rich: `cnnlab.sinks.drawing` has tables and the live display.
"""

from __future__ import annotations

import codecs
import io
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

_UNSAFE = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 (but tab and line feed), DEL, C1
    "\xad\u061c\u180e\u200b\u200e\u200f\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"  # invisible, bidi marks
    "\u2028-\u202e"  # line and paragraph separators, bidi embeddings and overrides
    "\ud800-\udfff"  # bytes of a file name that are no text
)
_IN_TEXT = re.compile(f"[{_UNSAFE}]")
_IN_A_LINE = re.compile(f"[\t\n{_UNSAFE}]")
_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_DRAWN = dict(zip("▁▂▃▄▅▆▇█│└─→·×…±‖Δ", "_.:-=+*#|`->.x~~|d", strict=True))
"""What we draw with, and what stands for it where the encoding lacks it; of the same width, so that tables keep."""
_HANDLER = "cnnlab.terminal"


def printable(text: str) -> str:
    """The text with what is unsafe on a terminal as escapes (`\\x1b`, `\\u202e`); tabs and line feeds stay."""
    return text if text.isprintable() else _IN_TEXT.sub(_escape, text)


def one_line(text: object) -> str:
    """The same for what has one line to itself, or a part of one: tabs and line feeds are escapes, too."""
    text = str(text)
    return text if text.isprintable() else _IN_A_LINE.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    character = found[0]
    if character in _NAMED:
        return _NAMED[character]
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # Python's stand-in for a byte that could not be decoded
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def fitting(text: str, encoding: str) -> str:
    """The text in the characters that the encoding has."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.encode(encoding, _HANDLER).decode(encoding)
    except LookupError:
        return fitting(text, "ascii")
    return text


def _replace(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    found = error.object[error.start : error.end]
    return "".join(_DRAWN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in found), error.end


codecs.register_error(_HANDLER, _replace)


class Stream(io.TextIOBase):
    """A stream to write to that keeps the promises above, around the one that Python made.

    Args:
        inner: `None` (as `sys.stdout` is in a service) writes nowhere.
    """

    def __init__(self, inner: IO[str] | None):
        self.inner = inner
        self.lost: Exception | None = None
        """Why nothing is written any more."""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self.inner, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        return "backslashreplace"

    @property
    def buffer(self) -> Any:
        return self.inner.buffer  # type: ignore[union-attr]

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        try:
            return self.inner is not None and self.lost is None and self.inner.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        if self.inner is None:
            raise io.UnsupportedOperation("fileno")
        return self.inner.fileno()

    def write(self, text: str) -> int:
        self.draw(printable(text))
        return len(text)

    def draw(self, text: str) -> None:
        """Writes what was made for the terminal, escape sequences and all."""
        if self.inner is not None and self.lost is None:
            try:
                self.inner.write(fitting(text, self.encoding))
            except (OSError, ValueError) as error:  # ValueError: it was closed
                self._lose(error)

    def flush(self) -> None:
        if self.inner is not None and self.lost is None:
            try:
                self.inner.flush()
            except (OSError, ValueError) as error:
                self._lose(error)

    def _lose(self, error: Exception) -> None:
        """From now on nothing arrives; what Python still holds back must find a place where it can be written."""
        self.lost = error
        with suppress(OSError, ValueError, AttributeError):
            number = self.inner.fileno()  # type: ignore[union-attr]
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)
        # A reader that went away did so on purpose; of the rest the other stream tells, if it can.
        if self is sys.stdout and not isinstance(error, BrokenPipeError):
            say(f"cnnlab: stdout cannot be written ({getattr(error, 'strerror', None) or error})", err=True)


def stream(inner: IO[str] | None) -> Stream:
    """The stream, with the promises above."""
    return inner if isinstance(inner, Stream) else Stream(inner)


def say(*lines: str, err: bool = False) -> None:
    """Writes lines to stdout, or to stderr; an interruption and nothing else can come of it."""
    out = stream(sys.stderr if err else sys.stdout)
    out.write("\n".join(lines) + "\n")
    out.flush()


class _Log(logging.Handler):
    """What the package logs, as lines on stderr (above the live display, which takes stderr over)."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
        except Exception:  # a message that does not fit its arguments
            text = str(record.msg)
        say(one_line(text), err=True)


@contextmanager
def guarded() -> Iterator[None]:
    """In the block, `sys.stdout`, `sys.stderr` and the package's log keep the promises above, whoever writes to them:
    `print`, warnings, tracebacks, Hydra, a part from outside."""
    if isinstance(sys.stdout, Stream):
        yield
        return
    kept = sys.stdout, sys.stderr
    ours = Stream(kept[0]), Stream(kept[1])
    log, handler = logging.getLogger("cnnlab"), _Log(logging.WARNING)
    sys.stdout, sys.stderr = ours
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        for each in ours:
            each.flush()
        sys.stdout, sys.stderr = kept


def fill_closed() -> None:
    """Opens `/dev/null` in the place of a closed stdin, stdout or stderr.

    Else the next file that is opened gets its number, and what a library prints in C goes into a checkpoint.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:  # a lower number is always free first, so this is another system's way
                os.dup2(opened, number)
                os.close(opened)
