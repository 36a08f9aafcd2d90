"""Listeners that keep what happens: metrics, statistics, and evidence for a later diagnosis."""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnnlab.machine.ranks import Ranks
from cnnlab.protocols import Listener, StepResult
from cnnlab.runs import stored
from cnnlab.runs.disk import append_to, writing
from cnnlab.runs.folder import HPARAMS, RunDir, write_atomically
from cnnlab.sinks.jsonl import JsonlSink, read_records
from cnnlab.sinks.records import as_first_version
from cnnlab.train.run import Run
from cnnlab.train.state import Clock

_TELL_AT_LEAST, _TELL_AT_MOST = 1.0, 30.0
"""Seconds from one progress note to the next."""


class Progress(Listener):
    """Keeps `steps` in `run.json` true while the run goes on, for whoever reads it, also after a kill.

    What it says is half of what is done, at least, and at most half a minute old: the intervals grow with the run.
    """

    def __init__(self) -> None:
        self._began = self._told_at = time.monotonic()

    def on_start(self, run: Run) -> None:
        self._began = self._told_at = time.monotonic()

    def on_step(self, run: Run, result: StepResult) -> None:
        now = time.monotonic()
        if now - self._told_at >= min(_TELL_AT_MOST, max(_TELL_AT_LEAST, self._told_at - self._began)):
            self._told_at = now
            with suppress(OSError):  # a full disk: what must be written says so
                run.record_progress()


class Recorder(Listener):
    """Writes the JSONL files.

    What the files hold, TensorBoard's among them, is part of the State: a resumed run cuts what came after its
    checkpoint and writes it again, so there are neither gaps nor doubles; what is missing from before it is told.
    """

    def __init__(self, folder: RunDir | None):
        self._first_version = folder is not None and folder.schema == 1
        self._metrics = JsonlSink(folder.metrics) if folder is not None else None
        self._stats = JsonlSink(folder.stats, digits=5) if folder is not None else None
        self._events = folder.tensorboard if folder is not None else None
        self._missing: list[str] = []

    def on_record(self, run: Run, record: dict[str, Any]) -> None:
        if self._metrics is not None:
            self._write(run, self._metrics, record)

    def on_stats(self, run: Run, record: dict[str, Any]) -> None:
        if self._stats is None:
            return
        named = self._stats.size() == 0
        self._write(run, self._stats, {k: v for k, v in record.items() if named or k not in ("layers", "tensors")})

    def _write(self, run: Run, sink: JsonlSink, record: Mapping[str, Any]) -> None:
        sink.write(as_first_version(record, run.clock.epoch) if self._first_version else record)

    def restored(self) -> list[str]:
        return self._missing

    def state_dict(self) -> dict[str, Any]:
        sinks = {"metrics": self._metrics, "stats": self._stats}
        sizes: dict[str, Any] = {name: sink.size() for name, sink in sinks.items() if sink is not None}
        sizes["checksums"] = {name: sink.checksum() for name, sink in sinks.items() if sink is not None}
        if self._events is not None:
            sizes["events"] = {path.name: path.stat().st_size for path in _event_files(self._events)}
        return sizes

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        _require_sizes(state)
        self._missing = []
        for name, sink in (("metrics", self._metrics), ("stats", self._stats)):
            if sink is None:
                continue
            if name in state.get("checksums", {}):  # older versions keep none
                sink.require(state[name], state["checksums"][name])
            sink.truncate(state[name])
            if sink.size() < state[name]:
                kept = [record["step"] for record in read_records(sink.path)]
                until = f"{len(kept)} records are left, up to step {kept[-1]}" if kept else "no record is left"
                self._missing.append(
                    f"{sink.path} lost {state[name] - sink.size():,} of {state[name]:,} bytes since its checkpoint: "
                    f"{until}; the run goes on without the others"
                )
        if self._events is not None and "events" in state:
            self._missing += _cut_events(self._events, state["events"])


def _require_sizes(state: Mapping[str, Any]) -> None:
    """Raises `ValueError` for what no `Recorder` has given, before anything is cut."""
    sizes = {name: size for name, size in state.items() if name not in ("checksums", "events")}
    for named in (sizes, state.get("checksums", {}), state.get("events", {})):
        if not stored.COUNTS[1](named):
            raise ValueError(f"expected sizes and checksums by name, received {named!r}")


def _event_files(folder: Path) -> list[Path]:
    """Those that grow: the file of the settings is written whole, by each session."""
    return [path for path in sorted(folder.glob("*tfevents*")) if path.is_file() and path.name != HPARAMS]


def _cut_events(folder: Path, sizes: Mapping[str, int]) -> list[str]:
    """Brings TensorBoard's files back to what they were at a checkpoint, so that a reader sees each step once."""
    lost = []
    found = {path.name: path for path in _event_files(folder)}
    for name, path in found.items():
        if name not in sizes:
            path.unlink()  # of a session that went on from here, or from earlier, and was lost
        elif path.stat().st_size > sizes[name]:
            os.truncate(path, sizes[name])
    for name, size in sizes.items():
        if name not in found or found[name].stat().st_size < size:
            lost.append(f"{folder / name} has lost events since the checkpoint: TensorBoard shows gaps")
    return lost


