"""Small command lines, and what they answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TINY = (
    "data.limit=64",
    "model.width=4",
    "trainer.batch_size=32",
    "trainer.epochs=1",
    "trainer.device=cpu",
    "trainer.precision=fp32",
    "trainer.threads=1",
    "stats=off",
)
"""Two updates of a network of 5,000 parameters."""

RANK_1_OF_2 = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
"""What `torchrun` says to the second of two processes."""


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def problems(self) -> list[str]:
        """The refusals in the message on stderr."""
        lines = [line.removeprefix("cnnlab: ").removeprefix("  - ") for line in self.err.splitlines()]
        return [line for line in lines if line.startswith("`")]


def run_folders(root: Path) -> list[Path]:
    """The run folders below `root`, by path."""
    return sorted(path.parent for path in root.glob("**/run.json"))


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())
