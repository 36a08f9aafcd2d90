"""The run folder: the one place where a run leaves what it was asked, what it did and what came of it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cnnlab.errors import CheckpointError, UsageError

SCHEMA_VERSION = 1

RESUMABLE = (
    "trainer.epochs",
    "trainer.max_steps",
    "trainer.log_every",
    "trainer.checkpoint",
    "trainer.checkpoint_minutes",
    "trainer.progress",
    "trainer.threads",
    "regularization.patience",
)
"""What may change when a run goes on; everything else would make it another run."""


def write_atomically(path: Path, content: bytes) -> None:
    """The whole content or none: written beside `path`, synced to disk, then renamed over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def config_hash(config: Mapping[str, Any]) -> str:
    """Equal for runs that ask for the same numbers: what may change on a resume, names and paths are left out."""
    ignored = (*RESUMABLE, "name", "resume", "paths.outputs")
    flat = {key: value for key, value in flatten(config).items() if key not in ignored}
    return hashlib.sha256(json.dumps(flat, sort_keys=True, default=str).encode()).hexdigest()[:16]


def jsonable(value: Any) -> Any:
    """The value with non-finite floats as null: JSON has no name for them."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not float("-inf") < value < float("inf"):
        return None
    return value


class RunDir:
    """Paths and records of one run folder (see the contract in the README for what each file holds)."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def stats(self) -> Path:
        return self.path / "stats.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def evidence(self) -> Path:
        return self.path / "evidence"

    @property
    def last(self) -> Path:
        return self.path / "checkpoints" / "last.pt"

    @property
    def best(self) -> Path:
        return self.path / "checkpoints" / "best.pt"

    def create(self, config: Mapping[str, Any], overrides: Sequence[str]) -> None:
        """Makes the folder and writes what was asked. Raises `UsageError` if a run is already there."""
        from omegaconf import OmegaConf

        if self.run_json.exists():
            raise UsageError(
                f"{self.path} already holds a run; two runs never share a folder. "
                f"Type resume={self.path} to go on with it, or another hydra.run.dir"
            )
        hydra = self.path / ".hydra"
        hydra.mkdir(parents=True, exist_ok=True)
        write_atomically(hydra / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(config))).encode())
        write_atomically(hydra / "overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(list(overrides))).encode())

    def config(self) -> dict[str, Any]:
        """The composed config of the run. Raises `UsageError` if this is no run folder."""
        from omegaconf import OmegaConf

        path = self.path / ".hydra" / "config.yaml"
        if not path.is_file():
            raise UsageError(f"{self.path}: expected a run folder, with .hydra/config.yaml in it; found none")
        loaded = OmegaConf.to_container(OmegaConf.load(path))
        assert isinstance(loaded, dict)
        return {str(key): value for key, value in loaded.items()}

    def read(self) -> dict[str, Any]:
        """`run.json`, or `{}` before there is one."""
        if not self.run_json.is_file():
            return {}
        try:
            return json.loads(self.run_json.read_text())
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{self.run_json} is damaged: {error}") from error

    def update(self, **facts: Any) -> None:
        """Merges facts into `run.json`, atomically."""
        merged = {"schema_version": SCHEMA_VERSION, **self.read(), **facts}
        write_atomically(self.run_json, (json.dumps(jsonable(merged), indent=2) + "\n").encode())


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
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
