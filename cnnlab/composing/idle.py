"""Settings that were typed and do nothing, because another one is off. Loads no torch."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Annotated, Any

from cnnlab.composing.experiment import SECTIONS, Experiment, Node
from cnnlab.composing.groups import GROUPS
from cnnlab.composing.overrides import key_of
from cnnlab.composing.signature import parameters_of
from cnnlab.composing.values import show
from cnnlab.schema import Beside


def idle(experiment: Experiment) -> list[str]:
    """A sentence on each setting that was typed, is not what it would be anyway, and acts only beside others
    (`cnnlab.schema.Beside`) that are off."""
    return [sentence for key in dict.fromkeys(map(key_of, experiment.overrides)) for sentence in _idle(experiment, key)]


def _idle(experiment: Experiment, key: str) -> Iterator[str]:
    group, *inside = key.split(".")
    if group == "probe":
        if not experiment.stats.enabled:
            yield f"`{key}` has no effect while stats.enabled is false; type stats=default"
        return
    where, name = (".".join([group, *inside[:-1]]), inside[-1]) if inside else ("", "")
    target = SECTIONS.get(where) or _target(experiment, where)
    if target is None:
        return
    parameters, hints = parameters_of(target)
    beside = next((mark for mark in _marks(hints.get(name)) if isinstance(mark, Beside)), None)
    value = experiment.at(key)
    if beside is None or (name in parameters and value == parameters[name].default):
        return
    others = [other if "." in other else f"{where}.{other}" for other in beside.others]
    if not any(experiment.at(other) for other in others):
        are = " and ".join(f"{other} is {show(experiment.at(other))}" for other in others if experiment.has(other))
        yield f"`{key}={show(value)}` has no effect while {are}"


def _target(experiment: Experiment, where: str) -> Any:
    """The class whose settings stand at `where`: a group's part, or one of its named parts."""
    group, _, name = where.partition(".")
    node: Node | None = None
    if group in GROUPS:
        node = (
            experiment.nodes(group).get(name) if GROUPS[group].named else experiment.node(group) if not name else None
        )
    return node.target if node else None


def _marks(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()
