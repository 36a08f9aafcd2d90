"""The stateful objects of the loop, each of which a checkpoint holds."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnnlab.errors import CheckpointError
from cnnlab.machine.copies import Arriving
from cnnlab.machine.ranks import Ranks


class Stopwatch:
    """Seconds between starts and stops, over all sessions of a run."""

    def __init__(self) -> None:
        self._earlier = 0.0
        self._began: float | None = None

    @property
    def seconds(self) -> float:
        return self._earlier + (0.0 if self._began is None else time.perf_counter() - self._began)

    @seconds.setter
    def seconds(self, value: float) -> None:
        self._earlier = value

    def start(self) -> None:
        self._earlier, self._began = self.seconds, time.perf_counter()

    def stop(self) -> None:
        self._earlier, self._began = self.seconds, None


_LATER = ("left_out", "returned")
_COUNTS = ("step", "epoch", "batch", "samples", "closed", *_LATER)
"""What a clock keeps; checkpoints of earlier versions have no `_LATER` ones."""


class Clock:
    """Where the run is: `step` updates and `epoch` epochs are done, `batch` updates inside this epoch.

    `closed` says whether what follows the last update of an epoch (or of the run) has been done: the evaluation,
    the selection and a checkpoint.
    """

    def __init__(self) -> None:
        self.step = 0
        self.epoch = 0
        self.batch = 0
        self.samples = 0
        self.closed = True
        self.left_out = 0
        """Updates among them that were not finite."""
        self.returned = 0
        """Times that the run went back to a checkpoint, each at a smaller rate."""
        self.wall = Stopwatch()
        """Runs while the run does."""
        self.training = Stopwatch()
        """Runs inside the epochs: evaluation is left out."""

    def advance(self, samples: int) -> None:
        self.step += 1
        self.batch += 1
        self.samples += samples
        self.closed = False

    def close(self, steps_per_epoch: int) -> None:
        """After an epoch, or inside one that the run's end cuts short: a longer run goes on with the rest of it."""
        self.closed = True
        if self.batch == steps_per_epoch:
            self.epoch += 1
            self.batch = 0

    def reopen(self, steps_per_epoch: int) -> None:
        """Takes `close` back: what follows the last update is still to be done."""
        if self.closed and self.step:
            self.closed = False
            if self.batch == 0:
                self.epoch -= 1
                self.batch = steps_per_epoch

    @property
    def images_per_second(self) -> float | None:
        seconds = self.training.seconds
        return round(self.samples / seconds, 1) if seconds > 0 else None

    def state_dict(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in _COUNTS}
        return {**counts, "wall": self.wall.seconds, "training": self.training.seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in _COUNTS:
            value = state.get(name, 0) if name in _LATER else state[name]
            kind = bool if name == "closed" else int
            if type(value) is not kind or value < 0:
                raise ValueError(
                    f"expected {name} to be {'true or false' if kind is bool else '0 or more'}, received {value!r}"
                )
            setattr(self, name, value)
        self.wall.seconds, self.training.seconds = (_seconds(name, state[name]) for name in ("wall", "training"))


def _seconds(name: str, value: Any) -> float:
    if type(value) not in (float, int) or not 0 <= value < math.inf:
        raise ValueError(f"expected {name} to be seconds, received {value!r}")
    return float(value)


class Totals:
    """Sums since they were last taken, on the device; nobody waits for them before that."""

    def __init__(self, ranks: Ranks, device: torch.device, checkpoint: Path | None = None) -> None:
        """Args: `checkpoint`: the file that sums may come from, for the message."""
        self._ranks = ranks
        self._device = device
        self._checkpoint = checkpoint
        self._restored = False
        self._sums: dict[str, Tensor] = {}
        self._of_all: list[dict[str, Tensor]] = []

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Raises `CheckpointError` where the sums of a checkpoint are not such as these."""
        if self._restored:
            self._require_such(sums)
        for name, value in sums.items():
            if name in self._sums:
                self._sums[name] += value
            else:
                self._sums[name] = value.detach().clone()

    def _require_such(self, sums: Mapping[str, Tensor]) -> None:
        """What a step adds up is known with the first one; an empty part of a batch adds nothing."""
        self._restored = not sums
        kinds = [{name: (tuple(v.shape), v.dtype) for name, v in found.items()} for found in (self._sums, sums)]
        if sums and self._sums and kinds[0] != kinds[1]:
            names = sorted(
                name for name in kinds[0].keys() | kinds[1].keys() if kinds[0].get(name) != kinds[1].get(name)
            )
            where = "the checkpoint" if self._checkpoint is None else str(self._checkpoint)
            raise CheckpointError(
                f"{where}: its totals do not fit this run: the sums of an epoch's first part are not those that a step "
                f"makes here ({', '.join(names[:3])})"
            )

    def take(self) -> dict[str, Tensor]:
        """The sums over all ranks, on the CPU; starts again from nothing. A collective."""
        sums, self._sums = self._sums, {}
        if self._ranks.world > 1:  # a rank whose part of every batch was empty has no sums
            for layout in self._ranks.collect({name: (value.shape, value.dtype) for name, value in sums.items()}):
                for name, (shape, dtype) in layout.items():
                    if name not in sums:
                        sums[name] = torch.zeros(shape, dtype=dtype, device=self._device)
            self._ranks.sum_([sums[name] for name in sorted(sums)])
        return {name: value.cpu() for name, value in sums.items()}

    def take_later(self) -> Arriving:
        """The sums of this process, on their way to the CPU; starts again from nothing. Nobody waits."""
        sums, self._sums = self._sums, {}
        return Arriving(sums)

    def gather(self) -> None:
        """Lets `state_dict` hold the sums of all ranks, one by one: added up earlier, they would round otherwise
        than in a run without a checkpoint here. A collective."""
        self._of_all = self._ranks.collect({name: value.cpu().clone() for name, value in self._sums.items()})

    def state_dict(self) -> dict[str, Any]:
        if self._ranks.world == 1:
            self.gather()
        return {"ranks": self._of_all}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up this rank's sums; all of them on rank 0, if the run goes on with another number of ranks."""
        parts = state["ranks"]
        if not isinstance(parts, list | tuple) or not all(map(_is_sums, parts)):
            raise ValueError("expected sums by name, for each rank")
        if len(parts) == self._ranks.world:
            parts = [parts[self._ranks.rank]]
        elif not self._ranks.is_main:
            parts = []
        self._sums = {}
        self._restored = False
        for part in parts:
            if (
                self._sums
                and part
                and {n: v.shape for n, v in part.items()} != {n: v.shape for n, v in self._sums.items()}
            ):
                raise ValueError("expected the same sums of each rank")
            self.add({name: value.to(self._device) for name, value in part.items()})
        self._restored = True


def _is_sums(part: Any) -> bool:
    return isinstance(part, Mapping) and all(isinstance(n, str) and isinstance(v, Tensor) for n, v in part.items())
