"""A checked experiment: its sections bound, its parts ready to be made. Loads no torch.

Nothing outside `cnnlab.composing` and the check reads raw config: who needs a setting asks an `Experiment` for the
section that holds it, and who needs a part asks for its `Node`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from cnnlab.composing.composer import Composed
from cnnlab.composing.kinds import is_part
from cnnlab.composing.make import make
from cnnlab.composing.rates import is_auto, with_number
from cnnlab.composing.signature import RESERVED, accepts, bind_section, locate, parameters_of
from cnnlab.schema import Groups, Loading, Paths, Regularization, Stats, Trainer

SECTIONS = {
    "trainer": Trainer,
    "loading": Loading,
    "groups": Groups,
    "regularization": Regularization,
    "stats": Stats,
    "paths": Paths,
}
"""The fixed sections of a config, and what binds each."""
VALUES: dict[str, Any] = {"seed": int, "name": str, "resume": str | None, "check": bool | Literal["strict"]}
"""The keys of a config that are neither a section nor a group."""
DEFAULTS: dict[str, Any] = {"check": False}
"""Of those that configs of earlier versions lack."""


@dataclass(frozen=True)
class Node:
    """A part that can be made, as the config describes it; false where the choice was left to others (`head=auto`).

    `where` is its place in the config: a group, or `group.name`.
    """

    where: str
    config: Mapping[str, Any] | None

    @classmethod
    def of(cls, composed: Composed, group: str) -> Node:
        """That of a group with one part, of what has not been checked."""
        return cls(group, composed.config.get(group))

    def __bool__(self) -> bool:
        return self.config is not None and self.config.get("_target_") is not None

    @property
    def name(self) -> str:
        """`package.module.Name` of what makes it."""
        return "" if self.config is None else str(self.config["_target_"])

    @cached_property
    def target(self) -> Any:
        """The class or function that makes it. Raises `TargetError` where it cannot be imported."""
        return locate(self.name)

    @property
    def settings(self) -> dict[str, Any]:
        """The values that the config gives its constructor."""
        return {key: value for key, value in (self.config or {}).items() if key not in RESERVED}

    def get(self, key: str, default: Any = None) -> Any:
        return self.settings.get(key, default)

    def states(self, option: str) -> bool:
        """Whether the config has this option: that of an earlier version may lack it."""
        return option in self.settings

    def parts(self, option: str) -> dict[str, Node]:
        """The parts by name that an option holds; empty where it holds something else."""
        held = self.get(option)
        named = held.items() if isinstance(held, Mapping) else ()
        return {name: Node(f"{self.where}.{option}.{name}", part) for name, part in named if is_part(part)}

    def takes(self, parameter: str) -> bool:
        """Whether its constructor has a parameter of this name."""
        return accepts(self.target, parameter)

    @property
    def first_parameter(self) -> str | None:
        """The name of the first parameter of its constructor: an optimizer's parameters to train."""
        return next(iter(parameters_of(self.target)[0]), None)

    def with_settings(self, **settings: Any) -> Node:
        return replace(self, config={**(self.config or {}), **settings})

    def make(self, **wired: Any) -> Any:
        """The part, with those of the `wired` parameters that its constructor takes; `None` for a node that is false.

        Raises what its constructor raises.
        """
        return make(self.config, **wired)


@dataclass(frozen=True)
class DataPlace:
    """The option that says where data lies, a word for what it takes, and what it has."""

    option: str
    word: str
    value: Any


@dataclass(frozen=True)
class Experiment(Composed):
    """A composed experiment whose values have been checked: what `cnnlab.build` takes.

    `cnnlab.compose` gives one, and so does whoever opens a run folder. Each section is bound once.
    """

    @classmethod
    def of(cls, composed: Composed) -> Experiment:
        """For the check, once it has found nothing wrong (`cnnlab.building.trial`)."""
        return cls(**{field.name: getattr(composed, field.name) for field in fields(Composed)})

    # ---- values and sections ----

    @property
    def name(self) -> str:
        return str(self.config["name"])

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    @property
    def outputs(self) -> Path:
        """Where runs go."""
        return Path(self.config["paths"]["outputs"])

    @property
    def resume(self) -> str | None:
        """What `resume=` names."""
        return self.config["resume"]

    @property
    def check(self) -> bool | str:
        """Whether it is looked at before it trains (`strict`: and refused where something is bad)."""
        return self.config.get("check", DEFAULTS["check"])

    @cached_property
    def trainer(self) -> Trainer:
        return self._bound("trainer")

    @cached_property
    def loading(self) -> Loading:
        return self._bound("loading")

    @cached_property
    def groups(self) -> Groups:
        return self._bound("groups")

    @cached_property
    def regularization(self) -> Regularization:
        return self._bound("regularization")

    @cached_property
    def stats(self) -> Stats:
        return self._bound("stats")

    def _bound(self, name: str) -> Any:
        return bind_section(SECTIONS[name], self.config[name])

    # ---- parts ----

    def node(self, group: str) -> Node:
        """The part of a group that has one. An optimizer whose rate is yet to be found (`finds_rate`)
        has a number in its place.
        """
        config = self.config.get(group)
        return Node(group, with_number(config) if group == "optim" else config)

    @property
    def data_place(self) -> DataPlace | None:
        """Where the data lies; `None` for data that lies nowhere."""
        given = self.node("data").settings
        known = {"root": "FOLDER", "shards": "PATTERN"}
        return next((DataPlace(f"data.{key}", word, given[key]) for key, word in known.items() if key in given), None)

    @property
    def finds_rate(self) -> bool:
        """Whether a range test chooses the rate: `optim.lr=auto`."""
        return is_auto(self.config.get("optim"))

    def nodes(self, group: str) -> dict[str, Node]:
        """The parts of a group that has several, by name, in order; those that were switched off are left out.

        A run that is older than the group has none of its parts.
        """
        named = self.config.get(group) or {}
        return {name: Node(f"{group}.{name}", part) for name, part in named.items() if part is not None}

    # ---- another one ----

    def with_values(self, values: Mapping[str, Any]) -> Experiment:
        """The same experiment with other values, by dotted key (`{"trainer.epochs": 5}`); a missing section is made."""
        config = dict(self.config)
        for key, value in values.items():
            *path, last = key.split(".")
            inner = config
            for name in path:
                inner[name] = dict(inner.get(name) or {})
                inner = inner[name]
            inner[last] = value
        return replace(self, config=config)
