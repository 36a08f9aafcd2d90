"""The run folder: the one place where a run leaves what it was asked, what it did and what came of it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import signal
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from cnnlab.errors import CheckpointError, CnnlabError, DiskError, UsageError, short
from cnnlab.machine.memory import is_out_of_memory, out_of_memory
from cnnlab.runs import stored
from cnnlab.runs.disk import ensure, overwrite, writing
from cnnlab.runs.lock import claim, held

_log = logging.getLogger(__name__)

SCHEMA_VERSION = 2
"""Of a run folder. 1 counted the updates of a statistics record from 0 and the epochs of a training record from 0, and
had no penalty in evaluations: `cnnlab.sinks.records.current` reads it as 2, and a run that was begun so goes on so."""

RESUMABLE = (
    "trainer.epochs",
    "trainer.max_steps",
    "trainer.log_every",
    "trainer.checkpoint",
    "trainer.checkpoint_minutes",
    "trainer.auto_accumulate",
    "trainer.on_nonfinite",
    "trainer.max_nonfinite",
    "trainer.progress",
    "trainer.threads",
    "loading.ahead",
    "loading.workers",
    "loading.memory_share",
    "regularization.patience",
)
"""What may change when a run goes on; everything else would make it another run."""

PLACES = (
    "data.root",
    "data.shards",
    "data.val_shards",
    "data.test_shards",
    "data.cache",
    "data.workers",
    "data.download",
)
"""Where the data lies and how it is read: data that has moved is the same data, known by its fingerprint."""

_RECORD: dict[str, stored.Kind] = {
    "schema_version": stored.INTEGER,
    "status": stored.TEXT,
    "reason": stored.or_null(stored.TEXT),
    "seed": stored.INTEGER,
    "config_hash": stored.TEXT,
    "choices": stored.OBJECT,
    "config_dirs": stored.TEXTS,
    "classes": stored.TEXTS,
    "samples": stored.COUNTS,
    "data_fingerprint": stored.TEXT_BY_NAME,
    "steps": stored.COUNT,
    "epochs": stored.COUNT,
    "seconds": stored.or_null(stored.NUMBER),
    "metrics": stored.NUMBERS,
    "best": stored.or_null(stored.OBJECT),
    "versions": stored.TEXT_BY_NAME,
}
"""What those who read a run rely on in its `run.json`."""
_BEST: dict[str, stored.Kind] = {"metric": stored.TEXT, "value": stored.or_null(stored.NUMBER), "epoch": stored.COUNT}
_PARTS = (
    "run.json",
    "files.json.gz",
    "metrics.jsonl",
    "stats.jsonl",
    "error.txt",
    "evidence",
    "nonfinite",
    "tensorboard",
    "checkpoints",
)
"""What a run leaves beside `.hydra`, and begins anew where it begins again."""
_LONGEST_NAME = 200
"""Bytes; most file systems take 255, and a temporary name is longer than the one it stands for."""
_TORN = re.compile(r"\..+\.\d+\.tmp")


UNSAID: tuple[tuple[str, Any], ...] = (
    ("head._target_", None),
    ("penalty", {}),
    ("listener", {}),
    ("weights._target_", None),
    ("finetune._target_", None),
)
"""Keys that came later, with the value that means what runs without them did: their hashes stay."""


HPARAMS = "events.out.tfevents.0000000000.hparams"
"""TensorBoard's file of the run's settings, before all others by name; each session writes it anew."""
EARLIER_HASH = "_earlier_hash"
"""Where a config of an earlier version keeps the hash that its checkpoints know it by."""


def write_atomically(path: Path, content: bytes | memoryview, elsewhere: str | None = None) -> None:
    """The whole content or none: written beside `path`, synced to disk, then renamed over it.

    Args:
        elsewhere: see `cnnlab.runs.disk.writing`.

    Raises `DiskError` when the disk refuses; what was there before stays.
    """
    name = path.name if len(os.fsencode(path.name)) <= _LONGEST_NAME else path.name[: _LONGEST_NAME // 4]
    temporary = path.with_name(f".{name}.{threading.get_native_id()}.tmp")
    with writing(path, elsewhere):
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


def config_hash(config: Mapping[str, Any], besides: Sequence[str] = ()) -> str:
    """Equal for runs that ask for the same numbers: what may change on a resume, and names, are left out.

    Args:
        besides: keys that are left out, too.
    """
    ignored = (*RESUMABLE, "name", "resume", "check", "paths.outputs", "loading.path", *besides)
    flat = {k: v for k, v in flatten(config).items() if k not in (*ignored, EARLIER_HASH) and (k, v) not in UNSAID}
    return hashlib.sha256(json.dumps(flat, sort_keys=True, default=str).encode()).hexdigest()[:16]


def earlier_hash(config: Mapping[str, Any]) -> str | None:
    """The hash that a version gave a config whose words are no longer today's; `None` where they are."""
    return config.get(EARLIER_HASH)


