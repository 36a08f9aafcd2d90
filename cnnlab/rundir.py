"""The run folder: the one place where a run leaves what it was asked, what it did and what came of it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import signal
import subprocess
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from cnnlab.disk import ensure, overwrite, writing
from cnnlab.errors import CheckpointError, CnnlabError, DiskError, UsageError, short

SCHEMA_VERSION = 2
"""Of a run folder. 1 counted the updates of a statistics record from 0 and the epochs of a training record from 0, and
had no penalty in evaluations: `cnnlab.sinks.records.current` reads it as 2, and a run that was begun so goes on so."""

RESUMABLE = (
    "trainer.epochs",
    "trainer.max_steps",
    "trainer.log_every",
    "trainer.checkpoint",
    "trainer.checkpoint_minutes",
    "trainer.progress",
    "trainer.threads",
    "loading.ahead",
    "loading.workers",
    "loading.memory_share",
    "regularization.patience",
)
"""What may change when a run goes on; everything else would make it another run."""


def write_atomically(path: Path, content: bytes) -> None:
    """The whole content or none: written beside `path`, synced to disk, then renamed over it.

    Raises `DiskError` when the disk refuses; what was there before stays.
    """
    temporary = path.with_name(f".{path.name}.{threading.get_native_id()}.tmp")
    with writing(path):
        ensure(path.parent)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_json(path: Path, document: Any) -> None:
    write_atomically(path, (json.dumps(jsonable(document), indent=2) + "\n").encode())


def write_yaml(path: Path, document: Any) -> None:
    from omegaconf import OmegaConf

    write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(document)).encode())


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
    """Equal for runs that ask for the same numbers: what may change on a resume, and names, are left out."""
    ignored = (*RESUMABLE, "name", "resume", "paths.outputs", "loading.path")
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

    @property
    def error(self) -> Path:
        return self.path / "error.txt"

    @property
    def _hydra(self) -> Path:
        return self.path / ".hydra"

    # ---- what was asked ----

    def create(self, config: Mapping[str, Any], overrides: Sequence[str]) -> None:
        """Makes the folder and writes what was asked.

        Raises `UsageError` if a run is there already (of two at once, the first gets the folder), or if
        nothing can be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._hydra.mkdir()
        except FileExistsError as error:
            if not self._hydra.is_dir():
                raise UsageError(f"{self.path}: expected a folder for the run, found a file") from error
            raise UsageError(
                f"{self.path} already holds a run; two runs never share a folder. "
                f"Type resume={self.path} to go on with it, or another hydra.run.dir"
            ) from error
        except OSError as error:
            raise UsageError(
                f"{self.path}: the run cannot be written there ({error.strerror}); type another "
                "paths.outputs or hydra.run.dir"
            ) from error
        self.write_config(config, overrides)

    def write_config(self, config: Mapping[str, Any], overrides: Sequence[str]) -> None:
        write_yaml(self._hydra / "config.yaml", dict(config))
        write_yaml(self._hydra / "overrides.yaml", list(overrides))

    def config(self) -> dict[str, Any]:
        """The composed config of the run.

        Raises `UsageError` if this is no run folder, `CheckpointError` if its config is damaged.
        """
        loaded = self._read_yaml("config.yaml")
        if not isinstance(loaded, dict) or not loaded:
            raise CheckpointError(f"{self._hydra / 'config.yaml'} is damaged: expected the config of a run")
        return {str(key): value for key, value in loaded.items()}

    def overrides(self) -> list[str]:
        """The command line's part of it."""
        return [str(override) for override in self._read_yaml("overrides.yaml")]

    def _read_yaml(self, name: str) -> Any:
        import yaml
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        path = self._hydra / name
        if not os.path.isfile(path):  # noqa: PTH113 (see `_no_run`)
            raise UsageError(self._no_run())
        try:
            return OmegaConf.to_container(OmegaConf.load(path))
        except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: {' '.join(str(error).split())}") from error

    def _no_run(self) -> str:
        """Why there is no run here, with the newest one below the folder, where one is."""
        if not os.path.exists(self.path):  # noqa: PTH110 (a path that is too long is none, and no error)
            return f"{short(str(self.path))}: expected a run folder, there is none of that name"
        below = [*self.path.glob("*/.hydra/config.yaml"), *self.path.glob("*/*/.hydra/config.yaml")]
        if not below:
            return f"{self.path}: expected a run folder, with .hydra/config.yaml in it; found none"
        below = [path.parent.parent for path in sorted(below, key=lambda path: path.stat().st_mtime)]
        saved = [path for path in below if RunDir(path).last.exists()]
        newest = f"the newest with a checkpoint is {saved[-1]}" if saved else f"the newest is {below[-1]}"
        return f"{self.path} is not a run folder, but holds {len(below)}; {newest}"

    # ---- what it did ----

    def read(self) -> dict[str, Any]:
        """`run.json`, or `{}` before there is one."""
        if not self.run_json.is_file():
            return {}
        try:
            return json.loads(self.run_json.read_text())
        except ValueError as error:
            raise CheckpointError(f"{self.run_json} is damaged: {error}") from error

    @property
    def schema(self) -> int:
        """The version of this folder's records.

        Raises `CheckpointError` for one that only a newer cnnlab knows.
        """
        found = self.read().get("schema_version", SCHEMA_VERSION)
        if not isinstance(found, int) or not 1 <= found <= SCHEMA_VERSION:
            raise CheckpointError(
                f"{self.run_json}: expected a schema_version of 1 to {SCHEMA_VERSION}, received {found!r}; the run was "
                "written by a newer cnnlab, which reads it"
            )
        return found

    def update(self, **facts: Any) -> None:
        """Merges facts into `run.json`, atomically; on a full disk in the blocks that it has.

        Raises `DiskError` when neither goes.
        """
        document = {"schema_version": SCHEMA_VERSION, **self.read(), **facts}
        try:
            write_json(self.run_json, document)
        except DiskError as error:
            try:
                overwrite(self.run_json, json.dumps(jsonable(document), separators=(",", ":")).encode() + b"\n")
            except OSError:
                raise error from None

    def record_failure(self, error: BaseException, **facts: Any) -> None:
        """What ended the run before its first step; `error.txt` gets the traceback when the fault is ours."""
        if isinstance(error, KeyboardInterrupt):
            self.update(status="interrupted", reason="before the first step", **facts)
        elif isinstance(error, CnnlabError):
            self.update(status="failed", reason=str(error), **facts)
        else:
            self.write_traceback(error)
            self.update(status="failed", reason=f"{type(error).__name__}: {error}", **facts)

    def record_forced_end(self, number: int) -> None:
        """The process is about to be ended in the middle of whatever it does."""
        self.update(status="interrupted", reason=f"stopped at once by {signal.Signals(number).name}")

    def write_traceback(self, error: BaseException | None) -> None:
        """`error.txt`; a disk that refuses it must not hide what ended the run."""
        text = "".join(traceback.format_exception(error))
        with suppress(OSError):
            self.error.write_text(text, encoding="utf-8", errors="backslashreplace")

    def claimed(self) -> AbstractContextManager[None]:
        """Keeps other processes from writing here meanwhile. Raises `UsageError` if one already does."""
        return claim(self._hydra / "lock", f"{self.path}: another process is writing this run")


@contextmanager
def claim(path: Path, refusal: str) -> Iterator[None]:
    """Holds the lock file `path` for the block; the operating system drops it with the process, however that ends.

    Raises `UsageError` with `refusal` if another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{refusal}; wait until it ends") from error
        except OSError:  # a file system without locks
            pass
        yield


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
