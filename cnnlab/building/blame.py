"""Which setting a part's constructor refuses, found by trying again without it.

A third party says `learning rate must be positive` of a value that was typed as `optim.lr=-0.1`; what the user needs is
the key, and only an attempt with the part's own default in its place tells which one it was.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import Any

from cnnlab.composing.experiment import SECTIONS, Experiment
from cnnlab.composing.kinds import is_part
from cnnlab.composing.signature import RESERVED, locate, parameters_of
from cnnlab.composing.values import show
from cnnlab.errors import DataError, UsageError

MOST_TRIED = 64
"""Attempts to find whose value one refusal is about."""
MOST_TOLD = 8
"""Refusals of one constructor that are told."""


@dataclass(frozen=True)
class Setting:
    """A value that is not its part's own default, which is `instead`; `None` there leaves the key out."""

    path: tuple[str, ...]
    value: Any
    instead: tuple[Any] | None

    @property
    def key(self) -> str:
        return ".".join(self.path)

    def __str__(self) -> str:
        return f"`{self.key}={show(self.value)}`"


def settings_of(config: Mapping[str, Any], groups: Collection[str]) -> Iterator[Setting]:
    """The settings of some groups and fixed sections that are not the defaults of what they configure."""
    for group in groups:
        node = config.get(group)
        if group in SECTIONS and isinstance(node, Mapping):
            yield from _of_call(SECTIONS[group], node, (group,))
        elif isinstance(node, Mapping) and is_part(node):
            yield from _of_part(node, (group,))
        elif isinstance(node, Mapping):
            for name, part in node.items():
                if is_part(part):
                    yield from _of_part(part, (group, str(name)))


def _of_part(node: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[Setting]:
    if node["_target_"] is not None:
        yield from _of_call(locate(str(node["_target_"])), node, path)


def _of_call(target: Callable[..., Any], node: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[Setting]:
    parameters, _ = parameters_of(target)
    for key, value in node.items():
        if key in RESERVED:
            continue
        if is_part(value):
            yield from _of_part(value, (*path, str(key)))
            continue
        parameter = parameters.get(str(key))
        if parameter is None:
            yield Setting((*path, str(key)), value, None)
        elif parameter.default is not inspect.Parameter.empty:
            default = _plain(parameter.default)
            if type(value) is not type(default) or value != default:
                yield Setting((*path, str(key)), value, (default,))


def _plain(default: Any) -> Any:
    """A parameter's default as a config would have it."""
    if isinstance(default, Enum):
        return default.value
    return [_plain(item) for item in default] if isinstance(default, tuple) else default


def without(experiment: Experiment, settings: Sequence[Setting]) -> Experiment:
    """The experiment with the defaults in place of some settings."""
    found = dict(experiment.config)
    for setting in settings:
        node = found
        for name in setting.path[:-1]:
            node[name] = dict(node[name])
            node = node[name]
        if setting.instead is None:
            node.pop(setting.path[-1], None)
        else:
            node[setting.path[-1]] = setting.instead[0]
    return replace(experiment, config=found)


def blamed(
    error: Exception,
    settings: Sequence[Setting],
    retry: Callable[[Setting], Exception | None],
    typed: Collection[str] = (),
) -> list[Setting]:
    """The settings that a refusal is about; none where that cannot be told.

    Args:
        error: the refusal.
        settings: those that it may be about.
        retry: what is refused with one of them left at its default; `None` for nothing.
        typed: the keys of the command line, which come before others that would end the refusal, too.
    """
    ending, changing = [], []
    for setting in settings[:MOST_TRIED]:
        other = retry(setting)
        if other is None:
            ending.append(setting)
        elif (type(other), str(other)) != (type(error), str(error)):
            changing.append(setting)
    found = ending or changing
    by_user = [setting for setting in found if setting.key in typed]
    if by_user:
        return by_user
    if len(found) > 1:
        words = set(re.findall(r"\w+", str(error).lower()))
        found = [setting for setting in found if setting.path[-1].lower() in words]
    return found


class Attempts:
    """Actions on the parts of an experiment; what they refuse is kept in `problems`, by the settings that it is about.

    Args:
        experiment: which the actions read here, as `experiment`.
        typed: the keys of the command line.
    """

    def __init__(self, experiment: Experiment, typed: Collection[str] = ()):
        self.experiment = experiment
        self.typed = typed
        self.broken: set[str] = set()
        self.problems: list[str] = []
        self.data_error: DataError | None = None

    def sound(self, *groups: str) -> bool:
        return not self.broken & set(groups)

    def refuse(self, problem: str, *groups: str) -> None:
        self.refuse_all([problem], *groups)

    def refuse_all(self, problems: Sequence[str], *groups: str) -> None:
        self.problems += problems
        self.broken.update(groups)

    def attempt(self, where: str, action: Callable[[], Any], *groups: str, among: Collection[str] = ()) -> Any:
        """The action's result; `None` and a problem, by which the first group is broken, when it refuses.

        Args:
            among: groups and sections whose settings the refusal may be about, besides `groups`.
        """
        if not self.sound(*groups):
            return None
        try:
            return action()
        except DataError as error:
            self.data_error = error
        except Exception as error:  # a third party's constructor may raise anything; it is the user's value
            self.refuse_all(self.told(where, action, error, (*groups, *among)), *groups[:1])
        return None

    def told(
        self, where: str, action: Callable[[], Any], error: Exception | None, groups: Collection[str]
    ) -> list[str]:
        """All that an action refuses: the settings that a refusal is about are put back, and it is tried again."""
        problems: list[str] = []
        kept = self.experiment
        try:
            while error is not None and len(problems) < MOST_TOLD:
                text = textwrap.shorten(str(error), 500, placeholder=" ...")
                if text.startswith(("`", *(f"{group}:" for group in groups), f"{where}.")):
                    return [*problems, text]
                settings = list(settings_of(self.experiment.config, groups))
                about = blamed(error, settings, partial(self.refused, action), self.typed)
                kind = "" if isinstance(error, ValueError | UsageError) else f"{type(error).__name__}: "
                problems.append(f"{' with '.join(map(str, about)) or f'`{where}`'}: {kind}{text}")
                if not about:
                    break
                error = self.refused(action, *about)
                self.experiment = without(self.experiment, about)
        finally:
            self.experiment = kept
        return problems

    def refused(self, action: Callable[[], Any], *settings: Setting) -> Exception | None:
        """What an action refuses without some settings; `None` where it does what it is to."""
        kept, self.experiment = self.experiment, without(self.experiment, settings)
        try:
            action()
        except DataError:
            pass
        except Exception as error:
            return error
        finally:
            self.experiment = kept
        return None
