"""`python -m cnnlab` is `cnnlab`; `torchrun -m cnnlab` needs it.

The program begins here, and loads nothing before it has said where from, and what a Ctrl-C means meanwhile.
"""

import os
import sys


def leave_current_folder() -> None:
    """Takes the current folder, which `-m` puts before the standard library, out of what is imported from.

    A `pickle.py` or `numpy.py` that lies there is not what is meant. Where cnnlab itself lies there, it comes last. No
    other module of ours is loaded before this.
    """
    if sys.flags.safe_path or sys.path[0] != os.getcwd():  # noqa: PTH109 (`pathlib` is not loaded yet)
        return
    current = sys.path.pop(0)
    if current == os.path.dirname(os.path.dirname(os.path.abspath(__file__))):  # noqa: PTH100, PTH120
        sys.path.append(current)


def main() -> int:
    """The program: `cnnlab.cli.main`, from its very first moment."""
    import signal

    # A KeyboardInterrupt that is raised while a module is imported may be lost in a callback of the import system's, or
    # ends in a page of traceback. Until the command line answers signals, Ctrl-C just ends the process.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from cnnlab.cli import main

    return main()


if __name__ == "__main__":
    leave_current_folder()
    sys.exit(main())
