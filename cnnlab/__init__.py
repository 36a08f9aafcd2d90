"""cnnlab: a laboratory for convolutional networks.

`compose`, `build` and `fit` are the Python API; they are imported on first use, so that `import cnnlab` (and with
it `cnnlab --help`) loads no torch.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "build", "compose", "fit"]

_API = {"compose": "cnnlab.building.trial", "build": "cnnlab.building.builder", "fit": "cnnlab.train"}


def __getattr__(name: str) -> Any:
    if name in _API:
        from importlib import import_module

        return getattr(import_module(_API[name]), name)
    raise AttributeError(f"module 'cnnlab' has no attribute {name!r}")
