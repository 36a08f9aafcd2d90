"""The command line: a table of verbs, each loaded when it is called."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from cnnlab import __version__
from cnnlab.errors import CnnlabError, UsageError, did_you_mean

VERBS = {
    "train": "compose an experiment from parts and run it (-m sweeps, resume=RUN goes on)",
    "eval": "evaluate a run's checkpoint on one of its splits",
    "summary": "show a network layer by layer: shapes, parameters, multiply-adds, receptive fields",
}

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
"""


def help_text() -> str:
    verbs = "\n".join(f"  {name:<10} {text}" for name, text in VERBS.items())
    return HELP.format(version=__version__, verbs=verbs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code. A user's mistake is one message, without a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(arguments)
    except CnnlabError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            traceback.print_exc()
        print(f"cnnlab: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("cnnlab: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `cnnlab ... | head`
        sys.stderr.close()
        return 1
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            traceback.print_exc()
        print(
            f"cnnlab: {type(error).__name__}: {error}\n"
            "This is a fault of cnnlab or of a part from outside; HYDRA_FULL_ERROR=1 shows the traceback "
            "(a run keeps it in error.txt).",
            file=sys.stderr,
        )
        return 1


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text(), end="")
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(__version__)
        return 0
    if arguments[0] in ("-sc", "--shell-completion"):
        from cnnlab.completion import complete

        return complete(arguments)
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        hint = "; a verb comes first: cnnlab train " + verb if "=" in verb or verb.startswith("-") else ""
        raise UsageError(
            f"no verb {verb!r}{did_you_mean(verb, VERBS)}; expected one of {', '.join(VERBS)}{hint}"
        )
    return import_module(f"cnnlab.verbs.{verb}").main(rest)


if __name__ == "__main__":
    sys.exit(main())
