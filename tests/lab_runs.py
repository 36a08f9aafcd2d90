"""Small runs for tests: composed as the command line does, built and fitted in this process."""

from __future__ import annotations

import copy
import functools
import os
import signal
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnnlab.building.builder import build
from cnnlab.building.trial import check, compose
from cnnlab.composing.composer import Composed
from cnnlab.composing.experiment import Experiment
from cnnlab.errors import InterruptedRun
from cnnlab.machine.ranks import Ranks
from cnnlab.protocols import Listener, StepResult
from cnnlab.runs.folder import RunDir
from cnnlab.train import fit
from cnnlab.train.run import Run

SMALL = (
    "data.limit=100",
    "trainer.device=cpu",
    "trainer.threads=1",
    "trainer.precision=fp32",
    "trainer.batch_size=32",
    "trainer.epochs=2",
    "stats.every=2",
)
"""Four updates an epoch, the last one of 4 samples."""


@functools.cache
def _composed(overrides: tuple[str, ...]) -> Experiment:
    return compose(overrides)


def composed(*overrides: str) -> Experiment:
    """`SMALL` with the overrides; unless they name a model, a ResNet-8 of 5,000 parameters."""
    narrow = () if any(text.startswith("model=") for text in overrides) else ("model.width=4",)
    found = _composed((*SMALL, *narrow, *overrides))
    return replace(found, config=copy.deepcopy(found.config))


def make_run(*overrides: str, folder: Path | None = None, ranks: Ranks | None = None) -> Run:
    """A fresh run, in `folder` if there is one."""
    config = composed(*overrides)
    directory = None if folder is None else RunDir(folder)
    if directory is not None and (ranks is None or ranks.is_main):
        directory.create(config.config, config.overrides)
    if ranks is not None:
        ranks.wait()
    return build(config, directory, ranks=ranks)


def resume_run(folder: Path, *, ranks: Ranks | None = None, **trainer: Any) -> Run:
    """The run in `folder` from its last checkpoint on, with changed `trainer` settings."""
    config = RunDir(folder).config()
    config["trainer"] |= trainer
    return build(check(Composed(config, folder, {}, ())), RunDir(folder), ranks=ranks, resumed=True)


def fitted(*overrides: str, folder: Path | None = None) -> Run:
    run = make_run(*overrides, folder=folder)
    fit(run)
    return run


@contextmanager
def no_waiting() -> Iterator[None]:
    """What waits for the GPU inside, in any thread, is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Interrupt(Listener):
    """Sends this process a signal after update `step`, as a user or a scheduler would."""

    def __init__(self, step: int, number: int = signal.SIGTERM):
        self.step = step
        self.number = number

    def on_step(self, run: Any, result: StepResult) -> None:
        if run.clock.step == self.step:
            os.kill(os.getpid(), self.number)


class Recorded(Listener):
    """Keeps what a run says, and each step's losses, gradients and random state."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.stats: list[dict[str, Any]] = []
        self.losses: list[Tensor] = []
        self.indices: list[Tensor] = []
        self.gradients: list[list[Tensor | None]] = []
        self.random: list[Tensor] = []

    def on_record(self, run: Any, record: dict[str, Any]) -> None:
        self.records.append(dict(record))

    def on_stats(self, run: Any, record: dict[str, Any]) -> None:
        self.stats.append(dict(record))

    def on_step(self, run: Any, result: StepResult) -> None:
        self.losses.append(result.sample_loss.clone())
        self.indices.append(result.index.clone())
        self.gradients.append([None if p.grad is None else p.grad.clone() for p in run.step.parameters])
        self.random.append(torch.get_rng_state())


def watched(*overrides: str, folder: Path | None = None) -> tuple[Run, Recorded]:
    """A fitted run and what it said on the way."""
    run, recorded = make_run(*overrides, folder=folder), Recorded()
    run.listeners.insert(0, recorded)
    fit(run)
    return run, recorded


def tensors_of(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested state, by path."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_of(item, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for key, item in enumerate(value):
            yield from tensors_of(item, f"{path}/{key}")
    else:
        yield path, value


def differences(first: Any, second: Any) -> list[str]:
    """The paths at which two nested states are not equal bit for bit (NaN equals itself)."""
    one, other = dict(tensors_of(first)), dict(tensors_of(second))
    different = sorted(set(one) ^ set(other))
    for path in one.keys() & other.keys():
        a, b = one[path], other[path]
        if isinstance(a, Tensor):
            same = isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(bits(a), bits(b))
        else:
            same = a == b
        if not same:
            different.append(path)
    return different


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes, so that NaN equals NaN and -0 differs from 0."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def all_state(run: Run) -> dict[str, Any]:
    """Everything that a checkpoint of the run would hold, but the time that it took."""
    state = copy.deepcopy(run.state.state_dict())
    for name in ("wall", "training"):
        del state["clock"][name]
    del state["observer"]["overhead"]["charged"]
    return state


def files_of(folder: Path) -> dict[str, bytes]:
    """The records of a run folder that a resumed run must leave as an unbroken one does."""
    names = ("metrics.jsonl", "stats.jsonl", "evidence/sample_loss.f16")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def interrupted_at(step: int, *overrides: str, folder: Path) -> Run:
    """A run in `folder` that was asked to stop after update `step`, and saved."""
    run = make_run(*overrides, folder=folder)
    run.listeners.insert(0, Interrupt(step))
    try:
        fit(run)
    except InterruptedRun:
        return run
    raise AssertionError("the run was not interrupted")
