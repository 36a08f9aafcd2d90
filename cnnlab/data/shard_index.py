"""What lies where in tar files of the WebDataset convention, read once from their headers."""

from __future__ import annotations

import json
import logging
import os
import posixpath
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cnnlab.data.decode import Item, Recipe
from cnnlab.data.entries import entry_key
from cnnlab.data.formats import EXTENSIONS
from cnnlab.data.places import cache_folder
from cnnlab.errors import DataError, short

_log = logging.getLogger(__name__)

_FORMAT = 4
"""Part of every key: raised when the index changes its meaning."""
_LONGEST_LABEL = 16 << 20
_MOST_CLASSES = 1_000_000
"""More are no classes, but numbers of something else."""
Array = np.ndarray[Any, Any]


def key_and_extension(member: str) -> tuple[str, str]:
    """WebDataset's convention: the extension begins at the first dot of the base name, the key is all before it.

    Members of one key are one sample: `a/001.jpg` and `a/001.cls`.
    """
    folder, slash, name = member.rpartition("/")
    stem, _, extension = name.partition(".")
    return folder + slash + stem, extension.lower()


@dataclass
class ShardIndex:
    """The samples of several shards, in the order of the shards and of the members in each.

    `shards` the tar files; `shard` (N,) which one a sample is in; `offset` and `size` (N,) of its image there, in
    bytes; `label` (N,); `keys` the samples' names; `broken`: (shard: member, reason) of what would be samples but for
    something that they lack; `unused`: (shard: member) of what belongs to none. `bytes` of all images; `fingerprint` of
    names, places and labels.
    """

    shards: Sequence[Path]
    shard: Array
    offset: Array
    size: Array
    label: Array
    keys: list[str]
    broken: list[tuple[str, str]] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bytes = int(self.size.sum())
        self._base = os.path.commonpath([path.absolute().parent for path in self.shards])
        hasher = blake2b(digest_size=8)
        for path in self.shards:
            hasher.update(f"{path.name}\n".encode(errors="surrogateescape"))
        for column in (self.shard, self.offset, self.size, self.label):
            hasher.update(np.ascontiguousarray(column).data)
        hasher.update("\n".join(self.keys).encode(errors="surrogateescape"))
        self.fingerprint = hasher.hexdigest()
        times = [path.stat().st_mtime_ns for path in self.shards]
        self._key = blake2b(f"{self.fingerprint} {times}".encode(), digest_size=12).hexdigest()

    def __len__(self) -> int:
        return len(self.keys)

    def items(self, rows: Sequence[int]) -> list[Item]:
        shards = [str(path) for path in self.shards]
        return [(shards[self.shard[row]], int(self.offset[row]), int(self.size[row])) for row in rows]

    def name(self, row: int) -> str:
        return f"{self.shards[self.shard[row]]}: {self.keys[row]}, at byte {self.offset[row]:,}"

    def mark(self, row: int) -> tuple[str, int]:
        return f"{os.path.relpath(self.shards[self.shard[row]], self._base)}: {self.keys[row]}", int(self.size[row])

    def key(self, recipe: Recipe) -> str:
        return entry_key(recipe, self._key)


