"""The groups of parts that an experiment is composed of, a row each. Loads no torch.

A new group is one row here and a folder of options in `configs/`; a line in `configs/config.yaml` where it has a
default; and whoever makes its parts (see `cnnlab.building.assemble`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Group:
    """What is known of a group's parts before one is made."""

    kind: tuple[str, ...]
    """What a part is, any of these: full names of protocols and classes, which `kinds` loads."""
    wired: tuple[str, ...] = ()
    """Parameters that the builder passes by name to whichever part takes them."""
    optional: bool = False
    """Whether null is an answer: the choice is then the network's, or the task's."""
    factory: bool = False
    """Whether the network makes the part anew at each place, from a partial."""
    named: bool = False
    """Whether the node maps names to parts, in order."""
    later: bool = False
    """Whether a stored run may be older than the group; it has none of its parts."""

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The protocols and classes themselves; of a factory, what it makes."""
        parts = [name.rpartition(".") for name in self.kind]
        found = tuple(getattr(import_module(module), name) for module, _, name in parts)
        return tuple(Callable[..., kind] for kind in found) if self.factory else found


GROUPS: Mapping[str, Group] = {
    "data": Group(("cnnlab.protocols.Data",), wired=("loading", "crops", "shifts")),
    "task": Group(("cnnlab.tasks.Task",), wired=("loss", "spec")),
    "model": Group(
        ("torch.nn.Module",),
        wired=(
            "num_classes",
            "in_channels",
            "image_size",
            "activation",
            "norm",
            "dropout",
            "stochastic_depth",
        ),
    ),
    "head": Group(
        ("cnnlab.protocols.Head",),
        wired=(
            "stage_channels",
            "stage_sizes",
            "pool_channels",
            "image_size",
            "num_classes",
            "mask_classes",
            "activation",
            "norm",
            "dropout",
        ),
        optional=True,
    ),
    "activation": Group(("torch.nn.Module",), optional=True, factory=True),
    "norm": Group(("torch.nn.Module",), optional=True, factory=True),
    "init": Group(("cnnlab.protocols.Init",)),
    "loss": Group(("cnnlab.protocols.Loss",), wired=("num_classes", "class_counts")),
    "weights": Group(("cnnlab.weights.Weights",), wired=("opened", "model_name"), optional=True, later=True),
    "finetune": Group(("cnnlab.interventions.Finetune",), optional=True, later=True),
    "optim": Group(("torch.optim.Optimizer",)),
    "schedule": Group(("cnnlab.protocols.Schedule",)),
    "normalize": Group(("cnnlab.augment.Normalize",)),
    "augment": Group(("cnnlab.augment.Geometric", "cnnlab.augment.Colour", "cnnlab.augment.Barrier"), named=True),
    "penalty": Group(("cnnlab.protocols.Penalty",), named=True, later=True),
    "intervention": Group(("cnnlab.protocols.Intervention",), named=True, later=True),
    "listener": Group(("cnnlab.protocols.Listener",), named=True, later=True),
    "probe": Group(("cnnlab.protocols.Probe",), named=True),
}
