"""`python -m cnnlab` is `cnnlab`; `torchrun -m cnnlab` needs it."""

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


if __name__ == "__main__":
    leave_current_folder()
    from cnnlab.cli import main

    sys.exit(main())
