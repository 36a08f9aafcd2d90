"""The command line: a table of verbs, each loaded when it is called."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from cnnlab import __version__
from cnnlab.errors import CnnlabError, Terminated, UsageError, did_you_mean
from cnnlab.memory import is_out_of_memory, out_of_memory

VERBS = {
    "train": "compose an experiment from parts and run it (-m sweeps, resume=RUN goes on)",
    "eval": "evaluate a run's checkpoint on one of its splits",
    "summary": "show a network layer by layer: shapes, parameters, multiply-adds, receptive fields",
    "bench": "measure how fast an experiment trains, and where its time goes",
}
BUILDERS = ("train", "summary", "bench")
"""Verbs that build an experiment and so take overrides; the others read run folders."""

HELP = """cnnlab {version}: a laboratory for convolutional networks

Usage
  cnnlab VERB [ARGUMENTS]      cnnlab VERB --help shows examples

Verbs
{verbs}

Examples
  cnnlab train                                   a small ResNet on the embedded digits
  cnnlab train model=vgg optim=rmsprop           swap any part
  cnnlab train -m model=resnet,vgg seed=0,1,2    a sweep
  tensorboard --logdir outputs                   look inside

Exit codes
  0 done   2 wrong usage or config   3 data unusable   4 diverged   5 checkpoint unusable
  130 / 143 interrupted, checkpoint saved   1 anything else

Shell completion
  eval "$(cnnlab -sc install=bash)"              in ~/.bashrc; fish: cnnlab -sc install=fish | source
"""


def help_text() -> str:
    verbs = "\n".join(f"  {name:<10} {text}" for name, text in VERBS.items())
    return HELP.format(version=__version__, verbs=verbs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code. A user's mistake is one message, without a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _sigterm_raises():
            return _dispatch(arguments)
    except KeyboardInterrupt as error:
        print("cnnlab: interrupted", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)
    except SystemExit as stop:  # argparse's --help, or a user's own module
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BrokenPipeError:  # `cnnlab ... | head`: nobody reads on, and Python must not try to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            traceback.print_exc()
        # Under `torchrun` all processes find the same mistake; one tells it.
        if not isinstance(error, UsageError) or os.environ.get("RANK", "0") == "0":
            print(f"cnnlab: {_message(error)}", file=sys.stderr)
        return error.exit_code if isinstance(error, CnnlabError) else 1


def _message(error: Exception) -> str:
    if isinstance(error, CnnlabError):
        return str(error)
    if is_out_of_memory(error):
        return out_of_memory(error)
    if "does not have a deterministic implementation" in str(error):
        remedy = "type trainer.deterministic=false, or another model"
        return f"this network needs what the device computes in no fixed order; {remedy}\n({error})"
    notes = getattr(error, "__notes__", ["HYDRA_FULL_ERROR=1 shows the traceback"])
    return f"{type(error).__name__}: {error}\nThis is a fault of cnnlab or of a part from outside. " + "; ".join(notes)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that folders are left tidy; a run handles both by itself."""

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    try:
        previous = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        print(help_text(), end="", file=sys.stderr)
        return UsageError.exit_code
    verb, rest = arguments[0], arguments[1:]
    if verb in ("-h", "--help", "help"):
        print(help_text(), end="")
        return 0
    if verb in ("-V", "--version"):
        print(__version__)
        return 0
    if {"-sc", "--shell-completion"} & set(arguments[:2]):
        from cnnlab.completion import complete

        return complete(arguments)
    if verb not in VERBS:
        raise UsageError(_no_verb(verb, arguments))
    return import_module(f"cnnlab.verbs.{verb.replace('-', '_')}").main(rest)


def _no_verb(verb: str, arguments: Sequence[str]) -> str:
    if "=" in verb or verb.startswith("-"):
        return f"a verb comes first: cnnlab train {' '.join(arguments)}"
    return f"no verb {verb!r}{did_you_mean(verb, VERBS)}; expected one of {', '.join(VERBS)}"


if __name__ == "__main__":
    sys.exit(main())
