"""Decodes image files once, into a file that is memory-mapped from then on."""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cnnlab.data.decode import Decoded, Item, Recipe, decode_chunk
from cnnlab.data.entries import (
    Content,
    Entry,
    header,
    install,
    opened_entry,
    sealed,
    temporary,
    unsealed,
    write_synced,
)
from cnnlab.data.pixels import SIXTEEN_BITS, Depth
from cnnlab.data.places import cache_folder
from cnnlab.data.pool import PATIENCE, DecodingPool, cores
from cnnlab.data.sources import Listing, Sources
from cnnlab.errors import DataError
from cnnlab.runs.folder import write_atomically

_log = logging.getLogger(__name__)

_CHUNK_BYTES = 4 << 20
_CHUNK_FILES = 256
_MANY_FILES, _MANY_BYTES = 1000, 16 << 20
"""From here on starting decoding processes (0.15 s of a core each) pays."""
_STALE_SECONDS = 86_400
_SHOWN = 5


@dataclass
class Store:
    """Decoded files, in the order asked for.

    `images` (N, C, H, W) uint8, mapped read-only; `sizes` (N, 2) int64, the files' own (height, width);
    `failures`: position and reason of the files that could not be read (their images are black);
    `fingerprint` of the pixels.
    """

    images: Tensor
    sizes: Tensor
    failures: list[tuple[int, str]]
    fingerprint: str

    def readable(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The rows of each split without the failures."""
        return without(self.failures, parts)


def without(failures: Sequence[tuple[int, str]], parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows of each split without the failed ones."""
    broken = torch.tensor([row for row, _ in failures], dtype=torch.int64)
    return {name: rows[~torch.isin(rows, broken)] for name, rows in parts.items()}


def is_cached(listing: Listing, recipe: Recipe, cache: str | None) -> bool:
    """Whether `decoded` would find the files decoded."""
    entry = cache_folder(cache) / listing.key(recipe)
    return isinstance(opened_entry(entry, _shape(len(listing), recipe), check=False), Entry)


def unreadable(
    sources: Sources, recipe: Recipe, *, cache: str | None, workers: int | None, patience: float | None = PATIENCE
) -> list[tuple[int, str]]:
    """Position and reason of the files that cannot be decoded, as `decoded` would list them.

    Reads each file whole once, and remembers in the cache which were broken, not the pixels.

    Where the cache cannot be written, they are tried again by the next run.
    """
    folder = cache_folder(cache)
    known = folder / f"{sources.key(recipe)}.unreadable.json"
    try:
        failures = [(int(row), str(reason)) for row, reason in unsealed(known)]
    except (OSError, ValueError, TypeError):
        failures = _tried(sources, recipe, workers, patience)
        with suppress(OSError):
            write_atomically(known, sealed(failures))
    _tell_left_out(sources, failures)
    return failures


def _tried(sources: Sources, recipe: Recipe, workers: int | None, patience: float | None) -> list[tuple[int, str]]:
    count = len(sources)
    chunks = [sources.items(range(start, min(start + 32, count))) for start in range(0, count, 32)]
    failures: list[tuple[int, str]] = []
    done = 0
    with _progress(count) as advance:
        for chunk in _decoded_chunks(chunks, recipe, _useful(workers, count, sources.bytes), patience):
            failures += [(done + number, reason) for number, reason in chunk.failures]
            done += len(chunk.images)
            advance(len(chunk.images))
    return failures


def decoded(
    listing: Listing,
    recipe: Recipe,
    *,
    on_error: Literal["raise", "skip"],
    cache: str | None,
    workers: int | None,
    patience: float | None = PATIENCE,
) -> Store:
    """The files as the recipe has them, from the cache where they are in it.

    An entry's key is the hash of the files' names, sizes and modification times and of the recipe. An entry
    is built in a folder of its own and renamed when it is complete (see `cnnlab.data.entries`), so an interrupted
    build leaves nothing that a later one would take for whole; builders at once do not meet. A damaged one is built
    again.

    Args:
        on_error: `raise` refuses files that cannot be read, and then caches nothing (a disk's hiccup must not
            be remembered); `skip` lists them in the store's `failures`.
        cache: folder of the cache; see `cache_folder`.
        workers: decoding processes; 0 decodes in this one, `None` starts one a core where it pays.
        patience: seconds that a process may take for a file.

    Raises:
        DataError: when files are unreadable or vanished.
        UnwritableCache: when the cache cannot be written.
    """
    folder = cache_folder(cache)
    entry = folder / listing.key(recipe)
    shape = _shape(len(listing), recipe)
    found = opened_entry(entry, shape)
    if isinstance(found, str):
        _log.warning("the cache's entry %s is damaged (%s) and is built again", entry, found)
    if not isinstance(found, Entry):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_stale(folder)
            _require_space(folder, shape)
            useful = _useful(workers, len(listing), listing.bytes)
            found = _built(entry, listing, recipe, on_error, useful, patience)
        except OSError as error:
            raise UnwritableCache(_unwritable(folder, error)) from error
    content = found.content
    if content.failures and on_error == "raise":
        raise _broken(listing, content.failures)
    tell_depth(Depth(*content.deep), recipe)
    _tell_left_out(listing, content.failures)
    return Store(found.images, found.sizes, content.failures, content.fingerprint)


class UnwritableCache(DataError):
    """Decoded images cannot be written where they are to be."""


def _shape(count: int, recipe: Recipe) -> tuple[int, int, int, int]:
    return (count, recipe.channels, recipe.height, recipe.width)


def _useful(workers: int | None, files: int, total_bytes: int) -> int:
    """The decoding processes asked for; by default one a core where starting them pays."""
    if workers is not None:
        return workers
    return cores() if files > _MANY_FILES or total_bytes > _MANY_BYTES else 0


def _unwritable(folder: Path, error: OSError) -> str:
    return (
        f"expected to write the decoded images to {folder}, received: {error}; "
        f"set CNNLAB_CACHE or type data.cache=FOLDER to put them elsewhere"
    )


def _built(
    entry: Path,
    listing: Listing,
    recipe: Recipe,
    on_error: Literal["raise", "skip"],
    workers: int,
    patience: float | None,
) -> Entry:
    """Writes the entry beside its place, and moves it there. What it maps stays, whatever other builders do."""
    shape = _shape(len(listing), recipe)
    folder = temporary(entry)
    try:
        failures = _write(folder, listing, recipe, workers, patience)
        if failures and on_error == "raise":
            raise _broken(listing, failures)
        built = opened_entry(folder, shape, check=False)
        if not isinstance(built, Entry):
            raise OSError(f"what was written reads back otherwise ({built})")
        install(folder, entry, lambda: isinstance(opened_entry(entry, shape), Entry))
        return built
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(
    folder: Path, listing: Listing, recipe: Recipe, workers: int, patience: float | None
) -> list[tuple[int, str]]:
    """Writes the entry's files into `folder`; returns the failures."""
    shape = _shape(len(listing), recipe)
    per_chunk = max(1, min(_CHUNK_FILES, _CHUNK_BYTES // int(np.prod(shape[1:]))))
    paths = listing.items(range(len(listing)))
    chunks = [paths[start : start + per_chunk] for start in range(0, len(paths), per_chunk)]
    sizes: list[np.ndarray] = []
    failures: list[tuple[int, str]] = []
    blocks: list[tuple[int, int]] = []
    depth = Depth()
    hasher = blake2b(digest_size=8)
    # Plain writes, not a writable mapping: a full disk is then an error and not a SIGBUS.
    with (folder / "images.npy").open("wb") as out, _progress(len(listing)) as advance:
        out.write(header(shape, "|u1"))
        done = 0
        for chunk in _decoded_chunks(chunks, recipe, workers, patience):
            out.write(chunk.images.data)
            hasher.update(chunk.images.data)
            blocks.append((len(chunk.images), zlib.crc32(chunk.images.data)))
            sizes.append(chunk.sizes)
            failures += [(done + number, reason) for number, reason in chunk.failures]
            depth.add(chunk.depth)
            done += len(chunk.images)
            advance(len(chunk.images))
        out.flush()
        os.fsync(out.fileno())
    numbers = (np.concatenate(sizes) if sizes else np.zeros((0, 2))).astype("<i8").tobytes()
    write_synced(folder / "sizes.npy", header((shape[0], 2), "<i8") + numbers)
    origin = {"root": str(listing.root), "files": len(listing), "recipe": repr(recipe)}
    deep = (depth.images, depth.highest if math.isfinite(depth.highest) else 0.0)
    content = Content(hasher.hexdigest(), failures, deep, zlib.crc32(numbers), blocks, origin)
    write_synced(folder / "meta.json", content.sealed())
    return failures


def tell_depth(depth: Depth, recipe: Recipe) -> None:
    """A word where images of more than 8 bits are nearly black: 12 bits in a file of 16, for instance."""
    if depth.images and recipe.value_range is None and not recipe.mask and depth.highest <= SIXTEEN_BITS // 2:
        _log.warning(
            "%s images have 16 bits or more and values up to %g, of which %s is white: they are dark; "
            "type data.value_range=[0,%g]",
            f"{depth.images:,}",
            depth.highest,
            f"{SIXTEEN_BITS:,}",
            2 ** math.ceil(math.log2(max(depth.highest, 1) + 1)) - 1,
        )


def _tell_left_out(sources: Sources, failures: Sequence[tuple[int, str]]) -> None:
    if not failures:
        return
    named = "; ".join(_named(sources, failures))
    _log.warning("%d of %d files are unreadable and left out: %s", len(failures), len(sources), named)


def _named(sources: Sources, failures: Sequence[tuple[int, str]]) -> list[str]:
    """The first failures, and how many there are besides."""
    more = [f"and {len(failures) - _SHOWN} more"] if len(failures) > _SHOWN else []
    return [f"{sources.name(row)}: {reason}" for row, reason in failures[:_SHOWN]] + more


def _broken(sources: Sources, failures: Sequence[tuple[int, str]]) -> DataError:
    lines = [f"expected readable images, received {len(failures)} of {len(sources)} that are not:"]
    lines += [f"  {named}" for named in _named(sources, failures)]
    return DataError("\n".join([*lines, "repair or remove them, or type data.on_error=skip to leave them out"]))


def _decoded_chunks(
    chunks: Sequence[Sequence[Item]], recipe: Recipe, workers: int, patience: float | None
) -> Iterator[Decoded]:
    """The chunks' images, in order, decoded by `workers` processes; a few chunks ahead of the reader."""
    workers = min(workers, len(chunks))
    if workers == 0:
        yield from (decode_chunk(chunk, recipe) for chunk in chunks)
        return
    with closing(DecodingPool(workers, patience)) as pool:
        pending: deque[Future[Decoded]] = deque()
        for chunk in chunks:
            pending.append(pool.ask(chunk, recipe))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, one log line elsewhere."""
    if not sys.stderr.isatty():
        _log.info("decoding %s image files", f"{total:,}")
        yield lambda count: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from cnnlab.sinks.drawing import Drawing

    columns = (TextColumn("decoding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Drawing(sys.stderr), transient=True) as bar:
        task = bar.add_task("decoding", total=total)
        yield lambda count: bar.advance(task, count)


def _require_space(folder: Path, shape: tuple[int, ...]) -> None:
    needed, free = int(np.prod(shape)), shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"expected {needed:,} bytes free in {folder} for {shape[0]:,} decoded images, "
            f"received {free:,}; type a smaller data.size or data.limit, or data.cache=FOLDER"
        )


def _remove_stale(folder: Path) -> None:
    """Removes what builders that were killed left behind."""
    for leftover in folder.glob("*.tmp"):
        try:
            old = time.time() - leftover.stat().st_mtime > _STALE_SECONDS
        except OSError:
            continue
        if old:
            shutil.rmtree(leftover, ignore_errors=True)