def indexed(shards: Sequence[Path], label: str, cache: str | None) -> ShardIndex:
    """The index of the shards, each one's from the cache where it is there and the shard has not changed.

    Args:
        label: extension of the member that holds the class number, as text; of `json`, its value `label`.
        cache: folder of the cache; see `cnnlab.data.places.cache_folder`.

    Raises:
        DataError: a shard is missing, damaged or compressed, or has a key twice.
    """
    folder = cache_folder(cache) / "shards"
    columns: list[dict[str, Array]] = []
    fresh, writable = 0, True
    for path in shards:
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"expected a shard at {path}, received: {error}; mend data.shards") from error
        described = f"{_FORMAT} {label} {path.resolve()} {status.st_size} {status.st_mtime_ns}"
        stored = folder / f"{blake2b(described.encode(errors='surrogateescape'), digest_size=12).hexdigest()}.npz"
        found = _stored(stored)
        if found is None:
            if fresh == 0:
                _log.info("indexing %d shards", len(shards))
            fresh += 1
            found = _scanned(path, label)
            writable = writable and _store(stored, found)
        columns.append(found)
    counts = [len(found["offset"]) for found in columns]
    return ShardIndex(
        shards=shards,
        shard=np.repeat(np.arange(len(shards)), counts),
        offset=np.concatenate([found["offset"] for found in columns]),
        size=np.concatenate([found["size"] for found in columns]),
        label=np.concatenate([found["label"] for found in columns]),
        keys=[key for found in columns for key in _lines(found["keys"])],
        broken=[
            (f"{path}: {member}", reason)
            for path, found in zip(shards, columns)
            for member, _, reason in (line.partition("\t") for line in _lines(found["broken"]))
        ],
        unused=[f"{path}: {name}" for path, found in zip(shards, columns) for name in _lines(found["unused"])],
    )


def _column(lines: Iterable[str]) -> Array:
    """Texts as bytes, a line each: an archive of arrays holds no lists."""
    text = "\n".join(" ".join(line.split("\n")) for line in lines)
    return np.frombuffer(text.encode(errors="surrogateescape"), np.uint8)


def _lines(column: Array) -> list[str]:
    text = column.tobytes().decode(errors="surrogateescape")
    return text.split("\n") if text else []


def _stored(path: Path) -> dict[str, Array] | None:
    """A shard's index, or `None` where there is none that is whole."""
    try:
        with np.load(path) as archive:
            found = {name: archive[name] for name in ("offset", "size", "label", "keys", "broken", "unused")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return found if len(found["offset"]) == len(found["size"]) == len(found["label"]) else None


def _store(path: Path, columns: dict[str, Array]) -> bool:
    """Beside its place, then renamed: of two that index at once the later one's stays, which is the same."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, **columns)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)  # mkstemp's are private, and a cache may be shared
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)
        return True
    except OSError as error:  # it costs time, no run
        _log.warning(
            "the shards' index cannot be written to %s (%s) and is read anew each time; set CNNLAB_CACHE or type "
            "data.cache=FOLDER to put it elsewhere",
            path.parent,
            error,
        )
        return False


@dataclass
class _Member:
    """A file in a tar: its full name, and where its bytes are; of a link, those of what it leads to."""

    name: str
    offset: int
    size: int


_Members = dict[str, _Member]
"""Those of one key, by extension."""


def _scanned(path: Path, label: str) -> dict[str, Array]:
    """Offsets, sizes and labels of one shard's images, from the tar headers; only labels are read."""
    keys: list[str] = []
    places: list[tuple[int, int, int]] = []
    broken: list[str] = []
    unused: list[str] = []
    try:
        # "r:": not compressed, for only then an offset can be read.
        with tarfile.open(path, "r:") as archive, path.open("rb") as file:
            members = _members(archive, broken)
            for key, own in _samples(members, label, path, unused):
                images = _images(own)
                if len(images) > 1:
                    raise DataError(
                        f"expected one image for each key in {path}, received {', '.join(i.name for i in images)}"
                    )
                if label not in own:
                    has = ", ".join(f".{extension}" for extension in own)
                    broken.append(f"{images[0].name}\tno .{label} beside it; its key has {has}")
                    continue
                try:
                    number = _label(file, own[label], label)
                except ValueError as error:
                    broken.append(f"{images[0].name}\t{error}")
                    continue
                places.append((images[0].offset, images[0].size, number))
                keys.append(key)
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"expected an uncompressed tar file that is whole in {path}, received: {error}; fetch it again"
        ) from error
    if not keys:
        lacks = f"; {broken[0].replace(chr(9), ': ')}" if broken else ""
        raise DataError(
            f"expected images with a .{label} in {path}, received none{lacks}; mend data.shards, or name the member "
            "that holds the class number by data.label"
        )
    _require_once(keys, path)
    table = np.array(places, dtype=np.int64)
    return {
        "offset": table[:, 0],
        "size": table[:, 1],
        "label": table[:, 2],
        "keys": _column(keys),
        "broken": _column(broken),
        "unused": _column(unused),
    }


