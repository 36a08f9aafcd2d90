"""A run folder as the trained network that is in it: its own input pipeline, task and classes, and nothing of what
trained it. Its training data, cache and optimizer need not be there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cnnlab.augment import Pipeline
from cnnlab.building.assemble import (
    make_interventions,
    make_network,
    make_penalties,
    make_pipeline,
    make_task,
    placed,
    spec_for_task,
)
from cnnlab.building.reopen import reopened
from cnnlab.composing.experiment import Experiment
from cnnlab.composing.trust import TYPED, Trust
from cnnlab.data.decode import Item, decode_chunk
from cnnlab.data.pixels import Recipe
from cnnlab.errors import CheckpointError, DataError
from cnnlab.machine.device import Placement, place
from cnnlab.machine.ranks import Ranks
from cnnlab.machine.resolved import Resolved
from cnnlab.protocols import Batch, DataSpec, Outputs
from cnnlab.runs.checkpoint import State
from cnnlab.runs.folder import RunDir
from cnnlab.schema import Layout, StepKind
from cnnlab.tasks import Task
from cnnlab.train.forward import Forward, Penalties
from cnnlab.train.origin import chosen, load_own, recorded_data
from cnnlab.train.state import Totals
from cnnlab.train.steps.halving import HalvingForward

Each = Callable[[Batch, Outputs, Tensor], None]


@dataclass
class Opened:
    """A trained network, as it is evaluated: in evaluation mode, with its averages where it has such.

        network = cnnlab.open("outputs/digits-resnet/2026-...")
        images = network.read(["cat.jpg", "dog.png"])          # (2, C, H, W) uint8
        network.predictions(images)                            # {"label": (2,), "probability": (2,)}

    It computes as the run did (precision and memory layout), where it finds the kind of device that the run had.
    """

    folder: RunDir
    experiment: Experiment
    checkpoint: str
    """The one that is open: `best` or `last`."""
    origin: Mapping[str, Any]
    """Of the checkpoint (`cnnlab.train.origin`): whose it is, what was chosen for the run, what its data was."""
    step: int
    """Updates done."""
    epoch: int
    """Epochs done; of the best weights, the epoch that val chose."""
    spec: DataSpec
    """Of the data that the network was made for, as the task sees it."""
    task: Task
    model: nn.Module
    pipeline: Pipeline
    """Normalization as it was fitted to the training set."""
    recipe: Recipe
    """How an image file becomes an input."""
    forward: Forward
    placement: Placement
    penalties: Penalties
    notices: list[str] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.placement.device

    @property
    def classes(self) -> tuple[str, ...]:
        """The names that the task tells apart."""
        return self.task.class_names(self.spec)

    # ---- images ----

    def read(self, files: Sequence[Item | Path]) -> Tensor:
        """(N, C, H, W) uint8 on the CPU, of image files of any size, in their order.

        Raises `DataError` for the first that cannot be read.
        """
        images, failures = self.read_all(files)
        if failures:
            number, reason = next(iter(failures.items()))
            raise DataError(f"{files[number]}: {reason}")
        return images

    def read_all(self, files: Sequence[Item | Path]) -> tuple[Tensor, dict[int, str]]:
        """`read`, and why each file that cannot be read is black, by its position."""
        found = decode_chunk([str(file) if isinstance(file, Path) else file for file in files], self.recipe)
        return torch.from_numpy(found.images), dict(found.failures)

    def prepared(self, images: Tensor) -> Tensor:
        """(N, C, H, W) float32 on the network's device, normalized as in the run's evaluation.

        Args:
            images: (N, C, H, W) uint8, or float in [0, 1], of the network's size; see `read`.

        Raises `ValueError` for images of another shape.
        """
        expected = (self.spec.channels, *self.spec.size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"expected images (N, {', '.join(map(str, expected))}), received {tuple(images.shape)}")
        images = images.to(self.device)
        batch = self.pipeline({"image": images, "index": torch.arange(len(images))}, epoch=0, train=False)
        return batch["image"].contiguous(memory_format=_layout(self.placement))

    def outputs(self, images: Tensor) -> Outputs:
        """What the network gives for images as `prepared` takes them, float32, by name (`logits`, `mask`, ...)."""
        with torch.no_grad():
            return self.forward.outputs(self.prepared(images))

    def predictions(self, images: Tensor) -> dict[str, Tensor]:
        """What the task makes of the outputs; see `Task.predictions`."""
        return self.task.predictions(self.outputs(images))

    # ---- data ----

    def transform(self, batch: Batch, epoch: int = 0) -> Batch:
        """A batch of a data set as the network is evaluated on it: for a `Loader`."""
        batch = self.task.prepare(self.pipeline(batch, epoch=epoch, train=False))
        return {**batch, "image": batch["image"].contiguous(memory_format=_layout(self.placement))}

    def summed(self, batches: Iterator[tuple[Batch, int]], each: Each | None = None) -> dict[str, Tensor]:
        """The task's measures summed over batches as `transform` gives them, on the CPU, with the penalty of the
        weights.

        Args:
            each: is told every batch with its outputs and the losses of its samples (N,).
        """
        totals = Totals(Ranks(), self.device)
        with torch.no_grad():
            for batch, _ in batches:
                outputs = self.forward.outputs(batch["image"])
                losses, sums = self.forward.judged(outputs, batch)
                totals.add(sums)
                if each is not None:
                    each(batch, outputs, losses)
            sums = totals.take()
            if not self.penalties:
                return sums
            weights = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            _, found = self.penalties(weights)
        return {**sums, **{name: value.cpu() * sums["count"] for name, value in found.items()}}


def open_run(
    folder: RunDir | Path | str,
    checkpoint: str = "best",
    *,
    device: str | None = None,
    trust: Trust = TYPED,
    experiment: Experiment | None = None,
) -> Opened:
    """The trained network of a run folder.

    Args:
        checkpoint: `best` or `last`; of a run that was never evaluated, and so has no best one, the last.
        device: as `trainer.device`; `None` takes the kind that the run had.
        trust: what the command line vouches for (see `cnnlab.composing.trust`).
        experiment: the folder's, where it has been read already.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, another run's, or does not fit the network.
        UsageError: no run folder, or one that names code that nobody vouches for.
    """
    folder = folder if isinstance(folder, RunDir) else RunDir(folder)
    experiment = reopened(folder, trust) if experiment is None else experiment
    which, state = weights(folder, checkpoint, experiment.config)
    origin = state["origin"]
    trainer = {"trainer.step": StepKind.eager.value, **({} if device is None else {"trainer.device": device})}
    experiment = experiment.with_values(trainer)
    placement = place(Resolved.of(origin["choices"]).eager().applied(experiment.trainer), closure=False)
    path = folder.best if which == "best" else folder.last
    recipe = _recipe(recorded_data(origin))
    spec, task, model = network_of(experiment, origin, placement.device)
    pipeline = make_pipeline(experiment, spec)
    model = _loaded(experiment, model, pipeline, state, path)
    model, _ = placed(model.eval(), placement, spec)
    return Opened(
        folder=folder,
        experiment=experiment,
        checkpoint=which,
        origin=origin,
        step=state["clock"]["step"],
        epoch=state["selection"]["epoch"] if which == "best" else state["clock"]["epoch"],
        spec=spec,
        task=task,
        model=model,
        pipeline=pipeline,
        recipe=recipe or _usual_recipe(spec),
        forward=HalvingForward(model, task, placement.device, placement.dtype),
        placement=placement,
        penalties=make_penalties(experiment),
        notices=[*placement.notices, *folder.lost()],
    )


def network_of(
    experiment: Experiment, origin: Mapping[str, Any], device: torch.device
) -> tuple[DataSpec, Task, nn.Module]:
    """The data as the task sees it, the task, on the device, and the network, with any weights, on the CPU; without the
    data.

    Args:
        origin: of a checkpoint.
    """
    data = recorded_data(origin)
    spec, counts = _spec(experiment, data), data.get("class_counts")
    task = make_task(experiment, spec, None if counts is None else torch.tensor(counts))
    task.to(device)
    with torch.random.fork_rng(devices=[]):
        return spec, task, make_network(experiment, spec, task)


def _loaded(
    experiment: Experiment, model: nn.Module, pipeline: Pipeline, state: Mapping[str, Any], path: Path
) -> nn.Module:
    """The network as it is evaluated, and `pipeline`, with the values of a checkpoint."""
    interventions = make_interventions(experiment)
    interventions.attach(model, experiment.seed)
    parts = State()
    own = interventions.of_evaluation()
    averaging = {name: part for name, part in interventions.stateful().items() if name in own}
    named: dict[str, Any] = {"model": model, "normalize": pipeline, **averaging}
    for name, part in named.items():
        parts.register(name, part)
    parts.load_state_dict(state, path=path)
    if own:
        with interventions.evaluated():  # a copy keeps what it is here, whoever holds it, and holds what of it
            return copy.deepcopy(model)
    return model


_TRIES = 20
"""Of a reader who meets a run that saves in the same moment."""


def weights(folder: RunDir, wanted: str, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The checkpoint to take, by name, and its content: of a run that was never evaluated, and so has no best one,
    the last. A run that goes on meanwhile replaces one after the other: both are then read again.

    Raises `CheckpointError` where it is missing, damaged, another run's, or not the one that val chose.
    """
    for _ in range(_TRIES):
        before = _versions(folder)
        try:
            return _weights(folder, wanted, config)
        except CheckpointError:
            if _versions(folder) == before:
                raise
    return _weights(folder, wanted, config)


