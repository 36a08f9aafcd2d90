"""Whether a frozen backbone's features are made once and kept (`finetune.cache`), and how a run then gets batches."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any

import torch

import cnnlab
from cnnlab.augment import Pipeline
from cnnlab.composing.experiment import Experiment
from cnnlab.data.features import content
from cnnlab.data.loader import Loader
from cnnlab.data.places import cache_folder
from cnnlab.data.stream import DISK_SHARE
from cnnlab.errors import UsageError
from cnnlab.interventions import Finetune
from cnnlab.machine.device import Placement
from cnnlab.machine.ranks import Ranks
from cnnlab.protocols import FEATURE, Batch
from cnnlab.schema import FeatureSource
from cnnlab.train.feature_loader import Backbone, FeatureLoader
from cnnlab.train.forward import Forward
from cnnlab.train.halves import LEAST, Whole, halved
from cnnlab.train.interventions import Interventions, overrides

_MAKE_FEATURES = ("model", "activation", "norm", "head")
"""The groups that make the network; what they do not say shows when features are compared."""


@dataclass
class Fed:
    """How a run gets its batches.

    `source` is for the checkpoint, `None` where nobody asked; `notice` for the console.
    """

    loaders: dict[str, Loader]
    forward: Forward
    source: FeatureSource | None = None
    notice: str | None = None
    only: frozenset[str] | None = None
    """Names of the modules that run in training, where not all of them do."""


@dataclass
class Keeping:
    """What it takes to keep features.

    Args:
        epochs: of the run.
        settings: of the parts that make the input, by group.
        recorded: what the run that goes on chose.
    """

    experiment: Experiment
    forward: Forward
    loaders: dict[str, Loader]
    interventions: Interventions
    pipeline: Pipeline
    placement: Placement
    ranks: Ranks
    epochs: int
    settings: Mapping[str, Any]
    resumed: bool
    recorded: FeatureSource | None

    @property
    def finetune(self) -> Finetune | None:
        found = self.interventions.named.get("finetune")
        return found if isinstance(found, Finetune) else None

    def settle(self) -> Fed:
        """Raises `UsageError` where features cannot be kept and `finetune.cache=true`, or the run that goes on had
        them."""
        wanted = False if self.finetune is None else self.finetune.cache
        if wanted is False:
            return Fed(self.loaders, self.forward)
        if self.resumed and self.recorded is not FeatureSource.kept:
            return Fed(self.loaders, self.forward, FeatureSource.run)
        try:
            return self._kept()
        except Whole as error:
            if wanted is True or self.recorded is FeatureSource.kept:
                raise UsageError(
                    f"`finetune.cache`: features cannot be kept, as {error}; type finetune.cache=false"
                ) from error
            return Fed(self.loaders, self.forward, FeatureSource.run, f"features: made anew in each epoch, as {error}")

    def _kept(self) -> Fed:
        self._require_fixed_input()
        finetune, forward, train = self.finetune, self.forward, self.loaders["train"]
        assert finetune is not None
        few = _few(train.images.first()[0])
        halves = halved(
            forward.model, few["image"], partial(self.interventions.train, forward.model, 0), forward.autocast
        )
        views = (finetune.views or 1) if self.pipeline.parts else 1
        split = Forward(forward.model, forward.task, forward.device, forward.dtype, halves=halves)
        folder, required = partial(cache_folder, None), finetune.cache is True
        backbone = Backbone(split, self._about(train=True), folder, self.ranks, required)
        made = backbone.of(few)
        self._require_no_images(backbone, made)
        each = sum(tensor[:1].numel() * tensor.element_size() for name, tensor in made.items() if name != "index")
        self._require_room(each * (train.length * views + self.loaders["val"].length))
        loaders = {**self.loaders, "train": FeatureLoader(train, backbone, views)}
        if len(forward.task.views(few["image"])) == 1:
            held = Backbone(split, self._about(train=False), folder, self.ranks, required)
            loaders["val"] = FeatureLoader(self.loaders["val"], held)
        shape = ", ".join("x".join(map(str, t.shape[1:])) for name, t in made.items() if name.startswith(FEATURE))
        seen = f"{views} fixed views of each image" if views > 1 else "each image"
        notice = (
            f"features: of {seen} made once and kept ({halves.describe()}: {shape}); layers before it do not run in "
            "training, and have no statistics (finetune.cache=false runs them)"
        )
        return Fed(loaders, split, FeatureSource.kept, notice, halves.ran)

    def _require_fixed_input(self) -> None:
        assert self.finetune is not None
        if self.finetune.norm == "update":
            raise Whole("the statistics of its norm layers move (finetune.norm=update)")
        if self.finetune.cache == "auto" and self.recorded is not FeatureSource.kept and self.epochs < 2:
            raise Whole("one epoch needs them once")
        if self.pipeline.neighbours:
            raise Whole("augmentation mixes each image with another one of its batch")
        if self.pipeline.parts and self.finetune.views is None:
            raise Whole("augmentation draws anew in each epoch (finetune.views=4 would fix four views of each image)")
        for name, part in self.interventions.named.items():
            if overrides(part, "batch"):
                raise Whole(f"{name} changes the batches")
            if overrides(part, "weights") and not type(part).__module__.startswith("cnnlab."):
                raise Whole(f"{name} may change weights that do not train")

    def _require_no_images(self, backbone: Backbone, made: Batch) -> None:
        """Raises `Whole` where the task wants to see the images."""
        try:
            with backbone.standing():
                backbone.forward(made)
        except KeyError as error:
            raise Whole(f"the task reads {error} of the batch") from error

    def _require_room(self, needed: int) -> None:
        folder = cache_folder(None).absolute()
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        if not os.access(there, os.W_OK | os.X_OK):
            raise Whole(f"the cache {folder} cannot be written (CNNLAB_CACHE names another)")
        free = shutil.disk_usage(there).free
        if needed > DISK_SHARE * free:
            raise Whole(
                f"they would take {needed:,} bytes, more than half of the {free:,} free in {folder} (CNNLAB_CACHE "
                "names another)"
            )

    def _about(self, *, train: bool) -> dict[str, Any]:
        """What features depend on, besides the weights, the images and the view."""
        augment = train and bool(self.pipeline.parts)
        used = self.settings
        wanted = used if augment else {name: value for name, value in used.items() if not name.startswith("augment")}
        return {
            "cnnlab": cnnlab.__version__,
            "torch": torch.__version__,
            "network": {group: self.experiment.node(group).config for group in _MAKE_FEATURES},
            "input": wanted,
            "fitted": _digest(self.pipeline.state_dict()),
            "seed": self.experiment.seed if augment else None,
            "device": self.placement.device.type,
            "precision": self.placement.precision.value,
            "layout": self.placement.layout.value,
            "targets": sorted(self.forward.task.needs),
        }


def _few(batch: Batch) -> Batch:
    return {name: tensor[: 2 * LEAST] for name, tensor in batch.items()}


def _digest(state: Any) -> str:
    """Names nested tensors by their content."""
    hasher = blake2b(digest_size=12)

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            hasher.update(f"{value.dtype} {tuple(value.shape)}".encode())
            hasher.update(content(value))
        elif isinstance(value, Mapping):
            for name in sorted(value):
                hasher.update(str(name).encode())
                add(value[name])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            hasher.update(repr(value).encode())

    add(state)
    return hasher.hexdigest()
