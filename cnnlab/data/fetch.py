"""Data sets whose files torchvision fetches, unpacks and verifies."""

from __future__ import annotations

import contextlib
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

from cnnlab.errors import DataError


def from_torchvision(kind: str, root: Path, wanted: str, *, download: bool, **arguments: Any) -> Any:
    """`torchvision.datasets.<kind>` over the files in `root`.

    Args:
        wanted: the files and the name of the set, for the message.
        download: whether missing files are fetched, or unpacked from an archive that is in `root` already.

    Raises:
        DataError: the files are not there, damaged, or out of reach; says what to do.
    """
    from torchvision import datasets

    try:
        # Torchvision reports downloads on stdout, which belongs to the verbs' JSON.
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            # Numpy 2.4.0 to 2.4.4 warn of how CIFAR's old pickles spell a dtype (numpy#29301, #31177).
            warnings.filterwarnings("ignore", message=r"dtype\(\): align")
            return getattr(datasets, kind)(str(root), download=download, **arguments)
    except (RuntimeError, OSError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        missing = f"expected the files {wanted} in {root.absolute()}"
        if download:
            raise DataError(
                f"{missing}, received on downloading them: {error}; "
                f"fetch them on a machine with a network, put them there and type data.download=false"
            ) from error
        received = str(error).partition(" You can use download=True")[0]  # torchvision's way to say it
        raise DataError(
            f"{missing}, received: {received}; type data.root=FOLDER, or data.download=true to fetch them"
        ) from error