def _require_once(keys: Sequence[str], path: Path) -> None:
    """Raises `DataError` where a key comes again, behind others: as `tar -r` writes a member anew."""
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise DataError(
            f"expected each key once in {path}, received {len(twice)} that are there again ({twice[0]}); write the "
            "shard anew with the one that counts"
        )


def _members(archive: tarfile.TarFile, broken: list[str]) -> list[_Member]:
    """The visible files in order. A hard or symbolic link is the file that it leads to inside the shard.

    Args:
        broken: gets links that lead to none.
    """
    files: dict[str, tuple[int, int]] = {}
    aims: dict[str, str] = {}
    names = []
    for member in archive:
        name = posixpath.normpath(member.name)
        if member.isreg():
            files[name] = (member.offset_data, member.size)
        elif member.islnk():
            # What it leads to is before it, but may be written anew behind it: its bytes are those of now.
            aim = posixpath.normpath(member.linkname)
            if aim in files:
                files[name] = files[aim]
            aims[name] = aim
        elif member.issym():
            aims[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
        else:
            continue
        if not member.name.rpartition("/")[2].startswith((".", "__")):
            names.append(member.name)
    found = []
    for full in names:
        name, seen = posixpath.normpath(full), set[str]()
        while name not in files and name in aims and name not in seen:
            seen.add(name)
            name = aims[name]
        if name in files:
            found.append(_Member(full, *files[name]))
        else:
            broken.append(f"{full}\ta link to {name}, which is not in the shard")
    return found


def _samples(members: Iterable[_Member], label: str, path: Path, unused: list[str]) -> Iterator[tuple[str, _Members]]:
    """Each key that has an image, with its members; those of one key are neighbours, as the convention has it.

    A key ends at its first dot. Members that have dots beyond it are samples of their own where they are an image and
    its label (`cam1.0000.jpg` with `cam1.0000.cls`), or where the plain key has no image; else they belong to the plain
    key (`7.seg.png` to `7`).

    Args:
        unused: gets the names of the members that belong to no sample.
    """
    for key, group in groupby(members, key=lambda member: key_and_extension(member.name)[0]):
        plain: _Members = {}
        dotted: dict[str, _Members] = {}
        for member in group:
            _, extension = key_and_extension(member.name)
            more, _, last = extension.rpartition(".")
            own = dotted.setdefault(f"{key}.{more}", {}) if more else plain
            if last in own:
                raise DataError(
                    f"expected each member once in {path}, received {member.name} twice; write the shard anew with the "
                    "one that counts"
                )
            own[last] = member
        alone = {longer: own for longer, own in dotted.items() if _images(own) and (label in own or not _images(plain))}
        if _images(plain):
            yield key, plain
        else:
            idle = [plain, *(own for longer, own in dotted.items() if longer not in alone)]
            unused += [member.name for own in idle for member in own.values()]
        yield from alone.items()


def _images(members: Mapping[str, _Member]) -> list[_Member]:
    return [member for extension, member in members.items() if f".{extension}" in EXTENSIONS]


def _label(file: BinaryIO, member: _Member, kind: str) -> int:
    """Raises `ValueError` for what is no class number."""
    file.seek(member.offset)
    text = file.read(min(member.size, _LONGEST_LABEL))
    try:
        value = json.loads(text)["label"] if kind == "json" else int(text)
        if isinstance(value, bool) or value != int(value) or not 0 <= int(value) < _MOST_CLASSES:
            raise ValueError(f"{value!r} is none from 0 to {_MOST_CLASSES - 1:,}")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        what = "a value `label` that is a class number" if kind == "json" else "a class number"
        raise ValueError(f"expected {what} in {member.name}, received {text[:40]!r} ({short(str(error))})") from error
    return int(value)
