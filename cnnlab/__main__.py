"""`python -m cnnlab` is `cnnlab`; `torchrun -m cnnlab` needs it."""

import sys

from cnnlab.cli import main

if __name__ == "__main__":
    sys.exit(main())
