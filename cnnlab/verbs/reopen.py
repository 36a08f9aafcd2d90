"""A run folder as the experiment that it holds, for the verbs that read runs."""

from __future__ import annotations

from collections.abc import Sequence

from cnnlab.config import Composed, make_importable
from cnnlab.rundir import RunDir


def reopened(folder: RunDir, config_dirs: Sequence[str] = ()) -> Composed:
    """The experiment of a run folder, with the user's own modules importable again.

    Args:
        config_dirs: where these are now, if they have moved since.

    Raises:
        UsageError: this is no run folder.
        CheckpointError: its files are damaged.
    """
    config, record = folder.config(), folder.read()
    known = tuple(dict.fromkeys([*config_dirs, *record.get("config_dirs", [])]))
    make_importable(known)
    return Composed(config, folder.path, record.get("choices", {}), tuple(folder.overrides()), known)
