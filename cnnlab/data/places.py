"""The folder of the cache, on whatever machine."""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from functools import cache as cache_once
from pathlib import Path

from cnnlab.errors import DataError

_log = logging.getLogger(__name__)


def cache_folder(cache: str | None) -> Path:
    """`cache`, else `$CNNLAB_CACHE`, else `~/.cache/cnnlab`; a folder in the temporary one for who has no home.

    Creates nothing but the latter.

    Raises:
        DataError: it begins with the `~` of a user that does not exist.
    """
    named = cache or os.environ.get("CNNLAB_CACHE")
    try:
        return Path(named or "~/.cache/cnnlab").expanduser()
    except RuntimeError as error:  # no $HOME, and a user without an entry
        if named is not None:
            raise DataError(f"expected a folder for the cache, received {named}: {error}; name it in full") from error
        return _without_a_home()


def known_cache() -> Path | None:
    """`cache_folder(None)` to look something up in; `None`, without a word, for who has no home and no cache yet."""
    try:
        return Path(os.environ.get("CNNLAB_CACHE") or "~/.cache/cnnlab").expanduser()
    except RuntimeError:
        folder = _homeless()
        return folder if folder.is_dir() and _is_ours(folder) else None


def _homeless() -> Path:
    return Path(tempfile.gettempdir()) / f"cnnlab-{os.getuid()}"


def _is_ours(folder: Path) -> bool:
    """Whether nobody else writes there."""
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022


@cache_once
def _without_a_home() -> Path:
    folder = _homeless()
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if not _is_ours(folder):
            folder = Path(tempfile.mkdtemp(prefix="cnnlab-"))  # somebody else's: compiled code lies in it, too
    except OSError as error:
        raise DataError(f"expected a home or a temporary folder for the cache, received: {error}") from error
    _log.warning("there is no home folder: the cache is in %s; set CNNLAB_CACHE to put it elsewhere", folder)
    return folder
