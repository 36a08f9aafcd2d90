"""From command-line overrides to a composed config, with every problem found on the way reported at once.

Hydra composes. It stops at the first wrong override, though; so when it refuses, the overrides are looked at
one by one. What the composed values mean to the parts that they configure is checked in `cnnlab.composing.signature`.
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from cnnlab.composing.hydra_private import open_hydra
from cnnlab.composing.overrides import (
    LISTS,
    as_text,
    first_key,
    is_choice,
    is_for_hydra,
    is_path,
    is_plain,
    line,
    misuse,
    quoted,
    reason,
    repeated,
    swept,
    wrong_key,
    wrong_option,
)
from cnnlab.composing.trust import TYPED, Trust
from cnnlab.errors import ConfigError, UsageError, short
from cnnlab.machine.surroundings import here
from cnnlab.usertext import read_text

CONFIG_NAME = "config"


def config_root() -> Path:
    """The folder of the shipped configs: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / f"{CONFIG_NAME}.yaml").is_file():
            return folder
    raise UsageError(f"expected the shipped configs beside {package}; reinstall cnnlab")


@dataclass(frozen=True)
class Composed:
    """A composed experiment.

    `config` holds plain values with all interpolations resolved; `run_dir` is where Hydra's settings put the
    run, and `sweep_dir` the sweep that it is a cell of; `choices` maps each group to the option taken;
    `overrides` are the command line's without Hydra's; `config_dirs` are the user's own folders; `trust` says who
    wrote the config and what the command line vouches for.
    """

    config: dict[str, Any]
    run_dir: Path
    choices: dict[str, Any]
    overrides: tuple[str, ...]
    config_dirs: tuple[str, ...] = ()
    sweep_dir: Path | None = None
    trust: Trust = TYPED

    def at(self, key: str) -> Any:
        """The plain value at a dotted key, `None` where there is none: for who shows a config, or compares two."""
        found: Any = self.config
        for name in key.split("."):
            found = found.get(name) if isinstance(found, Mapping) else None
        return found

    def has(self, key: str) -> bool:
        """Whether the config has something at a dotted key, be it null."""
        where, _, name = key.rpartition(".")
        inside = self.at(where) if where else self.config
        return isinstance(inside, Mapping) and name in inside


@dataclass(frozen=True)
class Draft:
    """What could be composed, and what could not.

    `problems` has one sentence a wrong override. Those are left out of `composed` (`None` where nothing composes).
    """

    composed: Composed | None
    problems: tuple[str, ...] = ()


def _stamp() -> str:
    return f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{secrets.token_hex(2)}"


def _name(_root_: Any) -> str:
    hydra = _root_.get("hydra")
    choices = hydra.runtime.choices if hydra is not None else HydraConfig.get().runtime.choices
    return choices.get("experiment") or f"{choices.get('data')}-{choices.get('model')}"


# Names used in `configs/`, there as soon as this module is: a launcher's processes import it and no more.
OmegaConf.register_new_resolver("cnnlab.stamp", _stamp, use_cache=True, replace=True)
OmegaConf.register_new_resolver("cnnlab.name", _name, replace=True)


def make_importable(folders: Iterable[str | Path | None]) -> None:
    """Lets `_target_` name the user's own modules, after all that is installed; there is nothing in `None`."""
    for folder in folders:
        if folder is None:
            continue
        entry = str(Path(folder).resolve())
        if entry not in sys.path:
            sys.path.append(entry)


class _Refused(Exception):
    """Hydra would not compose. The cause is in `__cause__`, the message fit for the user."""


