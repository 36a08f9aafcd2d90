"""Documents that cnnlab wrote, read back: whole, of the kind that it writes, or refused with the file's name.

A damaged file is met at one place, here: one that is no text, cut short, nested or repeated without end (a "bomb"), of
another type, a folder or a pipe in its place. Loads no torch.
"""

from __future__ import annotations

import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cnnlab.errors import CheckpointError, short
from cnnlab.usertext import read_text

MOST_BYTES = 64 << 20
"""Of one document. A thousand classes and a hundred thousand files left out take a tenth of it."""
_UNDECODED = re.compile(r"\\u[dD][89a-fA-F]")

DEEPEST = 100
"""Levels of a YAML document; a config has five."""


def damaged(path: Path, why: object) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {short(' '.join(str(why).split()))}")


def altered(path: Path, what: str) -> CheckpointError:
    """For a file whose checksum a checkpoint knows."""
    return CheckpointError(
        f"{path} is damaged: it is not what the run wrote until its checkpoint; put that back, or take the file away: "
        f"the run then goes on without those {what}"
    )


def text_of(path: Path) -> str:
    """The text of a stored document. Raises `CheckpointError` for what is none, or is larger than any that we write."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise damaged(path, f"it cannot be read ({error.strerror})") from error
    if size > MOST_BYTES:
        raise damaged(path, f"expected at most {MOST_BYTES >> 20} MiB, received {size >> 20} MiB")
    try:
        return read_text(path, CheckpointError)
    except CheckpointError as error:
        raise damaged(path, str(error).removeprefix(str(path)).lstrip(":, ").partition(";")[0]) from error


def parsed_json(text: str | bytes) -> Any:
    """The JSON document. Raises `ValueError` for whatever is none, too deep nesting and `NaN` included."""

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `CheckpointError`."""
    try:
        document = parsed_json(text_of(path))
    except ValueError as error:
        raise damaged(path, error) from error
    if not isinstance(document, dict):
        raise damaged(path, f"expected a JSON object, received {_kind(document)}")
    return document


def yaml_document(path: Path) -> Any:
    """The YAML document in a file, as plain values; interpolations stay text.

    Aliases are refused: cnnlab writes none, and a few of them stand for more than fits any memory, or for themselves.
    Raises `CheckpointError`.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    text = text_of(path)
    try:
        _require_plain(text)
        loaded = OmegaConf.load(io.StringIO(text))
        return OmegaConf.to_container(loaded)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, TypeError, LookupError) as error:
        raise damaged(path, error) from error
    except RecursionError as error:
        raise damaged(path, "it is nested too deeply") from error


def _require_plain(text: str) -> None:
    import yaml

    depth = 0
    # A byte of a file name that is no text was written as "\uDCE9", which libyaml refuses.
    loader = yaml.SafeLoader if _UNDECODED.search(text) else getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("expected values without aliases, received one")
        if isinstance(event, yaml.ScalarEvent) and depth == 0:
            raise ValueError("expected a mapping or a list, received a single value")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > DEEPEST:
            raise ValueError("it is nested too deeply")


# ---- what a value must be ----

Kind = tuple[str, Callable[[Any], bool]]
"""A type in words, and whether a value is of it."""


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


COUNT: Kind = ("a count", lambda value: _is_int(value) and value >= 0)
INTEGER: Kind = ("an integer", _is_int)
TEXT: Kind = ("a text", _is_text)
NUMBER: Kind = ("a number", is_number)
OBJECT: Kind = ("an object", lambda value: isinstance(value, dict))
TEXTS: Kind = ("a list of texts", lambda value: isinstance(value, list) and all(map(_is_text, value)))
TEXT_BY_NAME: Kind = ("texts by name", lambda value: isinstance(value, dict) and all(map(_is_text, value.values())))
COUNTS: Kind = ("counts by name", lambda value: isinstance(value, dict) and all(map(COUNT[1], value.values())))
NUMBERS: Kind = (
    "numbers by name",
    lambda value: isinstance(value, dict) and all(item is None or is_number(item) for item in value.values()),
)


def or_null(kind: Kind) -> Kind:
    words, test = kind
    return f"{words} or null", lambda value: value is None or test(value)


def require(
    document: Mapping[str, Any], kinds: Mapping[str, Kind], path: Path, inside: str = "", where: str = ""
) -> None:
    """Raises `CheckpointError` where a value that is there is not of its kind; others may be there besides."""
    for name, (words, test) in kinds.items():
        if name in document and not test(document[name]):
            raise damaged(path, f"{where}expected `{inside}{name}` to be {words}, received {_kind(document[name])}")


# ---- lines ----


def require_file(path: Path) -> None:
    """Raises `CheckpointError` for a folder, a device or a pipe in a file's place, and for a file in its folder's."""
    if path.exists() and not path.is_file():
        raise damaged(path, "expected a file, found a folder, a device or a pipe")
    require_folder(path.parent)


def require_folder(path: Path) -> None:
    """Raises `CheckpointError` for anything else in a folder's place."""
    if path.exists() and not path.is_dir():
        raise damaged(path, "expected a folder, found a file")


def json_lines(path: Path, kinds: Mapping[str, Kind]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, one a line; none where there is no file. A torn last line is left out.

    Args:
        kinds: as for `require`.

    Raises:
        CheckpointError: for a line that is damaged in any other way.
    """
    require_file(path)
    if not path.exists():
        return
    with path.open("rb") as file:
        count = 0
        while (line := file.readline(MOST_BYTES)).endswith(b"\n"):
            count += 1
            try:
                document = parsed_json(line)
            except ValueError as error:
                raise damaged(path, f"line {count}: {error}") from error
            if not isinstance(document, dict):
                raise damaged(path, f"line {count}: expected a JSON object, received {_kind(document)}")
            require(document, kinds, path, where=f"line {count}: ")
            yield document
        if len(line) == MOST_BYTES:
            raise damaged(path, f"line {count + 1}: expected at most {MOST_BYTES >> 20} MiB")


def checksum(path: Path, size: int) -> int:
    """The CRC-32 of the first `size` bytes of a file, or of all that it has."""
    found = 0
    with path.open("rb") as file:
        while size > 0 and (block := file.read(min(size, 1 << 20))):
            found, size = zlib.crc32(block, found), size - len(block)
    return found


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value)) or f"the number {short(str(value))}"
