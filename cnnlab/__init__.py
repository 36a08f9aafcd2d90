"""cnnlab: a laboratory for convolutional networks.

`compose`, `build`, `fit` and `open` are the Python API; they are imported on first use, so that `import cnnlab` (and
with it `cnnlab --help`) loads no torch.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:  # nothing is imported before `python -m cnnlab` has left the current folder
    from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "build", "compose", "fit", "open"]

_API = {
    "compose": ("cnnlab.building.trial", "compose"),
    "build": ("cnnlab.building.builder", "build"),
    "fit": ("cnnlab.train", "fit"),
    "open": ("cnnlab.building.opened", "open_run"),
}


def __getattr__(name: str) -> "Any":
    if name in _API:
        from importlib import import_module

        module, attribute = _API[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module 'cnnlab' has no attribute {name!r}")
