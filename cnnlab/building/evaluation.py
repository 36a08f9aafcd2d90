"""A trained network measured on data: the run's own, or other data with the same classes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cnnlab.building.assemble import make_data
from cnnlab.building.opened import Each, Opened
from cnnlab.composing.experiment import Experiment, Node
from cnnlab.data.choice import loaded, with_decoder
from cnnlab.data.loader import Loader
from cnnlab.errors import CheckpointError, UsageError, short
from cnnlab.machine.ranks import Ranks
from cnnlab.machine.resolved import Resolved
from cnnlab.protocols import VOID, Batch, Data, DataSpec, Split
from cnnlab.schema import Loading
from cnnlab.train.meter import describe_sums
from cnnlab.train.origin import Origin, described, first


@dataclass
class Found:
    """What an evaluation found.

    `data` says how the data differs from the run's, and is empty where it is the same; `figures` are named as in
    `run.json`; `classes` says what became of each class (see `cnnlab.tasks.metrics.by_class`).
    """

    data: str
    figures: dict[str, float]
    classes: list[dict[str, Any]]
    sums: dict[str, Tensor]
    """The task's measures, summed over the split."""


@dataclass
class OpenedData:
    """A data set for an opened network, each class at the place that it has there."""

    spec: DataSpec
    splits: dict[str, Split]
    changes: str
    """How it differs from the run's, in words; empty where it is the same."""
    loading: Loading
    renumbered: Callable[[Batch], Batch]
    source: Data
    whole: DataSpec
    """Of the data, with the targets that the network has no use for."""
    files: dict[str, list[str]] = field(default_factory=dict)
    """Of splits that lie in files, each sample's."""

    def name(self, split: str, index: int) -> str:
        """Of a sample, for people: its file, or its number."""
        names = self.files.get(split, [])
        return names[index] if len(names) == len(self.splits[split]) else f"{split} {index}"


def evaluate(network: Opened, split: str, data: OpenedData, each: Each | None = None) -> Found:
    """The metrics of a network on one split, `train`, `val` or `test`; neither augmented nor shuffled.

    Args:
        each: see `Opened.measure`.
    """
    sums = network.summed(loader_of(network, split, data).batches(0), each)
    classes = network.task.by_class(sums)
    figures = {f"{split}/{metric}": value for metric, value in describe_sums(network.task, dict(sums)).items()}
    return Found(data.changes, figures, classes, sums)


def loader_of(network: Opened, split: str, data: OpenedData, also: Collection[str] = ()) -> Loader:
    """The batches of a split as the network is evaluated on them, in the split's order.

    Args:
        also: targets beside those that the task needs.
    """

    def transform(batch: Batch, epoch: int) -> Batch:
        return network.transform(data.renumbered(batch), epoch)

    trainer, source = network.experiment.trainer, data.splits[split]
    return Loader(
        source,
        min(trainer.eval_batch_size or max(trainer.batch_size, 256), len(source)),
        seed=network.experiment.seed,
        shuffle=False,
        device=network.device,
        loading=data.loading,
        targets=tuple(dict.fromkeys((*network.task.needs, *also))),
        transform=transform,
    )


def data_for(network: Opened, experiment: Experiment | None = None) -> OpenedData:
    """The run's data, or that of another experiment, for an opened network.

    Args:
        experiment: whose data it is, with classes in any order; `None` takes the run's own, of which `changes` tells
            all that is not as it was.

    Raises:
        CheckpointError: it has classes, targets or images that the network was not made for.
        DataError: the data is missing or unusable.
        UsageError: an option of it is refused.
    """
    own = experiment is None
    experiment = network.experiment if experiment is None else experiment
    node, resolved = experiment.node("data"), Resolved.of(network.origin["choices"])

    def make(loading: Loading) -> Data:
        return make_data(experiment, network.pipeline, loading)

    try:
        source = node.make()
        whole = source.spec()
    except ValueError as error:
        raise UsageError(f"`data`: {error}") from error
    _require_targets(network, whole)
    spec = whole.only(network.task.needs)
    _require_images(network, spec)
    renumbered = _renumbering(network.spec, network.spec if own else spec)
    splits, findings = loaded(make, experiment.loading, Ranks(), resolved.data_path)
    loading = with_decoder(experiment.loading, splits["test"], network.device, resolved.decode)
    now = Origin(
        experiment.config,
        described(
            {name: split.fingerprint for name, split in splits.items()},
            {name: len(split) for name, split in splits.items()},
            classes=list(spec.classes),
            mask_classes=list(spec.mask_classes),
        ),
        resolved,
        findings.files,
        network.folder.path,
    )
    network.notices += findings.notices
    changes = now.changes(network.origin, network.folder.path)
    files = {name: list(lengths) for name, lengths in findings.files.items()}
    return OpenedData(spec, splits, changes, loading, renumbered, source, whole, files)


def _require_targets(network: Opened, spec: DataSpec) -> None:
    lacking = [target for target in network.task.needs if target not in spec.targets]
    if lacking:
        raise CheckpointError(
            f"this network was trained for {', '.join(network.task.needs)}, and the data has no {', '.join(lacking)}; "
            "type a data= that has"
        )


def _require_images(network: Opened, spec: DataSpec) -> None:
    for name in ("channels", "size"):
        made, given = getattr(network.spec, name), getattr(spec, name)
        if made != given:
            raise CheckpointError(
                f"this network was trained for {name} {_shown(made)}, and the data has {_shown(given)}; type "
                f"data.{name} of the run"
            )


def _shown(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, Sequence) else str(value)


def _renumbering(made: DataSpec, given: DataSpec) -> Callable[[Batch], Batch]:
    """What gives each class of the data the number that it has in the network, found by its name.

    Raises `CheckpointError` for classes that the network does not know.
    """
    labels = _places(made.classes, given.classes, "classes")
    masks = _places(made.mask_classes, given.mask_classes, "the masks' classes") if "mask" in given.targets else None

    def renumbered(batch: Batch) -> Batch:
        batch = dict(batch)
        if labels is not None and "label" in batch:
            batch["label"] = labels.to(batch["label"].device)[batch["label"]]
        if masks is not None and "mask" in batch:
            batch["mask"] = masks.to(batch["mask"].device)[batch["mask"].long()]
        return batch

    return renumbered


def _places(made: Sequence[str], given: Sequence[str], words: str) -> Tensor | None:
    """(256 or more,) the network's number of each of the data's; `None` where they are the same."""
    if tuple(made) == tuple(given):
        return None
    unknown = [name for name in given if name not in made]
    if unknown:
        raise CheckpointError(
            f"{words}: the network does not know {first(unknown)} ({len(unknown)} of {len(given)}); it was trained for "
            f"{short(', '.join(made))}. Name them alike (for class folders: rename the folders), or leave them out"
        )
    places = torch.arange(max(VOID + 1, len(given)))
    places[: len(given)] = torch.tensor([list(made).index(name) for name in given])
    return places


def fitting_values(network: Opened, data: Node, typed: Sequence[str]) -> dict[str, Any]:
    """Values for another data set's options that make its images the network's inputs, where nobody typed others."""
    height, width = network.spec.size
    size: Any = height if height == width else [height, width]
    wanted = {"size": size, "channels": network.spec.channels}
    return {
        name: value for name, value in wanted.items() if name not in typed and data.states(name) and data.takes(name)
    }
