"""The arms of `cnnlab bench`: the run as it trains, the same with one thing after another left out, and a bare loop."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cnnlab.bench.rounds import Arm, Update, endless
from cnnlab.building.assemble import make_optimizer
from cnnlab.building.builder import build
from cnnlab.composing.experiment import Experiment
from cnnlab.data.served import served
from cnnlab.observe.observer import IDLE
from cnnlab.optim.traits import Traits, accelerated
from cnnlab.protocols import Batch, Split, as_outputs, to_device
from cnnlab.runs.folder import RunDir
from cnnlab.sinks.usual import attach
from cnnlab.train.loop import updates
from cnnlab.train.run import Run
from cnnlab.train.state import Clock

BARE_BYTES = 2 << 30
STREAMED_BATCHES = 20
"""What the bare loop keeps in memory, at most; of images that must be decoded first, fewer."""


class TrainerArm(Arm):
    """The ordinary trainer, epoch after epoch: loader, augmentation, step, observer and listeners; no evaluation.

    A run that has reached its end begins again, with the weights that it has.
    """

    def __init__(self, name: str, run: Run):
        self.trained = run
        super().__init__(name, self._train(run))

    @staticmethod
    def _train(run: Run) -> Iterator[Update]:
        while True:
            if run.finished():
                run.clock.step = run.clock.epoch = run.clock.batch = 0
            seen = run.clock.samples
            for look in updates(run):
                yield Update(run.clock.samples - seen, look is not IDLE)
                seen = run.clock.samples
            run.clock.close(run.steps_per_epoch)

    def run(self, steps: int) -> tuple[int, int]:
        done = super().run(steps)
        self.trained.observer.pause()  # what comes next is another arm's turn, and no slow step of this run
        return done

    def close(self) -> None:
        super().close()
        self.trained.tell("on_end", None)


def ordinary(experiment: Experiment, folder: Path, values: Mapping[str, Any]) -> Run:
    """The run as `cnnlab train` starts it, in `folder`; without checkpoints, which no step waits for.

    Args:
        values: what changes, by dotted key.
    """
    experiment = experiment.with_values({**values, "trainer.checkpoint": False})
    directory = RunDir(folder)
    directory.create(experiment.config, experiment.overrides)
    run = build(experiment, directory)
    attach(run, directory, io.StringIO())
    run.tell("on_start")
    return run


def every_step_sampled(experiment: Experiment) -> dict[str, Any]:
    """What lets all probes be due at every step, with nothing that makes them rarer."""
    stats = {"stats.every": 1, "stats.max_records": 10**9, "stats.max_overhead": None}
    return {**stats, **{f"{node.where}.every": None for node in experiment.nodes("probe").values()}}


class _Repeated:
    """Stands in for a loader: one batch, ready on the device, again and again."""

    def __init__(self, loader: Any):
        self.batch, self.count = next(iter(loader.batches(0)))
        self.steps = loader.steps
        self.split = loader.split

    def batches(self, epoch: int, start: int = 0, stopping: object = None) -> Iterator[tuple[Batch, int]]:
        for _ in range(start, self.steps):
            yield self.batch, self.count


def without_data(run: Run) -> Run:
    """The run with its first batch repeated, on the same network."""
    loaders: dict[str, Any] = {**run.loaders, "train": _Repeated(run.loaders["train"])}
    return replace(run, loaders=loaders, clock=Clock())


# ---- the loop that one would write by hand ----


def bare_loop(experiment: Experiment, run: Run, dtype: torch.dtype) -> Iterator[Update]:
    """The barest loop over the same network, optimizer, loss, precision, memory format and augmentation.

    The images are in memory (on a GPU: in its memory), in batches as the run has them; there is one call of each
    phase, and nothing is measured, reported or waited for. Clipping, micro-batches, averages of weights, penalties
    and a loss scaler are left out. The weights begin as a copy of the run's present ones.

    Args:
        run: without statistics, hence without taps in its network.
        dtype: that the network computes in.
    """
    device, loader = run.device, run.loaders["train"].images
    images = _in_memory(loader.split, loader.batch_size, device)
    model = copy.deepcopy(run.model).train()
    node = experiment.node("optim")
    optimizer = make_optimizer(experiment, model, **accelerated(node.target, node.settings, device, captured=False))
    augment: Callable[[Batch, int], Batch] = loader.transform or (lambda batch, epoch: batch)

    def epoch(number: int) -> Iterator[Update]:
        order = torch.randperm(len(images["index"]), device=device)
        for index in order.split(loader.batch_size)[: loader.steps]:
            batch = augment({name: tensor[index] for name, tensor in images.items()}, number)
            with nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype):
                outputs = as_outputs(model(batch["image"]))
            loss = run.task.loss({name: t.float() for name, t in outputs.items()}, batch)["loss"].mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            yield Update(len(index))

    return endless(epoch)


def _in_memory(split: Split, batch_size: int, device: torch.device) -> Batch:
    """The split's first images with their targets, on the device: `BARE_BYTES` at most, of a stream some batches."""
    first = split.fetch(torch.arange(1))
    each = sum(tensor.numel() * tensor.element_size() for tensor in first.values())
    count = min(len(split), max(1, BARE_BYTES // each))
    if served(split).streams:
        count = min(count, STREAMED_BATCHES * batch_size)
    return to_device(split.fetch(torch.arange(count)), device)


def bare_loop_refusal(experiment: Experiment) -> str | None:
    """Why there is no bare loop for this experiment, or `None`."""
    traits = Traits.of(experiment.node("optim").target)
    if traits.closure or traits.create_graph:
        return "this optimizer evaluates the loss by itself"
    return None
