"""Decodes image files once, into a file that is memory-mapped from then on."""

from __future__ import annotations

import json
import logging
import os
import pickle
import queue
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cnnlab.data.decode import Decoded, Recipe, decode_chunk
from cnnlab.errors import DataError

_log = logging.getLogger(__name__)

_FORMAT = 1
"""Part of every key: raised when decoding or the files below change their meaning."""
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
        broken = torch.tensor([row for row, _ in self.failures], dtype=torch.int64)
        return {name: rows[~torch.isin(rows, broken)] for name, rows in parts.items()}


def cache_folder(cache: str | None) -> Path:
    """`cache`, else `$CNNLAB_CACHE`, else `~/.cache/cnnlab`."""
    return Path(cache or os.environ.get("CNNLAB_CACHE") or "~/.cache/cnnlab").expanduser()


def decoded(
    root: Path,
    files: Sequence[str],
    recipe: Recipe,
    *,
    on_error: Literal["raise", "skip"],
    cache: str | None,
    workers: int | None,
) -> Store:
    """The files (relative to `root`) as the recipe has them, from the cache where they are in it.

    An entry's key is the hash of the files' names, sizes and modification times and of the recipe. An entry
    is built in a folder of its own and renamed when it is complete, so an interrupted build leaves nothing
    that a later one would take for whole, and of two builders at once the second to finish takes the first
    one's.

    Args:
        on_error: `raise` refuses files that cannot be read, and then caches nothing (a disk's hiccup must not
            be remembered); `skip` lists them in the store's `failures`.
        cache: folder of the cache; see `cache_folder`.
        workers: decoding processes; 0 decodes in this one, `None` starts one a core where it pays.

    Raises:
        DataError: when files are unreadable or vanished, or the cache cannot be written.
    """
    folder = cache_folder(cache)
    key, total_bytes = _key(root, files, recipe)
    entry = folder / key
    shape = (len(files), recipe.channels, recipe.height, recipe.width)
    store = _opened(entry, shape)
    if store is not None:
        if store.failures and on_error == "raise":
            raise _unreadable(files, store.failures)
        return store
    if workers is None:
        workers = _cores() if len(files) > _MANY_FILES or total_bytes > _MANY_BYTES else 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        _require_space(folder, shape)
        _build(entry, root, files, recipe, workers, on_error)
    except OSError as error:
        raise DataError(
            f"expected to write the decoded images to {folder}, received: {error}; "
            f"set CNNLAB_CACHE or type data.cache=FOLDER to put them elsewhere"
        ) from error
    store = _opened(entry, shape)
    if store is None:
        raise DataError(f"expected a readable cache entry {entry} after building it; remove it and try again")
    return store


def _key(root: Path, files: Sequence[str], recipe: Recipe) -> tuple[str, int]:
    """The entry's name, and the bytes of all files."""
    hasher = blake2b(repr((_FORMAT, recipe)).encode(), digest_size=12)
    total = 0
    for name in files:
        try:
            status = os.stat(os.path.join(root, name))  # noqa: PTH116, PTH118 (pathlib: 3x the time)
        except OSError as error:
            raise DataError(f"expected to find {root / name}, received: {error}") from error
        hasher.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
        total += status.st_size
    return hasher.hexdigest(), total