def jsonable(value: Any) -> Any:
    """The value with non-finite floats as null: JSON has no name for them."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not float("-inf") < value < float("inf"):
        return None
    return value


def in_words(error: BaseException | None) -> str | None:
    """What ended a run, where it is no fault of ours: a `CnnlabError`, or the end of memory. `None` else."""
    if isinstance(error, CnnlabError):
        return str(error)
    return out_of_memory(error) if error is not None and is_out_of_memory(error) else None


class RunDir:
    """Paths and records of one run folder (see the contract in the README for what each file holds)."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._claimed = False
        self._holding: ExitStack | None = None
        self._asked: tuple[Mapping[str, Any], Sequence[str]] | None = None
        """What this process wrote to `.hydra`."""
        self._known: dict[str, Any] | None = None
        """`run.json` as this process wrote it last, while it has the claim and so nobody else writes there."""

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
    def nonfinite(self) -> Path:
        return self.path / "nonfinite"

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

    def create(self, config: Mapping[str, Any], overrides: Sequence[str], *, again: bool = False) -> None:
        """Makes the folder and writes what was asked.

        A run that ended here before its first checkpoint left nothing to go on with, and is begun again.

        Args:
            again: also one that was measured without checkpoints, and did not come to its end.

        Raises:
            UsageError: a run is there already (of two at once, the first gets the folder), or nothing can be written.
        """
        with self.claimed():
            self._begin(again)
            self.write_config(config, overrides)

    def _begin(self, again: bool) -> None:
        """Takes away what an earlier run left here, where that is nothing to keep. Raises `UsageError` where it is."""
        if not any((self.path / name).exists() for name in (".hydra/config.yaml", "run.json", "checkpoints")):
            return
        try:
            status = self._stored().get("status")
        except CheckpointError as error:
            status = f"its record cannot be read: {error}"
        if status in (None, "running"):  # nobody else is at work: the claim is ours
            status = "killed"
        if self.last.exists() or self.best.exists():
            raise UsageError(
                f"{self.path} already holds a run ({status}); two runs never share a folder. "
                f"Type resume={self.path} to go on with it, or another hydra.run.dir"
            )
        over = status not in ("killed", "failed", "interrupted")
        measured = self.metrics.is_file() and self.metrics.stat().st_size > 0
        if over or (measured and not again):
            raise UsageError(
                f"{self.path} already holds a run ({status}), without a checkpoint to go on with; begun again, it "
                "would lose its records. Type another hydra.run.dir, or take it away first: "
                f"rm -r {shlex.quote(str(self.path))}"
            )
        for name in _PARTS:
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def write_config(self, config: Mapping[str, Any], overrides: Sequence[str]) -> None:
        self._asked = config, overrides
        write_yaml(self._hydra / "config.yaml", dict(config))
        write_yaml(self._hydra / "overrides.yaml", list(overrides))

    def _write_again(self) -> None:
        """What vanished while this process writes here: `.hydra` is made again, with its lock; it is told."""
        if self._known is not None and not self.run_json.exists():
            _log.warning("%s vanished and was made again", self.run_json)
        if self._asked is None or self._holding is None or self.config_file.exists():
            return
        _log.warning("%s vanished and was made again", self._hydra)
        self.write_config(*self._asked)
        with suppress(OSError, UsageError):
            self._holding.enter_context(self._claim())

    @property
    def config_file(self) -> Path:
        return self._hydra / "config.yaml"

    def config(self) -> dict[str, Any]:
        """The composed config of the run.

        Raises `UsageError` if this is no run folder, `CheckpointError` if its config is damaged.
        """
        path, loaded = self.config_file, self._read_yaml("config.yaml")
        if not isinstance(loaded, dict) or not loaded or not all(isinstance(key, str) for key in loaded):
            raise stored.damaged(path, "expected the config of a run")
        return _up_to_date(loaded)

    def overrides(self) -> list[str]:
        """The command line's part of it."""
        loaded = self._read_yaml("overrides.yaml")
        stored.require({"overrides": loaded}, {"overrides": stored.TEXTS}, self._hydra / "overrides.yaml")
        return list(loaded)

    def begin_again(self) -> str:
        """What to type where there is no checkpoint to go on with: the run from its start."""
        record = self.read()
        dirs = [text for folder in record.get("config_dirs", []) for text in ("--config-dir", folder)]
        over = record.get("status") in ("completed", "diverged")
        place = [] if over else [f"hydra.run.dir={self.path}"]
        return shlex.join(["cnnlab", "train", *dirs, *self.overrides(), *place])

    def _read_yaml(self, name: str) -> Any:
        path = self._hydra / name
        if not os.path.exists(path):  # noqa: PTH110 (see `_no_run`)
            if os.path.exists(self.config_file):  # noqa: PTH110
                raise stored.damaged(path, "expected a file beside config.yaml, there is none")
            raise UsageError(self._no_run())
        return stored.yaml_document(path)

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
        """`run.json`, or `{}` before there is one; of a run whose process is gone, `status` is `killed`.

        Raises `CheckpointError` if it is damaged.
        """
        record = self._stored()
        if record.get("status") == "running" and self.alive() is False:
            record = self._stored()  # it may have come to its end between the two looks
        if record.get("status") == "running" and self.alive() is False:
            reason = f"its process is gone; {record.get('steps', 0)} steps or more were done"
            return {**record, "status": "killed", "reason": reason}
        return record

    def lost(self) -> list[str]:
        """What is told of a folder that has a checkpoint, and whose record is gone: the network is whole, and what was
        known of its training is not. Raises `CheckpointError` where it is damaged."""
        if "schema_version" in self._stored():
            return []
        return [f"{self.run_json} is gone or empty: what it told of the run is lost"]

    def status(self) -> str | None:
        """What became of the run; `None` where there is none yet."""
        status: str | None = self.read().get("status")
        if status is None and (self._hydra / "config.yaml").exists():
            return "running" if self.alive() else "killed"
        return status

    def alive(self) -> bool | None:
        """Whether a process writes here; `None` where that cannot be told."""
        return held(self._hydra / "lock")

    def _stored(self) -> dict[str, Any]:
        if not self.run_json.exists():
            return {}
        record = stored.json_object(self.run_json)
        stored.require(record, _RECORD, self.run_json)
        stored.require(record.get("best") or {}, _BEST, self.run_json, "best.")
        version = record.get("schema_version", SCHEMA_VERSION)
        if not 1 <= version <= SCHEMA_VERSION:
            raise CheckpointError(
                f"{self.run_json}: expected a schema_version of 1 to {SCHEMA_VERSION}, received {version}; the run was "
                f"written by another cnnlab ({record.get('versions', {}).get('cnnlab', 'unknown')}), which reads it"
            )
        return record

    @property
    def schema(self) -> int:
        """The version of this folder's records.

        Raises `CheckpointError` for one that only a newer cnnlab knows.
        """
        return int(self.read().get("schema_version", SCHEMA_VERSION))

    def update(self, **facts: Any) -> None:
        """Merges facts into `run.json`, atomically; on a full disk in the blocks that it has.

        Who has the claim wrote it: a file that was damaged or taken away meanwhile is made whole.

        Raises `DiskError` when neither goes.
        """
        before = self._stored() if self._known is None else self._known
        document = {"schema_version": SCHEMA_VERSION, **before, **facts}
        try:
            self._write_again()
            self._known = document if self._claimed else None
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
        elif (words := in_words(error)) is not None:
            self.update(status="failed", reason=words, **facts)
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

    def require_kinds(self) -> None:
        """Raises `CheckpointError` where a folder, a device or a pipe is in the place of a file that a run goes on
        writing, or a file in that of a folder."""
        for path in (self.run_json, self.metrics, self.stats, self.error, self.last, self.best):
            stored.require_file(path)
        for path in (self.evidence / "sample_loss.f16", self.evidence / "shape.json"):
            stored.require_file(path)
        stored.require_folder(self.tensorboard)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keeps other processes from writing here meanwhile; makes the folder where there is none. Who has it already
        (this object) keeps it.

        Raises `UsageError` if another process writes here, or if nothing can be written.
        """
        if self._claimed:
            yield
            return
        self._make()
        with ExitStack() as holding:
            try:
                holding.enter_context(self._claim())
            except OSError as error:
                raise self._unwritable(error) from error
            self._claimed, self._holding = True, holding
            holding.callback(self._let_go)
            self._remove_torn()
            yield

    def _claim(self) -> AbstractContextManager[None]:
        return claim(self._hydra / "lock", f"{self.path}: another process is writing this run")

    def _let_go(self) -> None:
        self._claimed, self._holding, self._known = False, None, None

    def _make(self) -> None:
        try:
            self._hydra.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if isinstance(error, FileExistsError) or self.path.is_file():
                raise UsageError(f"{self.path}: expected a folder for the run, found a file") from error
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UsageError:
        if (self._hydra / "config.yaml").exists():
            return UsageError(
                f"{self.path}: the run cannot be written ({error.strerror}), and so cannot go on there; make it "
                "writable, or go on with a copy. cnnlab eval reads it as it is"
            )
        return UsageError(
            f"{self.path}: the run cannot be written there ({error.strerror}); type another "
            "paths.outputs or hydra.run.dir"
        )

    def _remove_torn(self) -> None:
        """Removes what a process that was killed while it wrote a file left beside it."""
        for folder in (self.path, self._hydra, self.last.parent, self.evidence, self.tensorboard):
            with suppress(OSError):
                torn = [path for path in folder.iterdir() if _TORN.fullmatch(path.name)]
                for path in torn:
                    path.unlink(missing_ok=True)


def _up_to_date(config: dict[str, Any]) -> dict[str, Any]:
    """A config of an earlier version in today's words: the decoder was once a setting of the task."""
    task = config.get("task")
    if isinstance(task, dict) and "head" not in config:
        config[EARLIER_HASH] = config_hash(config)
        asked = str(task.pop("upsample", None))
        heads = {"unpool": "cnnlab.heads.UnpoolDecoder", "nearest": "cnnlab.heads.NearestDecoder"}
        config["head"] = {"_target_": heads.get(asked)}
    return config
