"""Hydra's private names, all of them, so that a new Hydra is one file's matter.

Hydra's public way in is a decorator around one `main` with one primary config; a command line of several verbs that
reports every problem at once, and checks all cells of a sweep before the first one starts, has to call what is below.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any

from hydra import version
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from omegaconf import OmegaConf

from cnnlab.errors import UsageError
from cnnlab.usertext import read_text

__all__ = ["BASIC_SWEEPER", "Callbacks", "Hydra", "get_args_parser", "open_hydra"]

VERSION_BASE = "1.3"
BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


class UserFiles(FileConfigSource):
    """Hydra's folders of YAML files, read as people save them: with a byte-order mark Hydra misses `@package`."""

    def load_config(self, config_path: str) -> ConfigResult:
        path = os.path.realpath(os.path.join(self.path, self._normalize_file_name(config_path)))  # noqa: PTH118
        if not os.path.exists(path):  # noqa: PTH110 (as Hydra has it: its messages name these paths)
            raise ConfigLoadError(f"Config not found : {path}")
        text = read_text(path, UsageError)
        stream = io.StringIO(text)
        stream.name = path  # type: ignore[attr-defined]  # what YAML's messages call it
        return ConfigResult(
            config=OmegaConf.load(stream),
            path=self.full_path(),
            provider=self.provider,
            header=ConfigSource._get_header_dict(text[:512]),
        )


def open_hydra(root: str, config_dirs: Sequence[str]) -> Hydra:
    """Hydra over the shipped configs in `root`, and then the user's own folders."""
    version.setbase(VERSION_BASE)
    Plugins.instance()  # registers Hydra's own sources
    SourcesRegistry.instance().types[UserFiles.scheme()] = UserFiles
    search_path: Any = create_config_search_path(root)
    assert isinstance(search_path, ConfigSearchPathImpl)
    for folder in config_dirs:
        last = SearchPathQuery(provider="schema")  # after the shipped configs, as Hydra's own --config-dir
        search_path.prepend(provider="command-line", path=f"file://{folder}", anchor=last)
    return Hydra("cnnlab", ConfigLoaderImpl(search_path))
