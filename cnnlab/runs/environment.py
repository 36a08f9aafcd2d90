"""What a run ran with: versions, machine, commit. Loads no torch."""

from __future__ import annotations

import platform
import subprocess
from typing import Any

# Nothing of the folder's own is run by it, and nothing is written there.
_DESCRIBE = (
    *("git", "--no-optional-locks", "-c", "core.fsmonitor=false"),
    *("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"),
)


def environment() -> dict[str, Any]:
    """Versions, machine and git commit, as far as they can be told."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for package in ("cnnlab", "torch", "torchvision", "hydra-core"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {"versions": versions, "platform": platform.platform(), "git_commit": git_commit()}


def git_commit() -> str | None:
    """The commit of the current folder, with `-dirty` when it has changes; `None` outside a repository."""
    try:
        answer = subprocess.run(
            _DESCRIBE,
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
