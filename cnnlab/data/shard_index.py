"""What lies where in tar files of the WebDataset convention, read once from their headers."""

from __future__ import annotations

import json
import logging
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from cnnlab.data.decode import Item, Recipe
from cnnlab.data.entries import entry_key
from cnnlab.data.formats import EXTENSIONS
from cnnlab.data.places import cache_folder
from cnnlab.errors import DataError

_log = logging.getLogger(__name__)

_FORMAT = 2
"""Part of every key: raised when the index changes its meaning."""
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
    bytes; `label` (N,); `keys` the samples' names. `bytes` of all images; `fingerprint` of names, places and labels.
    """

    shards: Sequence[Path]
    shard: Array
    offset: Array
    size: Array
    label: Array
    keys: list[str]

    def __post_init__(self) -> None:
        self.bytes = int(self.size.sum())
        hasher = blake2b(digest_size=8)
        for path in self.shards:
            hasher.update(f"{path.name}\n".encode())
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

    def key(self, recipe: Recipe) -> str:
        return entry_key(recipe, self._key)


def indexed(shards: Sequence[Path], label: str, cache: str | None) -> ShardIndex:
    """The index of the shards, each one's from the cache where it is there and the shard has not changed.

    Args:
        label: extension of the member that holds the class number, as text; of `json`, its value `label`.
        cache: folder of the cache; see `cnnlab.data.places.cache_folder`.

    Raises:
        DataError: a shard is missing, damaged or compressed, or has samples without a label.
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
    names = [found["keys"].tobytes().decode(errors="surrogateescape") for found in columns]
    return ShardIndex(
        shards=shards,
        shard=np.repeat(np.arange(len(shards)), counts),
        offset=np.concatenate([found["offset"] for found in columns]),
        size=np.concatenate([found["size"] for found in columns]),
        label=np.concatenate([found["label"] for found in columns]),
        keys=[key for text in names if text for key in text.split("\n")],
    )


def _stored(path: Path) -> dict[str, Array] | None:
    """A shard's index, or `None` where there is none that is whole."""
    try:
        with np.load(path) as archive:
            found = {name: archive[name] for name in ("offset", "size", "label", "keys")}
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


def _scanned(path: Path, label: str) -> dict[str, Array]:
    """Offsets, sizes and labels of one shard's images, from the tar headers; only labels are read."""
    keys: list[str] = []
    places: list[tuple[int, int, int]] = []
    unused: list[str] = []
    try:
        with tarfile.open(path, "r:") as archive:  # "r:": not compressed, for only then an offset can be read
            for key, members in _told_apart(_samples(archive), label, unused):
                images = _images(members)
                if len(images) > 1 or label not in members:
                    has = ", ".join(f".{extension}" for extension in members)
                    raise DataError(
                        f"expected one image and its .{label} for each key in {path}, received {has} for {key}; "
                        "name the member that holds the class number by data.label"
                    )
                places.append((images[0].offset_data, images[0].size, _label(archive, members[label], label, path)))
                keys.append(key)
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"expected an uncompressed tar file that is whole in {path}, received: {error}; fetch it again"
        ) from error
    if not keys:
        raise DataError(f"expected images in {path}, received none; mend data.shards")
    if unused:
        _log.warning(
            "%s: %d file%s without an image and a .%s of the same key, the first is %s; not used",
            path.name,
            len(unused),
            "s" * (len(unused) > 1),
            label,
            unused[0],
        )
    table = np.array(places, dtype=np.int64)
    names = np.frombuffer("\n".join(keys).encode(errors="surrogateescape"), np.uint8)
    return {"offset": table[:, 0], "size": table[:, 1], "label": table[:, 2], "keys": names}


def _samples(archive: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Each key with its members by extension; those of one key are neighbours, as the convention has it."""
    current: str | None = None
    members: dict[str, tarfile.TarInfo] = {}
    for member in archive:
        if not member.isfile() or member.name.rpartition("/")[2].startswith((".", "__")):
            continue
        key, extension = key_and_extension(member.name)
        if key != current:
            if current is not None:
                yield current, members
            current, members = key, {}
        members[extension] = member
    if current is not None:
        yield current, members


def _images(members: Mapping[str, tarfile.TarInfo]) -> list[tarfile.TarInfo]:
    return [member for extension, member in members.items() if f".{extension}" in EXTENSIONS]


def _told_apart(
    samples: Iterable[tuple[str, dict[str, tarfile.TarInfo]]], label: str, unused: list[str]
) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """The samples with images. A key ends at its first dot (`7.seg.png` belongs to `7`); where that leaves no image,
    keys have dots themselves (`cam1.0000.jpg` with `cam1.0000.cls`) and end at the last one.

    Args:
        unused: gets the names of the members that belong to no sample.
    """
    for key, members in samples:
        if _images(members):
            yield key, members
            continue
        dotted: dict[str, dict[str, tarfile.TarInfo]] = {}
        for extension, member in members.items():
            more, _, last = extension.rpartition(".")
            dotted.setdefault(f"{key}.{more}" if more else key, {})[last] = member
        for longer, found in dotted.items():
            if _images(found) and label in found:
                yield longer, found
            else:
                unused += [member.name for member in found.values()]


def _label(archive: tarfile.TarFile, member: tarfile.TarInfo, kind: str, path: Path) -> int:
    file = archive.extractfile(member)
    assert file is not None
    text = file.read()
    try:
        value = json.loads(text)["label"] if kind == "json" else int(text)
        if isinstance(value, bool) or value != int(value) or int(value) < 0:
            raise ValueError(f"{value!r} is no class number")
    except (ValueError, KeyError, TypeError) as error:
        what = "a value `label` that is a class number" if kind == "json" else "a class number"
        raise DataError(
            f"expected {what} in {member.name} of {path}, received {text[:40]!r} ({error}); mend it, or name another "
            "member by data.label"
        ) from error
    return int(value)
