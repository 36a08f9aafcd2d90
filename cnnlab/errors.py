"""Every error a user can cause, with the exit code the contract promises for it.

A `CnnlabError` is shown as one short message; any other exception is a fault of ours and goes, with its
traceback, to `error.txt` in the run folder.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CnnlabError(Exception):
    """Base of the errors that end a command with one message and a documented exit code."""

    exit_code = 1


class UsageError(CnnlabError):
    """A wrong verb, key, option, type, range or combination."""

    exit_code = 2


class ConfigError(UsageError):
    """All problems found in a composed config, reported together.

    `problems` holds one sentence each: what was expected, what was received, what to type instead.
    """

    def __init__(self, problems: Iterable[str]):
        self.problems = list(dict.fromkeys(problems))
        count = len(self.problems)
        head = "1 problem in the config:" if count == 1 else f"{count} problems in the config:"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))


class DataError(CnnlabError):
    """Data that is missing, empty or unreadable."""

    exit_code = 3


class DivergedError(CnnlabError):
    """The loss became non-finite."""

    exit_code = 4


class CheckpointError(CnnlabError):
    """A checkpoint that is missing, damaged or does not fit the run."""

    exit_code = 5


class InterruptedRun(CnnlabError):
    """SIGINT or SIGTERM arrived; the run was saved at a step boundary."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """`' (did you mean X?)'` when a known name is close to `wrong`, else the empty string."""
    close = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.6)
    return f" (did you mean `{close[0]}`?)" if close else ""


def listing(names: Iterable[str]) -> str:
    """The known names as one readable list for an error message."""
    return ", ".join(sorted(names)) or "(none)"