class Evidence(Listener):
    """Keeps what a later diagnosis needs and nobody can reconstruct.

    - `evidence/sample_loss.f16`: each training sample's loss when it was last seen, one row of float16 an epoch,
      NaN for a sample that was not seen (so the rows also say which indices were). The last row of a run that ends
      inside an epoch is the part of it that there was; a longer run writes it again, whole.
    - `inputs` in `run.json`: mean and standard deviation, by channel, of what the network gets in training and in
      evaluation.
    """

    def __init__(self, folder: RunDir | None, samples: int, device: torch.device, ranks: Ranks, clock: Clock):
        """Args: `clock`: the run's; a checkpoint has no more rows than epochs."""
        self._folder = folder
        self._clock = clock
        self._ranks = ranks
        self._losses = torch.full((samples,), float("nan"), dtype=torch.float32, device=device)
        self._rows = 0
        self._checksum = 0
        """CRC-32 of the whole rows."""
        self._partial = False
        """Whether the file has a row of an epoch that the run's end cut."""
        self._missing: list[str] = []

    def restored(self) -> list[str]:
        return self._missing

    @property
    def _path(self) -> Path:
        assert self._folder is not None
        return self._folder.evidence / "sample_loss.f16"

    def on_start(self, run: Run) -> None:
        if self._folder is None or run.resumed:
            return
        moments = {}
        for name in ("train", "val"):
            batch, _ = run.loaders[name].images.alone().first()
            moments[name] = channel_moments(batch["image"])
        self._folder.update(inputs=moments)
        self._describe()

    def _describe(self) -> None:
        """`shape.json`, also after the folder vanished."""
        assert self._folder is not None
        path = self._folder.evidence / "shape.json"
        if not path.exists():
            write_atomically(path, json.dumps([-1, len(self._losses)]).encode())

    def on_step(self, run: Run, result: StepResult) -> None:
        self._losses.index_copy_(0, result.index, result.sample_loss.to(self._losses.dtype))

    def on_save(self, run: Run) -> None:
        """Rank 0 gets what the others saw."""
        if self._ranks.world == 1:
            return
        seen = ~self._losses.isnan()
        total, count = torch.where(seen, self._losses, 0.0), seen.float()
        self._ranks.sum_([total, count])
        self._losses.copy_(total / count if self._ranks.is_main else torch.full_like(total, float("nan")))

    def on_epoch(self, run: Run, figures: dict[str, float]) -> None:
        self.on_save(run)
        if self._folder is not None:
            row = self._write_row()
            self._describe()
            if run.clock.batch == 0:
                self._checksum = zlib.crc32(row, self._checksum)
        self._partial = run.clock.batch != 0
        if not self._partial:
            self._rows += 1
            self._losses.fill_(float("nan"))

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self._losses, "rows": self._rows, "partial": self._partial, "checksum": self._checksum}

    def _write_row(self) -> bytes:
        """Writes the losses at hand as the row after the whole ones; whole rows that are lost become NaN."""
        self._keep_rows()
        row: bytes = self._losses.clamp(-6e4, 6e4).half().cpu().numpy().tobytes()
        with writing(self._path), append_to(self._path) as file:
            file.write(row)
        return row

    def _keep_rows(self) -> int:
        """Cuts the file to its whole rows, fills it up with NaN where some are lost; how many were there."""
        length = 2 * len(self._losses)
        with writing(self._path), append_to(self._path) as file:
            there = min(self._rows, file.tell() // length)
            file.truncate(there * length)
            file.write(np.full((self._rows - there) * len(self._losses), np.nan, dtype=np.float16).tobytes())
        if there < self._rows:
            self._checksum = stored.checksum(self._path, self._rows * length)
        return there

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["losses"].shape != self._losses.shape:
            raise ValueError(f"expected {len(self._losses)} training samples, received {len(state['losses'])}")
        if not 0 <= state["rows"] <= self._clock.epoch:
            raise ValueError(f"expected a row for each of {self._clock.epoch} epochs, received {state['rows']}")
        if self._ranks.is_main:
            self._losses.copy_(state["losses"])
        self._rows, self._partial = state["rows"], state.get("partial", False)
        if self._folder is None:
            return
        self._require(state.get("checksum"))
        there = self._keep_rows()
        shape = json.dumps([-1, len(self._losses)]).encode()
        write_atomically(self._folder.evidence / "shape.json", shape)
        lost = self._rows - there
        self._missing = [f"{self._path} has lost {lost} of {self._rows} epochs: their rows are NaN"] if lost else []
        if self._partial:
            self._write_row()

    def _require(self, checksum: int | None) -> None:
        """Raises `CheckpointError` if the rows are there, and are not those that had this checksum; older versions
        kept none."""
        stored.require_file(self._path)
        size = 2 * len(self._losses) * self._rows
        there = self._path.stat().st_size if self._path.exists() else 0
        known = stored.checksum(self._path, size) if there >= size > 0 else 0
        if checksum is not None and there >= size and known != checksum:
            raise stored.altered(self._path, "losses")
        self._checksum = known


def sample_losses(folder: RunDir) -> np.ndarray:
    """The recorded losses of the training samples: (epochs, samples) float16, NaN where not seen.

    Raises `CheckpointError` where a file is missing or damaged.
    """
    path, losses = folder.evidence / "shape.json", folder.evidence / "sample_loss.f16"
    try:
        shape = stored.parsed_json(stored.text_of(path))
    except ValueError as error:
        raise stored.damaged(path, error) from error
    if not (isinstance(shape, list) and len(shape) == 2 and stored.COUNT[1](shape[1]) and shape[1]):
        raise stored.damaged(path, "expected [-1, samples]")
    stored.require_file(losses)
    if not losses.exists():
        raise stored.damaged(losses, "it is missing")
    samples, flat = shape[1], np.fromfile(losses, dtype=np.float16)
    return flat[: len(flat) // samples * samples].reshape(-1, samples)  # a kill can leave a torn last row


def channel_moments(images: Tensor) -> dict[str, list[float]]:
    """Mean and standard deviation of (N, C, H, W) by channel."""
    std, mean = torch.std_mean(images.float(), dim=(0, 2, 3), correction=0)
    return {"mean": mean.tolist(), "std": std.tolist()}
