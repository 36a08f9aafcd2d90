"""Checkpoints: atomic, checksummed, and plain enough for `torch.load(weights_only=True)`.

The SHA-256 of the file travels inside it, as the comment that ends a ZIP archive: so file and checksum are
replaced by one rename, and torch, which ignores the comment, loads the file as it is.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cnnlab.errors import CheckpointError
from cnnlab.runs.folder import write_atomically

_MARK = b"sha256:"
_COMMENT = len(_MARK) + 64
_LONGEST = 800
"""Characters of a reason; torch lists every tensor that does not fit."""


class Stateful(Protocol):
    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Any) -> Any: ...


class State:
    """Every stateful object of a run, by name. A checkpoint is the State, whole."""

    def __init__(self) -> None:
        self._parts: dict[str, Stateful] = {}

    def register(self, name: str, part: Stateful) -> None:
        assert name not in self._parts, f"{name} is registered twice"
        self._parts[name] = part

    def state_dict(self, only: tuple[str, ...] | None = None) -> dict[str, Any]:
        """The state of every part (or of those in `only`), not copied."""
        names = self._parts if only is None else only
        return {name: self._parts[name].state_dict() for name in names}

    def load_state_dict(
        self, state: Mapping[str, Any], only: tuple[str, ...] | None = None, path: Path | None = None
    ) -> None:
        """Loads every part (or those in `only`).

        Args:
            path: of the checkpoint, for the message.

        Raises:
            CheckpointError: for a part that does not fit; where it is told by its shapes and types, before any part
                is loaded, and so before any file is cut.
        """
        names = self.require(state, path, only)
        for name in names:
            with _named(name, path):
                self._parts[name].load_state_dict(state[name])

    def require(
        self, state: Mapping[str, Any], path: Path | None = None, only: tuple[str, ...] | None = None
    ) -> tuple[str, ...]:
        """The names of the parts to load. Raises `CheckpointError` where one is missing, or is no such state."""
        names = tuple(self._parts if only is None else only)
        if missing := [name for name in names if name not in state]:
            raise CheckpointError(f"{_place(path)} has no {', '.join(missing)}: it is of another kind of run")
        for name in names:
            with _named(name, path):
                require_alike(self._parts[name].state_dict(), state[name])
        return names


def _place(path: Path | None) -> str:
    return "the checkpoint" if path is None else str(path)


@contextmanager
def _named(name: str, path: Path | None) -> Iterator[None]:
    """What goes wrong inside is a part of a checkpoint that does not fit."""
    try:
        yield
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:_LONGEST]
        raise CheckpointError(f"{_place(path)}: its {name} does not fit this run: {reason}") from error


def require_alike(own: Any, found: Any, where: str = "") -> None:
    """Raises `ValueError` where `found` cannot be a later state of the part whose state is `own`.

    What torch would cast or broadcast in silence is refused: of tensors, shape and dtype are compared; of all else,
    the type. What `own` has not yet (`None`, a state that grows) says nothing, and neither does a plain value that
    `found` lacks: an earlier version may not have kept it.
    """
    place = f"its {where} " if where else ""
    if found is None and not isinstance(own, Tensor):
        return  # the part itself says whether it may have none
    if isinstance(own, Mapping):
        if not isinstance(found, Mapping):
            raise ValueError(f"{place}is of type {type(found).__name__}, expected values by name")
        lost = [str(name) for name, value in own.items() if name not in found and _of_tensors(value)]
        if lost:
            raise ValueError(f"{place}lacks {', '.join(lost[:3])}")
        for name in own.keys() & found.keys():
            require_alike(own[name], found[name], f"{where}.{name}" if where else str(name))
    elif isinstance(own, list | tuple):
        if not isinstance(found, list | tuple):
            raise ValueError(f"{place}is of type {type(found).__name__}, expected a list")
        if len(own) == len(found):
            for position, pair in enumerate(zip(own, found, strict=True)):
                require_alike(*pair, f"{where}.{position}")
    elif isinstance(own, Tensor) and own.numel():
        if own.ndim == 0 and isinstance(found, int | float):  # a rate, which a captured step keeps in a tensor
            return
        if not isinstance(found, Tensor) or (found.shape, found.dtype) != (own.shape, own.dtype):
            raise ValueError(f"{place}is {_described(found)}, expected {_described(own)}")
    elif isinstance(own, bool | int | float | str):
        scalar = isinstance(found, Tensor) and found.ndim == 0
        kinds: tuple[type, ...] = (float, int) if type(own) is float else (type(own),)
        if type(found) not in kinds and not scalar:
            raise ValueError(f"{place}is of type {type(found).__name__}, expected {type(own).__name__}")


def _of_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and all(map(_of_tensors, value.values()))
    return isinstance(value, Tensor)


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"of type {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"


def save(state: Mapping[str, Any], *paths: Path) -> None:
    """Writes `state` to each path: the whole file, with its checksum, or none.

    Raises `DiskError` when the disk refuses (full, read-only); what was there before stays.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    content = buffer.getbuffer()
    assert content[-2:] == b"\0\0", "torch.save ends its archive with an empty comment"
    comment = _MARK + hashlib.sha256(content).hexdigest().encode()
    content.release()
    buffer.seek(-2, io.SEEK_END)
    buffer.write(len(comment).to_bytes(2, "little") + comment)
    for path in paths:
        write_atomically(path, buffer.getvalue())


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint to the CPU. Raises `CheckpointError` when it is missing, cut short, altered or foreign."""
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} cannot be read: expected a file, found a folder, a device or a pipe")
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    comment = content[-_COMMENT:]
    if not comment.startswith(_MARK):
        raise CheckpointError(f"{path} is cut short, or no checkpoint of cnnlab: it does not end with a checksum")
    digest = hashlib.sha256(memoryview(content)[: -_COMMENT - 2])
    digest.update(b"\0\0")  # the length of the comment, as torch wrote it
    if digest.hexdigest().encode() != comment[len(_MARK) :]:
        raise CheckpointError(f"{path} is damaged: its checksum does not match its content")
    return _unpacked(path, content)


def _unpacked(path: Path, content: bytes) -> dict[str, Any]:
    """The content of a whole file; what torch says of another one (to load it without care) is not passed on."""
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is no checkpoint of cnnlab: it holds more than tensors and plain values; nothing of it was run"
        ) from error
    except Exception as error:
        raise CheckpointError(
            f"{path} is no checkpoint of cnnlab: it cannot be read ({type(error).__name__})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(
            f"{path} is no checkpoint of cnnlab: expected parts by name, received {type(state).__name__}"
        )
    return state
