"""From command-line overrides to a composed config, with every problem found on the way reported at once.

Hydra composes; it stops at the first wrong override, though, so the overrides are looked at one by one before
it sees them. What the composed values mean to the parts they configure is checked in `cnnlab.check`.
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cnnlab.errors import ConfigError, UsageError, did_you_mean, listing

CONFIG_NAME = "config"


def config_root() -> Path:
    """The folder of the shipped configs: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / f"{CONFIG_NAME}.yaml").is_file():
            return folder
    raise UsageError(f"expected the shipped configs beside {package}; reinstall cnnlab")


@dataclass(frozen=True)
class Composed:
    """A composed experiment.

    `config` holds plain values with all interpolations resolved; `run_dir` is where Hydra's settings put the
    run; `choices` maps each group to the option taken; `overrides` are the command line's.
    """

    config: dict[str, Any]
    run_dir: Path
    choices: dict[str, Any]
    overrides: tuple[str, ...]


def _stamp() -> str:
    return f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{secrets.token_hex(2)}"


def _name(_root_: Any) -> str:
    from hydra.core.hydra_config import HydraConfig

    hydra = _root_.get("hydra")
    choices = hydra.runtime.choices if hydra is not None else HydraConfig.get().runtime.choices
    return choices.get("experiment") or f"{choices.get('data')}-{choices.get('model')}"


