"""What Hydra's launcher makes of its settings, and what it hands over, a cell at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from cnnlab.composing.composer import Composed, options_taken
from cnnlab.composing.signature import check_part
from cnnlab.composing.trust import targets_of
from cnnlab.errors import ConfigError


def require_hydras_parts(hydra: DictConfig) -> None:
    """Hydra makes its launcher and its callbacks, and whatever has a `_target_` inside them.

    Raises `ConfigError` for a callback that is none, and for parts inside of either.
    """
    plain: Any = OmegaConf.to_container(hydra, resolve=False)
    problems: list[str] = []
    inside = dict(targets_of(plain["launcher"], "hydra.launcher"))
    inside.pop("hydra.launcher", None)
    for name, node in (plain.get("callbacks") or {}).items():
        where = f"hydra.callbacks.{name}"
        inside |= {path: target for path, target in targets_of(node, where) if path != where}
        problems += check_part(node, where, (), (Callback,))
    problems += [f"`{path}._target_={target}`: no part may stand here" for path, target in inside.items()]
    if problems:
        raise ConfigError(problems)


def handed_over(config: DictConfig, config_dirs: Sequence[str]) -> Composed:
    """The cell whose config a launcher calls with, in whatever process."""
    hydra = HydraConfig.get()
    plain: Any = OmegaConf.to_container(config, resolve=True)
    own = tuple(hydra.overrides.task)
    return Composed(plain, Path(hydra.runtime.output_dir), options_taken(hydra), own, tuple(config_dirs))
