"""The groups of parts that an experiment is composed of, a row each. Loads no torch.

A new group is one row here, a folder of options in `configs/`, a line in `configs/config.yaml`, and whoever makes it
(see `cnnlab.building.assemble`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """What is known of a group's parts before one is made."""

    wired: tuple[str, ...] = ()
    """Parameters that the builder passes by name to whichever part takes them."""
    has: tuple[str, ...] = ()
    """What a part must have."""
    described: str = ""
    """Where that is described."""
    optional: bool = False
    """Whether null is an answer: the choice is then the network's, or the task's."""
    factory: bool = False
    """Whether the network makes the part anew at each place, from a partial."""
    named: bool = False
    """Whether the node maps names to parts, in order."""


GROUPS: Mapping[str, Group] = {
    "data": Group(wired=("loading",), has=("spec", "load"), described="cnnlab.protocols.Data"),
    "task": Group(wired=("loss", "spec")),
    "model": Group(
        wired=(
            "num_classes",
            "in_channels",
            "image_size",
            "activation",
            "norm",
            "dropout",
            "stochastic_depth",
        )
    ),
    "head": Group(
        wired=(
            "stage_channels",
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
    "activation": Group(optional=True, factory=True),
    "norm": Group(optional=True, factory=True),
    "init": Group(has=("__call__",), described="cnnlab.protocols.Init"),
    "loss": Group(wired=("num_classes", "class_counts"), has=("__call__",), described="cnnlab.protocols.Loss"),
    "optim": Group(),
    "schedule": Group(has=("factor",), described="cnnlab.protocols.Schedule"),
    "normalize": Group(),
    "augment": Group(named=True),
    "intervention": Group(
        has=("attach", "batch", "gradients", "weights", "mode", "evaluated", "state_dict", "load_state_dict"),
        described="cnnlab.protocols.Intervention",
        named=True,
    ),
    "probe": Group(has=("name", "every", "needs", "supports", "read"), described="cnnlab.protocols.Probe", named=True),
}