def register_resolvers() -> None:
    """Names used in `configs/`: `${cnnlab.stamp:}` (time and a random id) and `${cnnlab.name:}`."""
    OmegaConf.register_new_resolver("cnnlab.stamp", _stamp, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("cnnlab.name", _name, replace=True)


def make_importable(config_dirs: Sequence[Path]) -> None:
    """Lets `_target_` name the user's own modules: beside their YAML folders, or in the current folder."""
    for folder in [*map(Path, config_dirs), Path.cwd()]:
        entry = str(folder.resolve())
        if entry not in sys.path:
            sys.path.append(entry)


class Composer:
    """Composes configs of `configs/` and of the user's own folders; use inside `composer(...)`."""

    def __init__(self, hydra: Any, search_path: list[str]):
        self._hydra = hydra
        self._loader = hydra.config_loader
        self._search_path = search_path

    def options(self, group: str) -> list[str]:
        """The names that `GROUP=` takes."""
        return [str(option) for option in self._loader.get_group_options(group)]

    def groups(self) -> list[str]:
        names = (self._loader.list_groups(""), ["probe"])
        return sorted({name for part in names for name in part if name != "hydra" and self.options(name)})

    def _load(self, overrides: Sequence[str]) -> DictConfig:
        return self._hydra.compose_config(
            config_name=CONFIG_NAME,
            overrides=[*self._search_path, *overrides],
            run_mode=_run_mode(),
            from_shell=False,
            with_log_configuration=False,
        )

    def expand(self, overrides: Sequence[str]) -> list[list[str]]:
        """Every cell of a sweep as its own list of overrides, in Hydra's order; one cell without sweeps."""
        choices = []
        for override in self._parse(overrides):
            if override.is_sweep_override():
                key = override.get_key_element()
                choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
            else:
                choices.append([override.input_line])
        return [list(cell) for cell in product(*choices)]

    def _parse(self, overrides: Sequence[str]) -> list[Any]:
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from hydra.errors import HydraException

        parser = OverridesParser.create()
        parsed, problems = [], []
        for text in overrides:
            try:
                parsed.append(parser.parse_override(text))
            except HydraException as error:
                reason = str(error.__cause__ or error).strip().splitlines()[0]
                problems.append(f"`{text}`: expected KEY=VALUE, received text that does not parse ({reason})")
        if problems:
            raise ConfigError(problems)
        return parsed

    def compose(self, overrides: Sequence[str] = ()) -> Composed:
        """Composes one experiment. Raises `ConfigError` with all unknown groups, options and keys."""
        from hydra.errors import HydraException

        parsed = self._parse(overrides)
        groups = set(self.groups())
        is_group = [override.key_or_group in groups for override in parsed]
        problems = [
            problem
            for override, group in zip(parsed, is_group, strict=True)
            if group and not _is_plain_value(override)
            for problem in self._check_option(override)
        ]
        good = [o.input_line for o, group in zip(parsed, is_group, strict=True) if group]
        if problems:
            good = []  # the keys can still be looked at, in the default composition
        try:
            base = self._load(good)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError([_reason(error)]) from error
        values = [o for o, group in zip(parsed, is_group, strict=True) if not group]
        for override in values:
            problems += self._check_key(override, base, sorted(groups), certain=not problems)
        if problems:
            raise ConfigError(problems)
        try:
            composed = self._load([*good, *(override.input_line for override in values)])
            return self._resolved(composed, overrides)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError([_reason(error)]) from error

    def _resolved(self, composed: DictConfig, overrides: Sequence[str]) -> Composed:
        choices = dict(composed.hydra.runtime.choices)
        run_dir = Path(composed.hydra.run.dir)
        config = {str(key): _plain(composed, key) for key in composed if key != "hydra"}
        return Composed(config, run_dir, choices, tuple(overrides))

    def _check_option(self, override: Any) -> list[str]:
        group = override.key_or_group
        known = self.options(group)
        value = override.value()
        names = value if isinstance(value, list) else [value]
        problems = []
        for name in names:
            text = "null" if name is None else str(name)
            if text == "null" or text in known or override.is_delete():
                continue
            problems.append(
                f"`{group}={text}`: {group} has no option {text!r}{did_you_mean(text, known)}; "
                f"its options: {listing(known)}"
            )
        return problems

    def _check_key(self, override: Any, base: DictConfig, groups: list[str], *, certain: bool) -> list[str]:
        if override.is_add() or override.is_force_add() or override.is_hydra_override():
            return []
        key = override.key_or_group
        node: Any = base
        for depth, part in enumerate(parts := key.split(".")):
            known = [str(name) for name in node] if isinstance(node, DictConfig) else []
            if isinstance(node, DictConfig) and part in node:
                node = node._get_node(part)
                continue
            if not certain and depth > 0 and parts[0] in groups:
                return []  # the group's own option was wrong, so its keys are unknown
            where = ".".join(parts[:depth])
            if depth == 0:
                known = [*known, *groups]
                return [f"`{key}`: no such key or group{did_you_mean(part, known)}; known: {listing(known)}"]
            return [
                f"`{key}`: {where} has no {part!r}{_meant(where, part, known)}; "
                f"it has: {listing(name for name in known if not name.startswith('_'))}"
            ]
        return []


def _meant(where: str, part: str, known: Sequence[str]) -> str:
    return did_you_mean(part, known).replace("`" + part, "`" + where) if known else ""


def _is_plain_value(override: Any) -> bool:
    """`augment={...}` sets a group's node outright."""
    return isinstance(override.value(), dict)


def _reason(error: BaseException) -> str:
    """Hydra's message and the useful one that it hides in `__cause__`, as one line."""
    texts = [str(error)]
    if error.__cause__ is not None:
        texts.append(str(error.__cause__))
    lines = [line.strip() for text in texts for line in text.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line and not line.startswith(("full_key", "object_type"))))


def _plain(config: DictConfig, key: Any) -> Any:
    """A top-level value with its interpolations resolved; a mandatory one that is missing stays `???`."""
    if OmegaConf.is_missing(config, key):
        return "???"
    value = config[key]
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _run_mode() -> Any:
    from hydra.types import RunMode

    return RunMode.RUN


@contextmanager
def composer(config_dirs: Sequence[str | Path] = ()):
    """A `Composer` over the shipped configs and `config_dirs` (which come first)."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    register_resolvers()
    folders = [Path(folder).resolve() for folder in config_dirs]
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"--config-dir: expected a folder, received {folder}, which does not exist")
    make_importable(folders)
    listed = ",".join(f"file://{folder}" for folder in folders)
    search = [f"hydra.searchpath=[{listed}]"] if folders else []
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(config_root()), version_base="1.3", job_name="cnnlab"):
        yield Composer(GlobalHydra.instance().hydra, search)


def compose(overrides: Sequence[str] = (), config_dirs: Sequence[str | Path] = ()) -> Composed:
    """Composes one experiment, as `cnnlab train OVERRIDES...` does.

    Raises:
        ConfigError: with every unknown group, option and key.
    """
    with composer(config_dirs) as open_composer:
        return open_composer.compose(overrides)
