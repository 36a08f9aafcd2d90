"""What the surroundings of a process say, or fail to say: who started it, and where it stands."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cnnlab.errors import UsageError

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """This process among those that `torchrun` started."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


def torchrun(environment: Mapping[str, str] | None = None) -> Place:
    """The place that `torchrun` announces; alone, unless all that it sets is set and makes sense.

    A `RANK` or a `WORLD_SIZE` by itself is left over from elsewhere.
    """
    environment = os.environ if environment is None else environment
    if not all(environment.get(name) for name in _TORCHRUN):
        return Place()
    try:
        rank, world, local = (int(environment[name]) for name in _TORCHRUN[:3])
        place = Place(rank, world, local, int(environment.get("LOCAL_WORLD_SIZE") or 1))
    except ValueError:
        return Place()
    sensible = 0 <= place.local_rank <= place.rank < place.world and place.local_world >= 1
    return place if sensible else Place()


def left_over(environment: Mapping[str, str] | None = None) -> str | None:
    """A sentence on a `WORLD_SIZE` above 1 that counts for nothing, for who expected it to count."""
    environment = os.environ if environment is None else environment
    world = environment.get("WORLD_SIZE", "1")
    if world == "1" or torchrun(environment).world > 1:
        return None
    missing = [name for name in _TORCHRUN if not environment.get(name)]
    why = f"without {', '.join(missing)}" if missing else "with numbers that do not fit together"
    return f"WORLD_SIZE={world} {why} is no environment of torchrun: this process trains alone"


def import_safely() -> None:
    """Lets no Python that is started from here on, by whomever, import from the current folder first: compilers,
    launchers and `multiprocessing` start theirs with `-c`, `-m` or a script, and not with `-P`."""
    os.environ.setdefault("PYTHONSAFEPATH", "1")


def here() -> Path | None:
    """The current folder; `None` where it was removed."""
    try:
        return Path.cwd()
    except OSError:
        return None


def require_folder() -> None:
    """Raises `UsageError` if the current folder was removed: paths mean nothing there, and MKL ends the process."""
    if here() is None:
        raise UsageError(f"the current folder {os.environ.get('PWD', '')} was removed; type cd FOLDER first")


def shown_path(path: str | Path) -> str:
    """The path for a person: relative to the current folder where it lies inside."""
    path, folder = Path(path), here()
    return str(path.relative_to(folder) if folder and path.is_relative_to(folder) else path)
