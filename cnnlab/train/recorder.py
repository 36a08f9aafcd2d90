"""Listeners that turn what happens into records: metrics, statistics, and evidence for a later diagnosis."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnnlab import measure
from cnnlab.errors import DivergedError
from cnnlab.protocols import Listener, StepResult
from cnnlab.ranks import Ranks
from cnnlab.rundir import RunDir, write_atomically
from cnnlab.sinks.jsonl import JsonlSink
from cnnlab.sinks.records import as_first_version
from cnnlab.train.run import Run, describe_sums
from cnnlab.train.state import Arriving


class Recorder(Listener):
    """Adds up the steps' sums, emits training records, stops a run that diverged, and writes the JSONL files.

    What the files hold is part of the State: a resumed run cuts what came after its checkpoint and writes it
    again, so there are neither gaps nor doubles.
    """

    def __init__(self, folder: RunDir | None):
        self._first_version = folder is not None and folder.schema == 1
        self._metrics = JsonlSink(folder.metrics) if folder is not None else None
        self._stats = JsonlSink(folder.stats, digits=5) if folder is not None else None
        self._coming: tuple[dict[str, Any], Arriving] | None = None

    def on_step(self, run: Run, result: StepResult) -> None:
        run.totals.add(result.sums)
        if run.device.type == "cpu" and run.ranks.world == 1 and not math.isfinite(float(result.sums["data_loss"])):
            self._diverged(run)  # at once where reading the loss is free; else at the next record, on all ranks
        clock = run.clock
        at_end = clock.batch == run.steps_per_epoch or run.finished()
        if clock.step % run.trainer.log_every == 0 or at_end:
            self._tell(run)
            record = {**run.place(), "split": "train", "lr": run.last_lr}
            if run.ranks.world > 1:
                run.tell("on_record", {**record, **describe_sums(run.task, run.totals.take())})
            else:
                self._coming = record, run.totals.take_later()
        if self._coming is not None and (at_end or self._coming[1].ready()):
            self._tell(run)

    def _tell(self, run: Run) -> None:
        """Hands over the record whose figures were on their way, waiting for them if need be."""
        if self._coming is not None:
            (record, sums), self._coming = self._coming, None
            run.tell("on_record", {**record, **describe_sums(run.task, sums.wait())})

    def on_record(self, run: Run, record: dict[str, Any]) -> None:
        if self._metrics is not None:
            self._write(run, self._metrics, record)
        if not math.isfinite(record["loss"]):
            self._diverged(run, record["split"])

    def on_stats(self, run: Run, record: dict[str, Any]) -> None:
        if self._stats is None:
            return
        named = self._stats.size() == 0
        self._write(run, self._stats, {k: v for k, v in record.items() if named or k not in ("layers", "tensors")})

    def _write(self, run: Run, sink: JsonlSink, record: Mapping[str, Any]) -> None:
        sink.write(as_first_version(record, run.clock.epoch) if self._first_version else record)

    def on_save(self, run: Run) -> None:
        """Nothing is left unwritten, and what diverged since the last record does not overwrite what did not."""
        self._tell(run)
        run.observer.drain()
        run.totals.gather()
        if not bool(measure.total_norm(run.step.parameters).isfinite()):
            self._diverged(run)

    def on_end(self, run: Run, error: BaseException | None) -> None:
        run.observer.drain()

    def _diverged(self, run: Run, split: str = "train") -> None:
        rate = run.last_lr
        where = f"by step {run.clock.step} (epoch {run.clock.epoch}); expected a finite loss"
        if split == "train" or not bool(measure.total_norm(run.step.parameters).isfinite()):
            raise DivergedError(
                f"the loss became non-finite {where}. Try a smaller rate (optim.lr={rate / 10:.2g}; it was {rate:.2g} "
                "here) or trainer.clip_norm=1"
            )
        raise DivergedError(
            f"the loss on {split} is non-finite {where}, and that of the training is not. The last updates may have "
            f"been too large, or a batch norm's running moments too young: try optim.lr={rate / 10:.2g}, or "
            "trainer.precision=fp32 (bf16 overflows later than fp16), a larger norm.momentum, or trainer.eval_every"
        )

    def state_dict(self) -> dict[str, int]:
        sinks = {"metrics": self._metrics, "stats": self._stats}
        return {name: sink.size() for name, sink in sinks.items() if sink is not None}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        for name, sink in (("metrics", self._metrics), ("stats", self._stats)):
            if sink is not None:
                sink.truncate(state[name])


class Evidence(Listener):
    """Keeps what a later diagnosis needs and nobody can reconstruct.

    - `evidence/sample_loss.f16`: each training sample's loss when it was last seen, one row of float16 an epoch,
      NaN for a sample that was not seen (so the rows also say which indices were). The last row of a run that ends
      inside an epoch is the part of it that there was; a longer run writes it again, whole.
    - `inputs` in `run.json`: mean and standard deviation, by channel, of what the network gets in training and in
      evaluation.
    """

    def __init__(self, folder: RunDir | None, samples: int, device: torch.device, ranks: Ranks):
        self._folder = folder
        self._ranks = ranks
        self._losses = torch.full((samples,), float("nan"), dtype=torch.float32, device=device)
        self._rows = 0

    @property
    def _path(self) -> Path:
        assert self._folder is not None
        return self._folder.evidence / "sample_loss.f16"

    def on_start(self, run: Run) -> None:
        if self._folder is None or run.resumed:
            return
        moments = {}
        for name in ("train", "val"):
            batch, _ = next(run.loaders[name].alone().batches(0))
            moments[name] = channel_moments(batch["image"])
        self._folder.update(inputs=moments)
        write_atomically(self._folder.evidence / "shape.json", json.dumps([-1, len(self._losses)]).encode())

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
            row = self._losses.clamp(-6e4, 6e4).half().cpu().numpy().tobytes()
            with self._path.open("ab") as file:
                file.truncate(self._rows * len(row))
                file.write(row)
        if run.clock.batch == 0:
            self._rows += 1
            self._losses.fill_(float("nan"))

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self._losses, "rows": self._rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["losses"].shape != self._losses.shape:
            raise ValueError(f"expected {len(self._losses)} training samples, received {len(state['losses'])}")
        if self._ranks.is_main:
            self._losses.copy_(state["losses"])
        self._rows = state["rows"]
        if self._folder is not None and self._path.exists():
            with self._path.open("ab") as file:
                file.truncate(self._rows * 2 * len(self._losses))


def sample_losses(folder: RunDir) -> np.ndarray:
    """The recorded losses of the training samples: (epochs, samples) float16, NaN where not seen."""
    _, samples = json.loads((folder.evidence / "shape.json").read_text())
    flat = np.fromfile(folder.evidence / "sample_loss.f16", dtype=np.float16)
    return flat[: len(flat) // samples * samples].reshape(-1, samples)  # a kill can leave a torn last row


def channel_moments(images: Tensor) -> dict[str, list[float]]:
    """Mean and standard deviation of (N, C, H, W) by channel."""
    std, mean = torch.std_mean(images.float(), dim=(0, 2, 3), correction=0)
    return {"mean": mean.tolist(), "std": std.tolist()}
