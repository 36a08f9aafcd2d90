"""Every error a user can cause, with the exit code the contract promises for it.

A `CnnlabError` is shown as one short message; any other exception is a fault of ours and goes, with its
traceback, to `error.txt` in the run folder.
"""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable

from cnnlab.terminal import one_line


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
        if len(self.problems) == 1:
            super().__init__(self.problems[0])
        else:
            lines = [f"  - {problem}" for problem in self.problems]
            super().__init__("\n".join([f"{len(lines)} problems in the config:", *lines]))


class DataError(CnnlabError):
    """Data that is missing, empty or unreadable."""

    exit_code = 3


class DivergedError(CnnlabError):
    """The loss became non-finite."""

    exit_code = 4


class RolledBack(DivergedError):
    """An update was not finite, and the run's last checkpoint is ready to go on from at a smaller rate."""


class CheckpointError(CnnlabError):
    """A checkpoint that is missing, damaged or does not fit the run."""

    exit_code = 5


class DiskError(CnnlabError, OSError):
    """The disk refused to take what a run writes: it is full, read-only, or answers no more.

    An `OSError`, too, with its `errno` and `strerror`, for who knows a way round.
    """

    def __init__(self, message: str, cause: OSError | None = None):
        super().__init__(message)
        if cause is not None:
            self.errno, self.strerror = cause.errno, cause.strerror

    def __str__(self) -> str:
        return str(self.args[0])


class InterruptedRun(CnnlabError):
    """SIGINT, SIGTERM or SIGHUP arrived; the run was saved at a step boundary."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP (`number`), outside of a run's own steps; Ctrl-C there is a plain `KeyboardInterrupt`."""

    def __init__(self, number: int = signal.SIGTERM):
        super().__init__()
        self.number = int(number)


def closest(wrong: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that `wrong` was probably meant to be; case and `-` for `_` do not count."""
    plain = {name.lower().replace("-", "_"): name for name in known}
    close = difflib.get_close_matches(wrong.lower().replace("-", "_"), list(plain), n=1, cutoff=cutoff)
    return plain[close[0]] if close else None


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """`' (did you mean X?)'` when a known name is close to `wrong`, else the empty string."""
    close = closest(wrong, known)
    return f" (did you mean `{close}`?)" if close else ""


def listing(names: Iterable[str]) -> str:
    """The known names as one readable list for an error message."""
    return ", ".join(sorted(names)) or "(none)"


def short(text: str) -> str:
    """The text on one line, or its beginning where a message would drown in it."""
    text = one_line(text)
    return text if len(text) <= 100 else text[:97] + "..."
