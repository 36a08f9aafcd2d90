"""A run folder as the experiment that it holds, for the verbs that read runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cnnlab.building.trial import read
from cnnlab.composing.composer import Composed, make_importable
from cnnlab.composing.experiment import Experiment
from cnnlab.composing.trust import TYPED, Trust
from cnnlab.errors import CheckpointError, ConfigError
from cnnlab.machine.surroundings import here
from cnnlab.runs.folder import RunDir


def reopened(folder: RunDir, trust: Trust = TYPED) -> Experiment:
    """The experiment of a run folder, whoever wrote it: what it names is looked at before any of it is imported.

    Args:
        trust: what the command line vouches for; the folders in it are importable from here on, and so is the
            current folder, if there are names in it. Folders that only the run names are not.

    Raises:
        UsageError: this is no run folder, or it names code that nobody vouches for.
        CheckpointError: its files are damaged, or hold what no run has.
    """
    record = folder.read()
    return stored_experiment(
        folder.config(),
        folder.config_file,
        choices=record.get("choices", {}),
        overrides=tuple(folder.overrides()),
        recorded=tuple(map(str, record.get("config_dirs", []))),
        run_dir=folder.path,
        trust=trust,
    )


def stored_experiment(
    config: dict[str, Any],
    where: Path,
    *,
    choices: dict[str, Any],
    overrides: tuple[str, ...],
    recorded: tuple[str, ...],
    run_dir: Path,
    trust: Trust,
) -> Experiment:
    """`reopened` of a config that was read from the file `where`.

    Args:
        recorded: the folders in which the run says that its parts were.
    """
    trust = trust.of_a_run()
    make_importable([*trust.folders, *([here()] if trust.names else [])])
    trust.require(config, recorded)
    known = tuple(dict.fromkeys([*trust.folders, *recorded]))
    try:
        return read(Composed(config, run_dir, choices, overrides, known, trust=trust))
    except ConfigError as error:
        if all("._target_=" in problem for problem in error.problems):  # a part that is not there to be imported
            raise
        raise CheckpointError(
            f"{where} is no config that this version of cnnlab has written (it is damaged, or of another "
            "version):\n  " + "\n  ".join(error.problems)
        ) from error