def _opened(entry: Path, shape: tuple[int, ...]) -> Store | None:
    """The entry, or `None` where there is none that is whole."""
    try:
        meta = json.loads((entry / "meta.json").read_text())
        # Read-only and shared: a private writable mapping counts as memory and is refused above its size.
        images = np.load(entry / "images.npy", mmap_mode="r")
        sizes = np.load(entry / "sizes.npy")
        failures = [(int(number), str(reason)) for number, reason in meta["failures"]]
        fingerprint = str(meta["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if images.shape != shape or images.dtype != np.uint8 or sizes.shape != (shape[0], 2):
        return None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return Store(torch.from_numpy(images), torch.from_numpy(sizes), failures, fingerprint)


def _build(
    entry: Path,
    root: Path,
    files: Sequence[str],
    recipe: Recipe,
    workers: int,
    on_error: Literal["raise", "skip"],
) -> None:
    """Writes the entry beside its place, then renames it."""
    temporary = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", suffix=".tmp", dir=entry.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp's are private, and a cache may be shared
        failures = _write(temporary, root, files, recipe, workers)
        if failures and on_error == "raise":
            raise _unreadable(files, failures)
        try:
            temporary.rename(entry)
        except OSError:  # there is one already: another builder's, or a damaged one
            if _opened(entry, (len(files), recipe.channels, recipe.height, recipe.width)) is None:
                shutil.rmtree(entry, ignore_errors=True)
                temporary.rename(entry)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(folder: Path, root: Path, files: Sequence[str], recipe: Recipe, workers: int) -> list[tuple[int, str]]:
    """Writes the entry's files into `folder`; returns the failures."""
    shape = (len(files), recipe.channels, recipe.height, recipe.width)
    per_chunk = max(1, min(_CHUNK_FILES, _CHUNK_BYTES // int(np.prod(shape[1:]))))
    paths = [os.path.join(root, name) for name in files]  # noqa: PTH118 (pathlib: 3x the time)
    chunks = [paths[start : start + per_chunk] for start in range(0, len(paths), per_chunk)]
    sizes: list[np.ndarray] = []
    failures: list[tuple[int, str]] = []
    hasher = blake2b(digest_size=8)
    # Plain writes, not a writable mapping: a full disk is then an error and not a SIGBUS.
    with (folder / "images.npy").open("wb") as out, _progress(len(files)) as advance:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(out, header)
        done = 0
        for chunk in _decoded_chunks(chunks, recipe, workers):
            out.write(chunk.images.data)
            hasher.update(chunk.images.data)
            sizes.append(chunk.sizes)
            failures += [(done + number, reason) for number, reason in chunk.failures]
            done += len(chunk.images)
            advance(len(chunk.images))
        out.flush()
        os.fsync(out.fileno())
    np.save(folder / "sizes.npy", np.concatenate(sizes) if sizes else np.zeros((0, 2), np.int64))
    meta = {
        "root": str(root),
        "files": len(files),
        "recipe": repr(recipe),
        "fingerprint": hasher.hexdigest(),
        "failures": failures,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    return failures


def _unreadable(files: Sequence[str], failures: Sequence[tuple[int, str]]) -> DataError:
    lines = [f"expected readable images, received {len(failures)} of {len(files)} that are not:"]
    lines += [f"  {files[row]}: {reason}" for row, reason in failures[:_SHOWN]]
    if len(failures) > _SHOWN:
        lines.append(f"  and {len(failures) - _SHOWN} more")
    return DataError("\n".join([*lines, "repair or remove them, or type data.on_error=skip to leave them out"]))


def _decoded_chunks(chunks: Sequence[list[str]], recipe: Recipe, workers: int) -> Iterator[Decoded]:
    """The chunks' images, in order, decoded by `workers` processes; a few chunks ahead of the reader."""
    workers = min(workers, len(chunks))
    if workers == 0:
        yield from (decode_chunk(chunk, recipe) for chunk in chunks)
        return
    idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()

    def ask(chunk: list[str]) -> Decoded:
        process = idle.get()
        assert process.stdin is not None and process.stdout is not None
        try:
            pickle.dump((chunk, recipe), process.stdin)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            raise DataError(
                f"a decoding process died (killed, or crashed by a file) between {chunk[0]} and {chunk[-1]}; "
                f"type data.workers=1 to use less memory"
            ) from error
        finally:
            idle.put(process)

    with ExitStack() as stack:
        for _ in range(workers):
            idle.put(stack.enter_context(_decoding_process()))
        threads = ThreadPoolExecutor(workers)
        stack.callback(threads.shutdown, cancel_futures=True)
        pending: deque[Future[Decoded]] = deque()
        for chunk in chunks:
            pending.append(threads.submit(ask, chunk))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@contextmanager
def _decoding_process() -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "cnnlab.data.decode"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
    try:
        yield process
    except BaseException:
        process.kill()
        raise
    finally:
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # closing flushes, which fails where the process is gone
                pipe.close()  # type: ignore[union-attr]
        process.wait()


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, one log line elsewhere."""
    if not sys.stderr.isatty():
        _log.info("decoding %s image files", f"{total:,}")
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("decoding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("decoding", total=total)
        yield lambda count: bar.advance(task, count)


def _require_space(folder: Path, shape: tuple[int, ...]) -> None:
    needed, free = int(np.prod(shape)), shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"expected {needed / 2**30:.1f} GiB free in {folder} for {shape[0]:,} decoded images, "
            f"received {free / 2**30:.1f} GiB; type a smaller data.size or data.limit, or data.cache=FOLDER"
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


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
