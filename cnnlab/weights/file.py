"""Weights in a file: a `state_dict`, a checkpoint that holds one, or safetensors. Nothing in it is run."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnnlab.errors import CheckpointError
from cnnlab.weights.base import Trained, Weights

HOLDERS = ("model_ema", "state_dict_ema", "model", "state_dict", "model_state_dict", "net", "network")
"""Keys under which checkpoints keep the network's `state_dict`, the averages' first."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By their names in a safetensors file."""
LONGEST_HEADER = 100_000_000
"""Bytes, the format's own bound."""


class FileWeights(Weights):
    """The weights in a file, recognized by its content.

    Args:
        file: a `state_dict` or a checkpoint that holds one (under `model`, `state_dict` and the like), written by
            `torch.save`; or safetensors. Of a checkpoint of the laboratory the classes are known, too.
    """

    def __init__(self, file: str):
        self.file = Path(file).expanduser()

    def read(self) -> Trained:
        """See `Weights.read`."""
        try:
            content = self.file.read_bytes()
        except OSError as error:
            what = "a folder; for the folder of a run, type weights=run weights.run=FOLDER"
            reason = what if self.file.is_dir() else error.strerror or type(error).__name__
            raise CheckpointError(f"`weights.file={self.file}` cannot be read: {reason}") from error
        found = safetensors(content, self.file) if _is_safetensors(content) else _torch_file(self.file)
        state = _state(found)
        if not state:
            raise CheckpointError(
                f"`weights.file={self.file}`: expected tensors by name, or a checkpoint with them under "
                f"{', '.join(HOLDERS)}, received {_described(found)}"
            )
        record = {"file": str(self.file), "sha256": hashlib.sha256(content).hexdigest()}
        return Trained(str(self.file), state, _classes(found), record)


def _torch_file(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"`weights.file={path}` holds more than tensors and plain values (a whole network, or no weights at all); "
            "nothing of it was run. Save the network's state_dict() alone, by torch.save, where it came from"
        ) from error
    except Exception as error:  # torch raises anything for what is no archive of its own
        raise CheckpointError(
            f"`weights.file={path}` is neither a file of torch.save nor safetensors, or it is damaged "
            f"({type(error).__name__})"
        ) from error


def _state(found: Any) -> dict[str, Tensor]:
    """The tensors by name in what a file holds; nothing where there are none."""
    if not isinstance(found, Mapping):
        return {}
    for holder in HOLDERS:
        if isinstance(found.get(holder), Mapping) and (inner := _state(found[holder])):
            return inner
    return {str(name): value for name, value in found.items() if isinstance(value, Tensor)}


def _classes(found: Any) -> tuple[str, ...] | None:
    """Those that a checkpoint of the laboratory names; of masks, the masks'."""
    try:
        data = found["origin"]["data"]
        names = data["mask_classes"] if "mask" in data["targets"] else data["classes"]
        return tuple(map(str, names))
    except (KeyError, TypeError, IndexError):
        return None


def _described(found: Any) -> str:
    if isinstance(found, Mapping):
        return f"values named {', '.join(map(str, list(found)[:5]))}" if found else "nothing"
    return f"a {type(found).__name__}"


# ---- safetensors ----


def _is_safetensors(content: bytes) -> bool:
    return len(content) > 8 and content[8:9] == b"{" and int.from_bytes(content[:8], "little") <= LONGEST_HEADER


def safetensors(content: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file: 8 bytes of the header's length, the header (JSON), the values, little-endian
    (https://huggingface.co/docs/safetensors). Raises `CheckpointError` for what is damaged."""
    end = 8 + int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8:end])
        values = memoryview(content)[end:]
        return {name: _tensor(entry, values) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(f"`weights.file={path}` is no whole safetensors file: {error}") from error


def _tensor(entry: Mapping[str, Any], values: memoryview) -> Tensor:
    dtype, shape, (begin, end) = DTYPES[entry["dtype"]], [int(n) for n in entry["shape"]], entry["data_offsets"]
    count = 1
    for side in shape:
        count *= side
    if not 0 <= begin <= end <= len(values) or end - begin != count * dtype.itemsize or any(n < 0 for n in shape):
        raise ValueError(f"a tensor of shape {tuple(shape)} at bytes {begin} to {end} of {len(values)}")
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(values[begin:end]), dtype=dtype).reshape(shape)
