"""A run folder as the experiment that it holds, for the verbs that read runs."""

from __future__ import annotations

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
    config, record, trust = folder.config(), folder.read(), trust.of_a_run()
    recorded = tuple(map(str, record.get("config_dirs", [])))
    make_importable([*trust.folders, *([here()] if trust.names else [])])
    trust.require(config, recorded)
    known = tuple(dict.fromkeys([*trust.folders, *recorded]))
    overrides = tuple(folder.overrides())
    try:
        return read(Composed(config, folder.path, record.get("choices", {}), overrides, known, trust=trust))
    except ConfigError as error:
        if all("._target_=" in problem for problem in error.problems):  # a part that is not there to be imported
            raise
        raise CheckpointError(
            f"{folder.config_file} is no config that this version of cnnlab has written (it is damaged, or of another "
            "version):\n  " + "\n  ".join(error.problems)
        ) from error
