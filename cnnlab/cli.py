"""The command line: a table of verbs, each loaded when it is called."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from cnnlab import __version__
from cnnlab.errors import CnnlabError, InterruptedRun, UsageError, did_you_mean
from cnnlab.machine.interrupts import answered_by, number_of, raises, watcher
from cnnlab.machine.memory import READING, TRAINING, is_out_of_memory, out_of_memory
from cnnlab.machine.surroundings import import_safely, require_folder, torchrun
from cnnlab.terminal import fill_closed, guarded, say
from cnnlab.verbs.table import BUILDERS, VERBS

SURROUNDINGS = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE)
"""Refusals of a disk that are nobody's fault here, wherever they come from."""

HELP = """cnnlab {version}: a laboratory for convolutional networks

Usage
  cnnlab VERB [ARGUMENTS]      cnnlab VERB --help shows examples

Verbs
{verbs}

Examples
  cnnlab train                                   a small ResNet on the embedded digits
  cnnlab train model=vgg optim=rmsprop           swap any part
  cnnlab train -m model=resnet,vgg seed=0,1,2    a sweep
  cnnlab help model=vgg                          what each of a part's settings means
  tensorboard --logdir outputs                   look inside

Exit codes
  0 done   2 wrong usage or config   3 data unusable   4 diverged   5 checkpoint unusable
  129 / 130 / 143 interrupted by SIGHUP, SIGINT, SIGTERM, checkpoint saved   1 anything else

Shell completion
  eval "$(cnnlab -sc install=bash)"              in ~/.bashrc; fish: cnnlab -sc install=fish | source
"""


def help_text() -> str:
    verbs = "\n".join(f"  {name:<10} {text}" for name, text in VERBS.items())
    return HELP.format(version=__version__, verbs=verbs).rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code. A user's mistake is one message, without a traceback.

    Args:
        arguments: of the command line; without them it is this process's own, whose end is then watched over.
    """
    program = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if program:
        fill_closed()
        import_safely()
    with guarded(), answered_by(raises, then=_goes_on if program else None):
        if program:
            watcher.start()
        try:
            code = _dispatch(arguments)
            # A training's product are its files; that of every other verb is what it prints.
            lost = getattr(sys.stdout, "lost", None) is not None and arguments[:1] != ["train"]
            return code or int(lost)
        except BaseException as error:
            with answered_by(_goes_on):
                code = _told(error, arguments[:1])
            if isinstance(error, KeyboardInterrupt | InterruptedRun):
                watcher.expect_end(code - 128)
            return code


def _goes_on(number: int, frame: object) -> None:
    """The process is about to end: another signal has nothing to add, and must not raise in what Python does then."""


def _told(error: BaseException, verb: Sequence[str]) -> int:
    """Says what ended the verb; its exit code."""
    if isinstance(error, KeyboardInterrupt):
        say("; ".join(["cnnlab: interrupted", *getattr(error, "__notes__", [])]), err=True)
        return 128 + number_of(error)
    if isinstance(error, SystemExit):  # argparse's --help, or a user's own module
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if not isinstance(error, Exception):
        raise error
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        traceback.print_exception(error)
    # Under `torchrun` all processes find the same mistake; one tells it.
    if not isinstance(error, UsageError) or torchrun().rank == 0:
        say(f"cnnlab: {_message(error, verb)}", err=True)
    return error.exit_code if isinstance(error, CnnlabError) else 1


def _message(error: Exception, verb: Sequence[str] = ()) -> str:
    if isinstance(error, CnnlabError):
        return str(error)
    if is_out_of_memory(error):
        return out_of_memory(error, TRAINING if not verb or verb[0] in BUILDERS else READING)
    if "does not have a deterministic implementation" in str(error):
        remedy = "type trainer.deterministic=false, or another model"
        return f"this network needs what the device computes in no fixed order; {remedy}\n({error})"
    if isinstance(error, OSError) and error.errno in SURROUNDINGS:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; free space, or type paths.outputs=FOLDER to write elsewhere"
    if "No usable temporary directory" in str(error):
        return (
            "expected a folder for temporary files, there is none that can be written; type TMPDIR=FOLDER before cnnlab"
        )
    if "Could not determine home directory" in str(error):
        return "`~` means nothing here, since this user has no home folder; type the whole path"
    notes = getattr(error, "__notes__", ["HYDRA_FULL_ERROR=1 shows the traceback"])
    return f"{type(error).__name__}: {error}\nThis is a fault of cnnlab or of a part from outside. " + "; ".join(notes)


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        say(help_text(), err=True)
        return UsageError.exit_code
    verb, rest = arguments[0], arguments[1:]
    if verb in ("-h", "--help") or arguments == ["help"]:
        say(help_text())
        return 0
    if verb in ("-V", "--version"):
        say(__version__)
        return 0
    if {"-sc", "--shell-completion"} & set(arguments[:2]):
        from cnnlab.verbs.completion import complete

        return complete(arguments)
    if verb not in VERBS:
        raise UsageError(_no_verb(verb, arguments))
    require_folder()
    return import_module(f"cnnlab.verbs.{verb.replace('-', '_')}").main(rest)


def _no_verb(verb: str, arguments: Sequence[str]) -> str:
    if "=" in verb or verb.startswith("-"):
        return f"a verb comes first: cnnlab train {' '.join(arguments)}"
    return f"no verb {verb!r}{did_you_mean(verb, VERBS)}; expected one of {', '.join(VERBS)}"


if __name__ == "__main__":
    sys.exit(main())