class Composer:
    """Composes configs of `configs/` and of the user's own folders.

    Raises `UsageError` for a folder that does not exist.
    """

    def __init__(
        self, config_dirs: Sequence[str | Path] = (), config_name: str = CONFIG_NAME, trusted: Sequence[str] = ()
    ):
        self.config_name = config_name
        self.trust = Trust.of(trusted, config_dirs)
        self.config_dirs = self.trust.folders
        make_importable(self.config_dirs)
        self.hydra = open_hydra(str(config_root()), self.config_dirs)
        self._options: dict[str, list[str]] = {}

    # ---- what there is ----

    def options(self, group: str) -> list[str]:
        """The names that `GROUP=` takes."""
        if group not in self._options:
            self._options[group] = [str(option) for option in self.hydra.config_loader.get_group_options(group)]
        return [*self._options[group]]

    def groups(self) -> list[str]:
        return [name for name in self._folders if self.options(name)]

    def text_of(self, group: str, option: str) -> str:
        """The YAML of an option, comments and all; of the primary config where there is no group. Empty where the
        option is no file of ours or of the user's."""
        folders = [config_root(), *map(Path, self.config_dirs)]
        found = (folder / group / f"{option}.yaml" for folder in folders)
        return next((read_text(path, UsageError) for path in found if path.is_file()), "")

    @cached_property
    def _folders(self) -> list[str]:
        return sorted(str(name) for name in self.hydra.config_loader.list_groups("") if name != "hydra")

    # ---- overrides ----

    def parse(self, overrides: Sequence[str]) -> list[Override]:
        """Raises `ConfigError` with every override that does not parse."""
        parsed, problems = self._parsed(overrides)
        if problems:
            raise ConfigError(problems)
        return parsed

    def _parsed(self, overrides: Sequence[str]) -> tuple[list[Override], list[str]]:
        parser = OverridesParser.create(config_loader=self.hydra.config_loader)
        parsed, problems = [], []
        for text in overrides:
            try:
                override = _override(parser, text)
                if is_plain(override) and override.value() is None and override.key_or_group in self._folders:
                    (override,) = parser.parse_overrides([f"~{override.get_key_element()}"])  # Hydra's way to say so
                parsed.append(override)
            except Exception:  # the grammar's message counts tokens; a number too long for int() is a ValueError
                problems.append(self._unreadable(text))
        return parsed, problems

    def _unreadable(self, text: str) -> str:
        if "=" in text:
            remedy = f"for a text with special characters, quote it twice: {quoted(text)}"
            return f"`{short(text)}`: cannot be read; {remedy}"
        meant = [f"`{group}={text}`" for group in self._folders if text in self.options(group)]
        return f"`{short(text)}`: expected KEY=VALUE" + (f" (did you mean {' or '.join(meant)}?)" if meant else "")

    def lines(self, overrides: Sequence[str]) -> list[str]:
        """The overrides as Hydra takes them (`experiment=null` is `~experiment`). Raises `ConfigError`."""
        return [line(override) for override in self.parse(overrides)]

    def cells(self, overrides: Sequence[str]) -> list[list[str]]:
        """Every cell of a sweep as its own list of overrides, in Hydra's order; one cell without sweeps.

        A sweep may also be stated in a config, as `hydra.sweeper.params`. Raises `ConfigError`.
        """
        parsed = self.parse(overrides)
        twice = [
            f"`{key}`: given {len(lines)} times ({', '.join(map(short, lines))}), and a sweep takes one; "
            f"type {key}=A,B,C for several values"
            for key, lines in repeated(parsed).items()
        ]
        if twice:
            raise ConfigError(twice)
        given = {override.get_key_element(): override for override in parsed}
        stated = self.parse([f"{key}={value}" for key, value in self._sweeper_params(given.values()).items()])
        choices, problems = [], []
        for override in ({o.get_key_element(): o for o in stated} | given).values():
            values = swept(override) if override.is_sweep_override() else [line(override)]
            choices.append(values)
            if not values:
                key = override.get_key_element()
                problems.append(f"`{short(line(override))}`: expected values to list; type {key}=A,B,C")
        if problems:
            raise ConfigError(problems)
        return [list(cell) for cell in product(*choices)]

    def _sweeper_params(self, given: Iterable[Override]) -> Mapping[str, Any]:
        fixed = [line(override) for override in given if not override.is_sweep_override()]
        try:
            return self.load(fixed, RunMode.MULTIRUN).hydra.sweeper.get("params") or {}
        except _Refused:  # each cell will say why
            return {}

    # ---- composing ----

    def compose(self, overrides: Sequence[str] = (), number: int | None = None) -> Composed:
        """Composes one experiment, or cell `number` of a sweep. Raises `ConfigError` with every problem."""
        draft = self.draft(overrides, number)
        if draft.problems:
            raise ConfigError(draft.problems)
        assert draft.composed is not None
        return draft.composed

    def draft(self, overrides: Sequence[str] = (), number: int | None = None) -> Draft:
        """Composes what can be composed, and tells what cannot. Parts may lie in the current folder, too."""
        make_importable([here()])
        parsed, problems = self._parsed(overrides)
        misused = {line(o): problem for o in parsed if (problem := misuse(o, self._folders))}
        kept = [override for override in parsed if line(override) not in misused]
        problems += misused.values()
        try:
            loaded = self._composed(kept)
        except _Refused:
            try:
                kept, loaded, more = self._sorted_out(kept)
                problems += more
            except _Refused as refusal:  # not even the defaults compose
                return Draft(None, (*problems, str(refusal)))
        try:
            composed = self._resolved(loaded, overrides, number)
        except Exception as error:  # where a cell goes, hydra.sweep, may have an interpolation of its own
            return Draft(None, (*problems, f"hydra.sweep: {reason(error)}"))
        return Draft(composed, tuple(problems))

    def load(self, overrides: Iterable[str], mode: RunMode = RunMode.RUN) -> DictConfig:
        """Hydra's composition, not resolved. Raises `_Refused`."""
        try:
            return self.hydra.compose_config(
                config_name=self.config_name, overrides=list(overrides), run_mode=mode, from_shell=False
            )
        except Exception as error:  # Hydra's own, OmegaConf's, YAML's, a file's encoding, ...
            raise _Refused(reason(error)) from error

    def _composed(self, parsed: Iterable[Override]) -> DictConfig:
        """Hydra's composition, all of whose interpolations resolve. Raises `_Refused`."""
        loaded = self.load(map(line, parsed))
        try:
            self._resolved(loaded, (), None)
        except Exception as error:  # an interpolation, or a resolver's own error
            raise _Refused(reason(error)) from error
        return loaded

    def _resolved(self, loaded: DictConfig, overrides: Sequence[str], number: int | None) -> Composed:
        config = {str(key): _plain(loaded, key) for key in loaded if key != "hydra"}
        hydra = loaded.hydra
        if number is None:
            run_dir, sweep_dir = Path(str(hydra.run.dir)), None
        else:
            with open_dict(hydra.job):
                hydra.job.num = hydra.job.id = number
            sweep_dir = Path(str(hydra.sweep.dir))
            run_dir = sweep_dir / str(hydra.sweep.subdir)
        own = tuple(text for text in overrides if not is_for_hydra(text))
        return Composed(config, run_dir, options_taken(hydra), own, self.config_dirs, sweep_dir, self.trust)

    # ---- when Hydra refuses: which override, and what was meant ----

    def _sorted_out(self, parsed: Sequence[Override]) -> tuple[list[Override], DictConfig, list[str]]:
        """The overrides that compose, what they compose to, and what is wrong with each of the others."""
        groups = {*self._folders, *options_taken(self._defaults.hydra)}
        problems: list[str] = []
        kept: list[Override] = []

        chosen = [override for override in parsed if is_choice(override, groups)]
        for override in chosen:
            if problem := self._wrong_option(override):
                problems.append(problem)
            else:
                kept.append(override)
        kept, base, refusals = self._one_by_one(kept)
        problems += refusals
        unknown = {o.key_or_group for o in chosen} - {o.key_or_group for o in kept}
        config: Any = OmegaConf.to_container(base)
        for override in parsed:
            if override in chosen or first_key(override.key_or_group) in unknown:
                continue  # the keys of a group whose option is not known cannot be told
            problem = self._wrong_option(override) or wrong_key(override, config, options_taken(base.hydra), groups)
            if problem:
                problems.append(problem + self._remedy(override, config))
            else:
                kept.append(override)
        kept, loaded, refusals = self._one_by_one(kept)
        return kept, loaded, [*problems, *refusals]

    @cached_property
    def _defaults(self) -> DictConfig:
        return self._composed([])

    def _one_by_one(self, parsed: Sequence[Override]) -> tuple[list[Override], DictConfig, list[str]]:
        """The overrides that compose together, what they compose to, and why the others do not."""
        if not parsed:
            return [], self._defaults, []
        try:
            return list(parsed), self._composed(parsed), []
        except _Refused:
            pass
        kept: list[Override] = []
        composed, refusals = self._defaults, []
        for override in parsed:
            try:
                composed = self._composed([*kept, override])
                kept.append(override)
            except _Refused as refusal:
                refusals.append(f"`{short(line(override))}`: {refusal}")
        return kept, composed, refusals

    def _wrong_option(self, override: Override) -> str | None:
        group = override.key_or_group
        named = group in self._folders or group.startswith("hydra/")
        return wrong_option(override, self.options(group)) if named and is_choice(override, [group]) else None

    def _remedy(self, override: Override, config: Mapping[str, Any]) -> str:
        """For a part that is not among those taken: how to take it."""
        group, name, *_ = [*override.key_or_group.split("."), ""]
        absent = group in LISTS and name in self.options(group) and name not in config[group]
        return f"; to have it, type {group}=[{name}]" if absent else ""


def _override(parser: OverridesParser, text: str) -> Override:
    """What a text overrides; a path needs no quotes for Hydra's grammar."""
    try:
        (override,) = parser.parse_overrides([text])
    except Exception:  # see `Composer._parsed`
        if not is_path(text):
            raise
        (override,) = parser.parse_overrides([as_text(text)])
    return override


def options_taken(hydra: Any) -> dict[str, Any]:
    """The option taken of each group, Hydra's own groups left out."""
    return {str(group): option for group, option in hydra.runtime.choices.items() if "/" not in str(group)}


def _plain(config: DictConfig, key: Any) -> Any:
    """A top-level value with its interpolations resolved; a mandatory one that is missing stays `???`."""
    if OmegaConf.is_missing(config, key):
        return "???"
    value = config[key]
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


@contextmanager
def composer(
    config_dirs: Sequence[str | Path] = (), config_name: str = CONFIG_NAME, trusted: Sequence[str] = ()
) -> Iterator[Composer]:
    """A `Composer`; Hydra's process-wide config is put back after the block."""
    settings = HydraConfig.instance()
    kept = settings.cfg
    try:
        yield Composer(config_dirs, config_name, trusted)
    finally:
        settings.cfg = kept