def _versions(folder: RunDir) -> list[tuple[int, int] | None]:
    """Which files lie there now."""
    found: list[tuple[int, int] | None] = []
    for path in (folder.last, folder.best):
        try:
            stat = path.stat()
            found.append((stat.st_ino, stat.st_mtime_ns))
        except OSError:
            found.append(None)
    return found


def _weights(folder: RunDir, wanted: str, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if not folder.last.exists() and not folder.best.exists():
        raise CheckpointError(f"{folder.path} has no checkpoint; to have one: {folder.begin_again()}")
    if wanted == "best" and not folder.last.exists():  # a copy of what matters
        return "best", load_own(folder, "best", config)
    last = load_own(folder, "last", config)
    best = chosen(folder, config, last["selection"], last) if wanted == "best" else None
    return ("last", last) if best is None else ("best", best)


def _spec(experiment: Experiment, data: Mapping[str, Any]) -> DataSpec:
    """What the network was made for, from the checkpoint; of an older one, from the data set, which has to be there."""
    if "size" not in data:
        return spec_for_task(experiment, experiment.node("data").make().spec())
    return DataSpec(
        data["channels"],
        tuple(data["size"]),
        tuple(data["classes"]),
        frozenset(data["targets"]),
        tuple(data["mask_classes"]),
    )


def recorded_recipe(recipe: Recipe | None) -> dict[str, Any] | None:
    """The recipe as a checkpoint keeps it."""
    if recipe is None:
        return None
    kept = {own.name: getattr(recipe, own.name) for own in fields(Recipe) if own.name not in ("mask", "meaning")}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}


def _recipe(data: Mapping[str, Any]) -> Recipe | None:
    kept = data.get("recipe")
    if kept is None:
        return None
    ranged = kept.get("value_range")
    return Recipe(**{**kept, "value_range": None if ranged is None else tuple(ranged)})


def _usual_recipe(spec: DataSpec) -> Recipe:
    """For a network whose training images were no files: the shorter side to the input's, the middle cut out."""
    height, width = spec.size
    return Recipe(spec.channels, height, width, "crop", max(height, width))


def _layout(placement: Placement) -> torch.memory_format:
    return torch.channels_last if placement.layout is Layout.channels_last else torch.contiguous_format
