"""A trained network as files for elsewhere: weights, `torch.export`, ONNX, each run on real samples before it stays."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnnlab.building.deployed import Deployed
from cnnlab.building.opened import Opened, recorded_recipe
from cnnlab.data.decode import decode
from cnnlab.data.pixels import Pixels, Recipe, fitted
from cnnlab.errors import CnnlabError, DataError, UsageError
from cnnlab.runs.folder import config_hash, jsonable, write_atomically

ELSEWHERE = "type another --out"
FORMATS = ("state_dict", "torch", "onnx")
FILES = {"state_dict": "weights.pt", "torch": "model.pt2", "onnx": "model.onnx"}
BATCHES = (1, 2, 7)
TOLERANCE = 1e-4
"""Largest difference of an output, in parts of the largest output, or absolute where that is below 1."""
LEVELS = 1
"""Of 255, by which a pixel resized in the graph may differ from Pillow's, whose weights have 22 bits."""
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_SIDE = 512
"""Pixels of the longer side of a sample, at most: photos are tried in a moderate size."""


class ExportError(CnnlabError):
    """What was exported does not compute what the network computes, or cannot be exported."""


@dataclass
class Checked:
    """A file that was exported, and how far its outputs are from the network's, in parts (see `TOLERANCE`), by the
    batch."""

    format: str
    path: str
    differences: dict[int, float]


