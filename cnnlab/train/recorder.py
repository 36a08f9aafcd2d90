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

from cnnlab.errors import DivergedError
from cnnlab.protocols import Listener, StepResult
from cnnlab.rundir import RunDir, write_atomically
from cnnlab.sinks.jsonl import JsonlSink
from cnnlab.train.run import Run, describe_sums


class Recorder(Listener):
    """Adds up the steps' sums, emits training records, stops a run that diverged, and writes the JSONL files.

    What the files hold is part of the State: a resumed run cuts what came after its checkpoint and writes it
    again, so there are neither gaps nor doubles.
    """

    def __init__(self, folder: RunDir | None):
        self._metrics = JsonlSink(folder.metrics) if folder is not None else None
        self._stats = JsonlSink(folder.stats, digits=5) if folder is not None else None

    def on_step(self, run: Run, result: StepResult) -> None:
        run.totals.add(result.sums)
        if run.device.type == "cpu" and not math.isfinite(float(result.sums["data_loss"])):
            self._diverged(run)  # costs nothing here; elsewhere it would wait for the device
        clock = run.clock
        if clock.step % run.trainer.log_every == 0 or clock.batch == run.steps_per_epoch or run.finished():
            figures = describe_sums(run.task, run.totals.take(run.ranks))
            record = {"step": clock.step, "epoch": clock.epoch, "split": "train", "lr": self._last_lr(run)}
            run.tell("on_record", {**record, **figures})
            if not math.isfinite(figures["loss"]):
                self._diverged(run)

    def on_record(self, run: Run, record: dict[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.write(record)

    def on_stats(self, run: Run, record: dict[str, Any]) -> None:
        if self._stats is None:
            return
        named = self._stats.size() == 0
        self._stats.write({k: v for k, v in record.items() if named or k not in ("layers", "tensors")})

    def on_save(self, run: Run) -> None:
        run.observer.drain()
        if run.ranks.world > 1:
            run.totals.gather(run.ranks)

    def on_end(self, run: Run, error: BaseException | None) -> None:
        run.observer.drain()

    def _last_lr(self, run: Run) -> float:
        group = run.optimizer.param_groups[0]
        return float(group["lr"]) / group.get("lr_scale", 1.0)

    def _diverged(self, run: Run) -> None:
        rate = self._last_lr(run)
        raise DivergedError(
            f"the loss became non-finite at step {run.clock.step} (epoch {run.clock.epoch}); expected a finite "
            f"loss. Try a smaller rate (optim.lr={rate / 10:.2g}; it was {rate:.2g} here) or trainer.clip_norm=1"
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
      NaN for a sample that was not seen (so the rows also say which indices were).
    - `inputs` in `run.json`: mean and standard deviation, by channel, of what the network gets in training and in
      evaluation.
    """

    def __init__(self, folder: RunDir | None, samples: int, device: torch.device):
        self._folder = folder
        self._losses = torch.full((samples,), float("nan"), dtype=torch.float32, device=device)

    @property
    def _path(self) -> Path:
        assert self._folder is not None
        return self._folder.evidence / "sample_loss.f16"

    def on_start(self, run: Run) -> None:
        if self._folder is None or run.resumed:
            return
        moments = {}
        for name in ("train", "val"):
            batch, _ = next(run.loaders[name].batches(0))
            moments[name] = channel_moments(batch["image"])
        self._folder.update(inputs=moments)
        write_atomically(self._folder.evidence / "shape.json", json.dumps([-1, len(self._losses)]).encode())

    def on_step(self, run: Run, result: StepResult) -> None:
        self._losses.index_copy_(0, result.index, result.sample_loss)

    def on_save(self, run: Run) -> None:
        """Rank 0 gets what the others saw."""
        if run.ranks.world == 1:
            return
        seen = ~self._losses.isnan()
        total, count = torch.where(seen, self._losses, 0.0), seen.float()
        run.ranks.sum_([total, count])
        self._losses = total / count if run.is_main else torch.full_like(self._losses, float("nan"))

    def on_epoch(self, run: Run, figures: dict[str, float]) -> None:
        self.on_save(run)
        if self._folder is not None:
            with self._path.open("ab") as file:
                file.write(self._losses.clamp(-6e4, 6e4).half().cpu().numpy().tobytes())
        self._losses.fill_(float("nan"))

    def state_dict(self) -> dict[str, Any]:
        size = self._path.stat().st_size if self._folder is not None and self._path.exists() else 0
        return {"losses": self._losses, "size": size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._losses.copy_(state["losses"])
        if self._folder is not None and self._path.exists():
            with self._path.open("r+b") as file:
                file.truncate(state["size"])


def sample_losses(folder: RunDir) -> np.ndarray:
    """The recorded losses of the training samples: (epochs, samples) float16, NaN where not seen."""
    shape = json.loads((folder.evidence / "shape.json").read_text())
    return np.fromfile(folder.evidence / "sample_loss.f16", dtype=np.float16).reshape(shape)


def channel_moments(images: Tensor) -> dict[str, list[float]]:
    """Mean and standard deviation of (N, C, H, W) by channel."""
    std, mean = torch.std_mean(images.float(), dim=(0, 2, 3), correction=0)
    return {"mean": mean.tolist(), "std": std.tolist()}
