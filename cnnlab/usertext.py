"""Text that a user wrote, as files have it: whatever editor saved it, or refused in words."""

from __future__ import annotations

import codecs
from pathlib import Path

from cnnlab.errors import CnnlabError

_MARKS = {  # UTF-32's first: UTF-16's mark is the beginning of it
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_NAMES = {"utf-32": "UTF-32", "utf-8-sig": "UTF-8", "utf-16": "UTF-16", "utf-8": "UTF-8"}


def read_text(path: str | Path, error: type[CnnlabError]) -> str:
    """The text of a file, without its byte-order mark and with `\\n` at each line's end.

    UTF-8 is what is expected; by their byte-order marks UTF-16 and UTF-32 are known, too.

    Raises `error` with the file's name and what was expected: for another encoding, for what is no text, and for a
    file that cannot be read.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # a FIFO would be waited for
            raise error(f"{path}: expected a text file, found a {'folder' if path.is_dir() else 'device or pipe'}")
        content = path.read_bytes()
    except OSError as cause:
        raise error(f"{path}: expected a text file, it cannot be read ({cause.strerror})") from cause
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as cause:
        line = content.count(b"\n", 0, cause.start) + 1
        raise error(
            f"{path}, line {line}: expected text in {_NAMES[encoding]}, received the byte "
            f"0x{content[cause.start]:02x}, which is none there; save the file as UTF-8"
        ) from cause
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise error(f"{path}, line {line}: expected text, received a zero byte; save the file as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")