def require_packages(formats: Sequence[str]) -> None:
    """Raises `UsageError` where a format needs a package that is not here."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None] if "onnx" in formats else []
    if missing:
        raise UsageError(
            f"--format onnx needs {', '.join(missing)}: pip install 'cnnlab[export]'; or type --format torch, "
            "--format state_dict"
        )


def samples_of(network: Opened, files: Sequence[Path]) -> list[Tensor]:
    """Upright images (C, h, w) uint8, each in its own size, or a smaller one. Raises `DataError` for a bad file."""
    found = []
    for file in files:
        try:
            _, (height, width) = decode(str(file), network.recipe)
            share = min(1.0, _SIDE / max(height, width))
            sides = max(1, round(height * share)), max(1, round(width * share))
            own = Recipe(
                network.spec.channels,
                *sides,
                "stretch",
                0,
                False,
                network.recipe.value_range,
                network.recipe.max_pixels,
            )
            found.append(torch.from_numpy(decode(str(file), own)[0].copy()))
        except Exception as error:  # each of Pillow's parsers raises what it stumbles on
            raise DataError(f"{file}: {error}") from error
    return found


def export(network: Opened, samples: Sequence[Tensor], folder: Path, formats: Sequence[str]) -> dict[str, Any]:
    """Writes the formats and `export.json` to the folder, and returns what the latter says.

    The input of `torch` and `onnx` is `images` (N, C, h, w) uint8, upright, all of one size, any N, h and w.

    Args:
        samples: (C, h, w) uint8 each; the files are tried on them in batches of 1, 2 and 7.

    Raises:
        DiskError: the disk refuses; a file is written whole or not at all.
        ExportError: the network cannot be exported, or what would be written does not compute the same. What is wrong
            is not written.
        UsageError: a file is where the folder should be.
    """
    require_packages(formats)
    module = Deployed(network).eval()
    levels, share = _pixels(module, network.recipe, samples)
    if levels > LEVELS:
        raise ExportError(
            f"the resize in the graph differs from the training's by {levels} of 255 levels; not exported"
        )
    about = _about(network, module.names)
    checked = []
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: expected a folder to write to, found a file")
    batches = {count: _batch(samples, count) for count in BATCHES}
    with torch.no_grad():
        expected = {count: module(batch) for count, batch in batches.items()}
        program = None if tuple(formats) == ("state_dict",) else _program(module, batches[2])
        for kind in formats:
            path = folder / FILES[kind]
            content, run = _PACKERS[kind](network, module, program, about)
            found = {count: _difference(run(batch), expected[count]) for count, batch in batches.items()}
            if not max(found.values()) <= TOLERANCE:
                raise ExportError(
                    f"{path}: expected outputs within {TOLERANCE:g} of the network's, received "
                    f"{max(found.values()):.1e}; it was not written"
                )
            write_atomically(path, content, ELSEWHERE)
            checked.append(Checked(kind, str(path), found))
    about |= {"files": [asdict(file) for file in checked], "pixels": {"largest": levels, "share": share}}
    write_atomically(folder / "export.json", (json.dumps(jsonable(about), indent=2) + "\n").encode(), ELSEWHERE)
    return about


def _about(network: Opened, outputs: Sequence[str]) -> dict[str, Any]:
    """Class names, the input's recipe and the run's identity."""
    record = network.folder.read()
    return {
        "run": network.folder.path.absolute().name,
        "config_hash": record.get("config_hash") or config_hash(network.experiment.config),
        "checkpoint": network.checkpoint,
        "step": network.step,
        "epoch": network.epoch,
        "task": type(network.task).__name__,
        "classes": list(network.classes),
        "outputs": list(outputs),
        "input": {"images": ["N", network.spec.channels, "height", "width"], "type": "uint8"},
        "recipe": recorded_recipe(network.recipe),
        "normalize": network.pipeline.normalize.describe(),
        "metrics": record.get("metrics") or {},
        "data": record.get("data_fingerprint") or network.origin["identity"]["data"],
        "versions": record.get("versions") or record.get("environment"),
    }


def _pixels(module: Deployed, recipe: Recipe, samples: Sequence[Tensor]) -> tuple[int, float]:
    """The largest difference in levels between pixels resized in the graph and by Pillow, and the share that differ."""
    from PIL import Image

    gaps = []
    for sample in samples:
        array = sample.permute(1, 2, 0).numpy()
        image = Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array))
        pillows = np.asarray(fitted(Pixels(image, recipe), recipe))
        pillows = pillows[None] if pillows.ndim == 2 else pillows.transpose(2, 0, 1)
        gaps.append(np.abs(module.resized(sample[None])[0].numpy().astype(np.int64) - pillows))
    return max(int(gap.max()) for gap in gaps), float(np.mean([(gap > 0).mean() for gap in gaps]))


def _batch(samples: Sequence[Tensor], count: int) -> Tensor:
    """(count, C, h, w): samples in turn, each cut to, or repeated over, the size of the first one of the batch."""
    start = 0 if count == 1 else count
    chosen = [samples[(start + number) % len(samples)] for number in range(count)]
    height, width = chosen[0].shape[-2:]
    rows = [torch.arange(height) % sample.shape[-2] for sample in chosen]
    columns = [torch.arange(width) % sample.shape[-1] for sample in chosen]
    return torch.stack([s[:, r][:, :, c] for s, r, c in zip(chosen, rows, columns, strict=True)])


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    gaps = [((a - b).abs().max() / b.abs().max().clamp_min(1)).item() for a, b in zip(found, expected, strict=True)]
    return max(gaps)


_Run = Callable[[Tensor], Sequence[Tensor]]
_Packed = tuple[bytes, _Run]
"""What a file holds, and what it computes, read again from these very bytes."""


def _program(module: Deployed, batch: Tensor) -> Any:
    any_size = torch.export.Dim.DYNAMIC
    try:
        with _quiet():
            return torch.export.export(module, (batch,), dynamic_shapes=({0: any_size, 2: any_size, 3: any_size},))
    except Exception as error:  # whatever torch stumbles on in a network
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(
            f"torch.export cannot follow this network: {reason}; type --format state_dict for its weights alone"
        ) from error


def _pack_state(network: Opened, module: Deployed, program: Any, about: dict[str, Any]) -> _Packed:
    buffer = io.BytesIO()
    torch.save(module.model.state_dict(), buffer)
    fresh = Deployed(network).eval()
    for parameter in fresh.model.parameters():
        parameter.zero_()  # so that nothing but the file can make it right
    fresh.model.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    return buffer.getvalue(), fresh


def _pack_torch(network: Opened, module: Deployed, program: Any, about: dict[str, Any]) -> _Packed:
    # Into memory: where a disk is full, torch's own writer ends the process.
    buffer = io.BytesIO()
    with _quiet():
        torch.export.save(program, buffer, extra_files={"cnnlab.json": json.dumps(jsonable(about))})
        return buffer.getvalue(), torch.export.load(io.BytesIO(buffer.getvalue())).module()


def _pack_onnx(network: Opened, module: Deployed, program: Any, about: dict[str, Any]) -> _Packed:
    try:
        with _quiet():
            exported = torch.onnx.export(
                program, input_names=["images"], output_names=list(module.names), dynamo=True, verbose=False
            )
            assert exported is not None
            for name, value in about.items():
                exported.model.metadata_props[name] = value if isinstance(value, str) else json.dumps(jsonable(value))
            content = exported.model_proto.SerializeToString()
    except Exception as error:
        raise ExportError(f"torch's ONNX exporter cannot take this network: {str(error).strip()[:300]}") from error
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda batch: [torch.from_numpy(one) for one in session.run(None, {"images": batch.numpy()})]


_PACKERS: dict[str, Callable[[Opened, Deployed, Any, dict[str, Any]], _Packed]] = {
    "state_dict": _pack_state,
    "torch": _pack_torch,
    "onnx": _pack_onnx,
}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say of their own inside."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
