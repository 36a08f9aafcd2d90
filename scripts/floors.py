"""The lowest versions that pyproject.toml allows, as pip's constraints (`make test-floor`)."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
EXTRAS = ("dev",)


def floors(project: dict) -> list[str]:
    """`name==version` of each requirement. Raises `SystemExit` for one that states no lowest version."""
    listed = [*project["dependencies"], *(text for extra in EXTRAS for text in project["optional-dependencies"][extra])]
    pinned = []
    for requirement in listed:
        found = re.fullmatch(r"([\w.-]+)>=([\w.]+)(,.*)?", requirement.replace(" ", ""))
        if found is None:
            raise SystemExit(f"pyproject.toml: expected NAME>=VERSION, received {requirement!r}")
        pinned.append(f"{found[1]}=={found[2]}")
    return sorted(set(pinned))


if __name__ == "__main__":
    sys.stdout.write("\n".join(floors(tomllib.loads(PROJECT.read_text())["project"])) + "\n")
