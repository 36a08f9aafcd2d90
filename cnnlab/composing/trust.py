"""What a config may name: one that was typed here, and one that came with a run folder.

A `_target_` is code that runs. What a user types, or keeps in a folder that he names as `--config-dir`, is his to
choose; a run folder may be somebody else's, so what it names is looked at before anything of it is imported.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cnnlab.composing.kinds import STANDARD, defined_in, is_part, root_of
from cnnlab.errors import UsageError, short

PACKAGES = ("cnnlab", "torch", "torchvision", "timm", "pytorch_optimizer")
"""What a run folder may name unasked."""
PARTS_IN = (
    "cnnlab",
    "torch.nn",
    "torch.optim",
    "torchvision.models",
    "torchvision.ops",
    "timm.models",
    "timm.layers",
    "timm.optim",
    "timm.loss",
    "pytorch_optimizer",
)
"""Where what it names must be defined: the packages also reach files, processes, the network (`torch.hub.load`)."""
READS_FILES = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "file")
"""Parameters by which timm's functions unpickle or fetch a file of the caller's choice."""


@dataclass(frozen=True)
class Trust:
    """Who wrote a config, and what the command line vouches for.

    `stored`: it came with a run folder. `names` are the packages or modules of `--trust`, and `folders` those of
    `--config-dir`.
    """

    names: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    stored: bool = False

    @classmethod
    def of(cls, names: Sequence[str] = (), folders: Sequence[str | Path] = ()) -> Trust:
        """What `--trust NAME` and `--config-dir DIR` vouch for. Raises `UsageError` for a folder that is none."""
        found = [Path(folder).expanduser().resolve() for folder in folders]
        for folder in found:
            if not folder.is_dir():
                raise UsageError(f"--config-dir: expected a folder, received {folder}, which is none")
        for name in names:
            if not all(part.isidentifier() for part in name.split(".")):
                raise UsageError(f"--trust: expected the name of a package or module, received {name!r}")
        return cls(tuple(names), tuple(map(str, found)))

    def of_a_run(self) -> Trust:
        return replace(self, stored=True)

    def vouches(self, target: Any) -> bool:
        """Whether a class or function is the user's own, or of a package that he named."""
        module = defined_in(target) or str(getattr(target, "__module__", ""))
        return self._is_named(module) or (bool(module) and self._in_folders(module))

    def refuses_name(self, name: str) -> str | None:
        """Why a config may not name this, told without importing it; or `None`."""
        if not self.stored or root_of(name) in PACKAGES or self._is_named(name) or self._in_folders(root_of(name)):
            return None
        return f"a run folder may name {', '.join(PACKAGES)}, and what this command line vouches for"

    def refuses(self, target: Any, node: Mapping[str, Any]) -> str | None:
        """Why a config may not use this class or function, or `None`."""
        if not self.stored or self.vouches(target):
            return None
        module = defined_in(target)
        if not any(_is_below(module, package) for package in PARTS_IN):
            where = f"one of {module}" if module else "something else"
            return f"a run folder may name classes and functions of {', '.join(PARTS_IN)}; this is {where}"
        if root_of(module) == "timm":
            given = [key for key, value in node.items() if key in READS_FILES and value]
            given += [key for key, value in node.items() if isinstance(value, str) and ":" in value]
            if given:
                return f"a run folder may not name files or places for timm to read: {', '.join(dict.fromkeys(given))}"
        return None

    def require(self, config: Mapping[str, Any], known: tuple[str, ...] = ()) -> None:
        """Looks at all names of a stored config before anything is imported.

        Args:
            known: the folders in which the run says that its parts were.

        Raises:
            UsageError: the config names what it may not, with all the names, and how to vouch for them.
        """
        named = {name: place for place, name in targets_of(config) if self.refuses_name(name)}
        if not named:
            return
        flags = list(dict.fromkeys(_flag(name, known) for name in named))
        listed = ", ".join(f"{short(name)} ({place})" for name, place in named.items())
        if own := [
            name for name in named if root_of(name) in STANDARD or not all(map(str.isidentifier, name.split(".")))
        ]:
            raise UsageError(
                f"this run names code that is neither cnnlab's nor a part of another package: {listed}. It is not "
                f"opened: nothing on a command line vouches for {', '.join(map(short, own))}"
            )
        raise UsageError(
            f"this run names code that is neither cnnlab's nor one of {', '.join(PACKAGES[1:])}: {listed}. Opening it "
            f"runs that code: if you trust it, type {' '.join(flags)}"
        )

    def _is_named(self, module: str) -> bool:
        return any(_is_below(module, name) for name in self.names)

    def _in_folders(self, module: str) -> bool:
        """Whether importing the root of `module` takes it from one of the user's folders."""
        if not self.folders:
            return False
        origin = None
        loaded = sys.modules.get(root_of(module))
        if loaded is not None:
            origin = getattr(loaded, "__file__", None) or next(iter(getattr(loaded, "__path__", [])), None)
        else:
            with suppress(ImportError, ValueError, AttributeError):
                spec = importlib.util.find_spec(root_of(module))
                places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
                origin = next((place for place in places if place), None)
        return origin is not None and any(Path(origin).resolve().is_relative_to(folder) for folder in self.folders)


TYPED = Trust()
"""A config that was typed here, with nothing vouched for."""


def targets_of(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Each `_target_` anywhere in a config, with its path."""
    if is_part(node) and node["_target_"] is not None:
        yield path, str(node["_target_"])
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list | tuple) else ()
    for key, value in items:
        yield from targets_of(value, f"{path}.{key}" if path else str(key))


def _is_below(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _flag(name: str, known: tuple[str, ...]) -> str:
    """How to vouch for a name: the folder where the run says its file is, or the package."""
    root = root_of(name)
    for folder in known:
        with suppress(OSError):
            if (Path(folder) / f"{root}.py").is_file() or (Path(folder) / root).is_dir():
                return f"--config-dir {folder}"
    return f"--trust {root}"
