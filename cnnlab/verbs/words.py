"""What a part, a group of parts or a setting is, with what each setting takes and means: `cnnlab help WORDS`, and
`cnnlab train --help WORDS`."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cnnlab.composing.composer import Composed, Composer
from cnnlab.composing.experiment import SECTIONS, VALUES
from cnnlab.composing.groups import GROUPS
from cnnlab.composing.meanings import (
    Knob,
    as_typed,
    comments_of,
    comments_on,
    first_sentence,
    knobs_of,
    node_of,
    parts_of,
    summary_of,
)
from cnnlab.composing.overrides import LISTS, first_key, key_of, swept
from cnnlab.composing.values import describe
from cnnlab.errors import ConfigError, closest, did_you_mean, listing, short
from cnnlab.runs.folder import flatten, jsonable
from cnnlab.terminal import one_line, say
from cnnlab.verbs.table import VERBS

NARROWEST, WIDEST = 24, 110
"""Columns between which the text is wrapped."""


@dataclass(frozen=True)
class Explained:
    """What is told of one word of the command line."""

    title: str
    text: str = ""
    """Line by line, as its file has it."""
    options: Mapping[str, str] | None = None
    """What may stand after `GROUP=`, each with its first sentence."""
    sets: tuple[str, ...] = ()
    """Overrides that say the same as the option."""
    knobs: tuple[Knob, ...] = ()


def explain(open_composer: Composer, words: Sequence[str], *, as_json: bool = False) -> int:
    """Tells what each of the words names: overrides, or names of groups and settings; the exit code.

    Raises `ConfigError` with every name that there is not.
    """
    explainer = _Explainer(open_composer)
    found: list[Explained] = []
    problems: list[str] = []
    for word in _words(open_composer, words):
        try:
            found += explainer.explain(word)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    if as_json:
        say(json.dumps(jsonable([_document(item) for item in found])))
    else:
        width = min(max(shutil.get_terminal_size((WIDEST, 24)).columns, NARROWEST), WIDEST)
        say("\n\n".join("\n".join(_lines(item, width)) for item in found))
    return 0


def _words(open_composer: Composer, overrides: Sequence[str]) -> Iterator[str]:
    """The overrides, of which a sweep gives one a value."""
    for text in overrides:
        (parsed,) = open_composer.parse([text]) if "=" in text else (None,)
        yield from swept(parsed) if parsed is not None and parsed.is_sweep_override() else [text]


class _Explainer:
    def __init__(self, open_composer: Composer):
        self.composer = open_composer
        self.groups = [*open_composer.groups()]
        self.chosen: dict[str, str] = {}
        """The options typed so far, which later keys are about."""
        self._composed: dict[tuple[str, ...], Composed] = {}

    def explain(self, word: str) -> Iterator[Explained]:
        key = key_of(word)
        if "=" in word and key in self.groups and not _is_value(word):
            self.chosen[key] = word.lstrip("+~")
            yield from self.option(key, self.taken(key))
        elif key in self.groups:
            yield from self.group(key)
        elif key in SECTIONS:
            yield Explained(key, knobs=tuple(self.knobs(key)))
        elif first_key(key) in self.groups:
            yield self.setting(key)
        elif key in VALUES:
            meaning = comments_of(self.composer.text_of("", self.composer.config_name)).get(key, "")
            knob = Knob(key, self.composed().at(key), describe(VALUES[key]), meaning)
            yield Explained(key, knobs=(knob,))
        else:
            raise self.unknown(word)

    def unknown(self, word: str) -> ConfigError:
        """No such name; among the settings that there are, and among the options."""
        key = key_of(word)
        if not key:
            return ConfigError(
                [f"`{short(word)}`: expected a group, an option or a setting; type cnnlab help model=vgg"]
            )
        options = {group: self.composer.options(group) for group in self.groups}
        meant = [f"{group}={key}" for group, names in options.items() if key in names]
        meant = meant or [path for path in flatten(self.config()) if path.rpartition(".")[2] == key][:1]
        known = [*self.groups, *VALUES, *VERBS]
        meant = meant or [name for name in [closest(key, known)] if name]
        meant = meant or [f"{group}={name}" for group, names in options.items() if (name := closest(key, names, 0.8))]
        hint = (
            f" (did you mean {' or '.join(f'`{name}`' for name in meant)}?)" if meant else f"; known: {listing(known)}"
        )
        return ConfigError([f"`{short(word)}`: no verb, group or setting of this name{hint}"])

    # ---- what is composed ----

    def composed(self) -> Composed:
        choices = tuple(self.chosen.values())
        if choices not in self._composed:
            self._composed[choices] = self.composer.compose(choices)
        return self._composed[choices]

    def config(self) -> dict[str, Any]:
        return self.composed().config

    def taken(self, group: str) -> list[str]:
        """The options of a group that these choices take; of a list Hydra names none, and its parts tell them."""
        composed = self.composed()
        if group in self.chosen:
            found = self.composer.parse([self.chosen[group]])[0].value()
        else:
            found = composed.choices.get(group, [*(composed.at(group) or {})])
        return [str(name) for name in (found if isinstance(found, list) else [found]) if name is not None]

    # ---- a group, an option, a setting ----

    def group(self, group: str) -> Iterator[Explained]:
        names = self.composer.options(group)
        if len(names) > 1:
            told = {name: first_sentence(summary_of(self.composer.text_of(group, name))) for name in names}
            several = f"; several as a list: {group}=[A,B]" if group in LISTS else ""
            yield Explained(f"{group}: its options{several}", options=told)
        if group in SECTIONS:
            yield Explained(group, knobs=tuple(self.knobs(group)))
        elif group in GROUPS:
            yield from self.option(group, self.taken(group))

    def option(self, group: str, names: Sequence[str]) -> Iterator[Explained]:
        for name in names:
            text = self.composer.text_of(group, name)
            title, knobs = f"{group}={name}", tuple(self.knobs(group, name))
            sets: tuple[str, ...] = ()
            if group in GROUPS:
                node = self.composed().at(group) or {}
                title += f" ({node['_target_']})" if not GROUPS[group].named and node.get("_target_") else ""
            else:
                sets = _sets(group, node_of(text))
                own = {line.partition("=")[0] for line in sets}
                knobs = tuple(knob for knob in knobs if knob.key in own)
                told = {knob.key for knob in knobs}
                sets = tuple(line for line in sets if line.partition("=")[0] not in told)
            yield Explained(title, summary_of(text), sets=sets, knobs=knobs)

    def knobs(self, group: str, option: str | None = None) -> Iterator[Knob]:
        """The settings of a section, or of the parts that an option of a group (without it: all that are taken) has."""
        node = self.composed().at(group) or {}
        if group in SECTIONS:
            said = [comments_on(self.composer, group, name) for name in self.taken(group)]
            yield from knobs_of(group, node, {k: text for one in said for k, text in one.items()}, SECTIONS[group])
            return
        if group not in GROUPS:
            return
        for name in self.taken(group) if option is None else [option]:
            comments = comments_on(self.composer, group, name)
            for where, part in parts_of(group, node).items():
                own = where.partition(".")[2]
                if own and own not in _names_in(self.composer, group, name):
                    continue
                below = {path.removeprefix(f"{own}."): text for path, text in comments.items()} if own else comments
                yield from knobs_of(where, part, below, trust=self.composer.trust)

    def setting(self, key: str) -> Explained:
        group = first_key(key)
        if group not in SECTIONS and group not in GROUPS:
            raise ConfigError([f"`{short(key)}`: {group} has options and no settings; type cnnlab help {group}"])
        self._bring(group, key)
        knobs = list(self.knobs(group))
        below = tuple(k for k in knobs if k.key == key or k.key.startswith(f"{key}.") or key.startswith(f"{k.key}."))
        if not below:
            names = [k.key for k in knobs]
            hint = did_you_mean(key, names) or f"; it has: {listing(n.partition('.')[2] for n in names)}"
            raise ConfigError([f"`{short(key)}`: {group} has no {short(repr(key.partition('.')[2]))}{hint}"])
        return Explained(key, knobs=below)

    def _bring(self, group: str, key: str) -> None:
        """Takes the part of a list that a key is about: `augment.crop.padding` is explained without augment=[crop]."""
        name = key.split(".")[1]
        named = group in GROUPS and GROUPS[group].named
        if named and name in self.composer.options(group) and name not in (self.composed().at(group) or {}):
            self.chosen[group] = f"{group}=[{','.join([*self.taken(group), name])}]"


def _is_value(word: str) -> bool:
    """Whether a group is given a node rather than the name of an option."""
    return word.partition("=")[2].lstrip("'\"").startswith("{")


def _names_in(open_composer: Composer, group: str, option: str) -> set[str]:
    """The names of the parts that an option of a list stands for."""
    node = node_of(open_composer.text_of(group, option))
    others = [entry for entry in node.pop("defaults", []) if isinstance(entry, str) and entry != "_self_"]
    return {str(name) for name in node}.union(*(_names_in(open_composer, group, other) for other in others))


def _sets(group: str, node: Mapping[str, Any]) -> tuple[str, ...]:
    """What an option that holds no part says, each as the override that says the same."""
    prefix = f"{group}." if group in SECTIONS else ""
    lines = []
    for entry in node.get("defaults") or []:
        for key, value in entry.items() if isinstance(entry, Mapping) else ():
            lines.append(f"{re.split('@', key.removeprefix('override ').lstrip('/'))[0]}={as_typed(value)}")
    plain = {str(key): value for key, value in node.items() if key != "defaults"}
    return (*lines, *(f"{prefix}{key}={as_typed(value)}" for key, value in flatten(plain).items()))


# ---- on a terminal, and as JSON ----


def _lines(item: Explained, width: int) -> Iterator[str]:
    yield from _wrapped(item.title, width, 0)
    for line in item.text.splitlines():
        yield from _wrapped(line, width, 2) or [""]
    for name, text in (item.options or {}).items():
        yield from _wrapped(f"{name}: {text}" if text else name, width, 2, 6)
    if item.sets:
        yield "  sets"
        for line in item.sets:
            yield from _wrapped(_for_the_shell(line), width, 4, 6)
    for knob in item.knobs:
        yield from _wrapped(_for_the_shell(knob.typed), width, 2, 6)
        yield from _wrapped(knob.meaning, width, 6)
        if knob.takes:
            yield from _wrapped(f"takes {knob.takes}", width, 6)


def _wrapped(text: str, width: int, indent: int, further: int | None = None) -> list[str]:
    spaces = " " * indent
    return textwrap.wrap(
        one_line(text),
        width,
        initial_indent=spaces,
        subsequent_indent=" " * (indent if further is None else further),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _for_the_shell(line: str) -> str:
    return line if set(line) <= set("[]{},:=.%+-/_") | set(_WORDS) else shlex.quote(line)


_WORDS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


def _document(item: Explained) -> dict[str, Any]:
    knobs = [{"key": k.key, "value": k.value, "takes": k.takes, "meaning": k.meaning} for k in item.knobs]
    return {"title": item.title, "text": item.text, "options": item.options, "sets": list(item.sets), "settings": knobs}
