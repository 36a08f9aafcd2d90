"""The run folder: who may write there, what it holds, and what damage does."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cnnlab.errors import CheckpointError, DataError, UsageError
from cnnlab.runs.environment import environment, git_commit
from cnnlab.runs.folder import RunDir, claim, config_hash, flatten, jsonable, write_atomically

CONFIG = {"seed": 0, "name": "a", "trainer": {"epochs": 1}, "optim": {"lr": 0.1, "betas": [0.9, 0.99]}}


def test_what_is_written_is_read(tmp_path: Path):
    run = RunDir(tmp_path / "deep" / "run")
    run.create(CONFIG, ["seed=0", "name='a b'"])
    assert run.config() == CONFIG
    assert run.overrides() == ["seed=0", "name='a b'"]
    assert run.read() == {}
    with run.claimed():
        run.update(status="running", metrics={"test/loss": float("nan")})
        run.update(steps=3)
        assert run.read() == {"schema_version": 2, "status": "running", "metrics": {"test/loss": None}, "steps": 3}


def test_a_folder_that_is_there_already_may_be_used_once(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    run = RunDir(tmp_path)
    run.create(CONFIG, [])
    write_atomically(run.last, b"a checkpoint")
    with pytest.raises(UsageError, match=f"already holds a run .killed.*resume={tmp_path}"):
        run.create(CONFIG, [])
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert run.last.read_bytes() == b"a checkpoint"


def create(path: str, barrier: multiprocessing.Barrier, results: multiprocessing.Queue) -> None:  # type: ignore[valid-type]
    barrier.wait()  # type: ignore[attr-defined]
    run = RunDir(path)
    try:
        with run.claimed():
            run.create(CONFIG, [])
            barrier.wait()  # type: ignore[attr-defined]
        results.put("created")  # type: ignore[attr-defined]
    except UsageError:
        barrier.wait()  # type: ignore[attr-defined]
        results.put("refused")  # type: ignore[attr-defined]


def test_of_many_processes_one_gets_the_folder(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    processes = [context.Process(target=create, args=(str(tmp_path / "run"), barrier, results)) for _ in range(4)]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=30) for _ in processes)
    for process in processes:
        process.join(30)
    assert found == ["created", "refused", "refused", "refused"]
    assert RunDir(tmp_path / "run").config() == CONFIG


def test_a_file_in_the_way(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="found a file"):
        RunDir(tmp_path / "file").create(CONFIG, [])
    with pytest.raises(UsageError, match="cannot be written there"):
        RunDir(tmp_path / "file" / "below").create(CONFIG, [])


def test_no_run_folder(tmp_path: Path):
    with pytest.raises(UsageError, match="there is none of that name"):
        RunDir(tmp_path / "nowhere").config()
    with pytest.raises(UsageError, match=r"with \.hydra/config\.yaml in it"):
        RunDir(tmp_path).config()
    RunDir(tmp_path / "group" / "run").create(CONFIG, [])
    for folder in (tmp_path, tmp_path / "group"):
        with pytest.raises(UsageError, match=f"the newest is {tmp_path}/group/run"):
            RunDir(folder).config()


@pytest.mark.parametrize("content", ["a: [", "- 1\n", "", "\x00"])
def test_a_damaged_config(tmp_path: Path, content: str):
    run = RunDir(tmp_path)
    run.create(CONFIG, [])
    (tmp_path / ".hydra" / "config.yaml").write_text(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        run.config()


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe"])
def test_a_damaged_record(tmp_path: Path, content: bytes):
    run = RunDir(tmp_path)
    run.run_json.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        run.read()


def test_failures_are_recorded(tmp_path: Path):
    run = RunDir(tmp_path)
    run.record_failure(DataError("no images"), config_hash="x")
    assert run.read() == {"schema_version": 2, "status": "failed", "reason": "no images", "config_hash": "x"}
    assert not run.error.exists(), "the user's mistake has no traceback"
    run.record_failure(KeyboardInterrupt())
    assert run.read()["status"] == "interrupted"
    try:
        raise ZeroDivisionError("of ours")
    except ZeroDivisionError as error:
        run.record_failure(error)
    assert run.read()["reason"] == "ZeroDivisionError: of ours"
    assert "Traceback" in run.error.read_text()


def test_a_claim_keeps_others_out(tmp_path: Path):
    run = RunDir(tmp_path)
    run.create(CONFIG, [])
    with run.claimed():
        with pytest.raises(UsageError, match="another process is writing this run"), RunDir(tmp_path).claimed():
            pass
        with run.claimed():  # who has it keeps it
            pass
        assert run.alive()
    with RunDir(tmp_path).claimed():
        pass


def test_a_claim_ends_with_its_block_whatever_happens(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), claim(tmp_path / "lock", "taken"):
        raise ZeroDivisionError
    with claim(tmp_path / "lock", "taken"):
        pass


# ---- who runs it ----


def ended_run(folder: Path, **record: object) -> RunDir:
    """A run that ended before its first checkpoint, with all that it can leave."""
    run = RunDir(folder)
    run.create({**CONFIG, "name": "old"}, [])
    if record:
        run.update(**record)
    for name in ("tensorboard/events", "evidence/shape.json", "error.txt", "checkpoints/.last.pt.77.tmp", "notes.txt"):
        write_atomically(run.path / name, b"old")
    run.metrics.touch()
    return run


@pytest.mark.parametrize("record", [{}, {"status": "running"}, {"status": "failed"}, {"status": "interrupted"}])
def test_a_run_that_ended_before_its_first_checkpoint_is_begun_again(tmp_path: Path, record: dict[str, object]):
    run = ended_run(tmp_path, **record)
    run.create(CONFIG, [])
    assert run.config() == CONFIG
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {".hydra/config.yaml", ".hydra/overrides.yaml", ".hydra/lock", "notes.txt"}


@pytest.mark.parametrize("status", ["completed", "diverged", "killed, with records"])
def test_a_run_with_something_to_lose_is_not_begun_again(tmp_path: Path, status: str):
    run = ended_run(tmp_path, status="running" if "," in status else status)
    if "," in status:
        run.metrics.write_text("{}\n")
    with pytest.raises(UsageError, match=f"rm -r {tmp_path}"):
        run.create(CONFIG, [])
    assert run.config()["name"] == "old"
    assert run.error.exists()


def test_who_runs_it_is_told_by_the_lock_and_not_by_the_record(tmp_path: Path):
    run = RunDir(tmp_path)
    assert run.status() is None
    run.create(CONFIG, [])
    assert run.status() == "killed", "it had not even a record"
    with run.claimed():
        assert RunDir(tmp_path).status() == "running"
        run.update(status="running", steps=7)
        assert RunDir(tmp_path).read()["status"] == "running"
    told = RunDir(tmp_path).read()
    assert (told["status"], told["steps"]) == ("killed", 7)
    assert json.loads(run.run_json.read_text())["status"] == "running", "a reader writes nothing"
    run.update(status="completed")
    assert run.read()["status"] == "completed"


def test_a_run_that_ends_while_it_is_looked_at_was_not_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, reader = RunDir(tmp_path), RunDir(tmp_path)
    folder.update(status="running")

    def ends() -> bool:
        folder.update(status="completed")
        return False

    monkeypatch.setattr(reader, "alive", ends)
    assert reader.read()["status"] == "completed"


def test_a_process_that_was_killed_holds_nothing(tmp_path: Path):
    program = (
        "import sys, time; from cnnlab.runs.folder import RunDir\n"
        "run = RunDir(sys.argv[1])\n"
        "with run.claimed():\n"
        "    run.create({'seed': 0}, []); run.update(status='running'); print('there', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"there\n"
        run = RunDir(tmp_path)
        assert run.read()["status"] == "running"
        with pytest.raises(UsageError, match=rf"another process .*\(process {process.pid} on "):
            run.create(CONFIG, [])
        process.kill()
        process.wait()
        assert run.read()["status"] == "killed"
        run.create(CONFIG, [])


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that knows none."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_the_process_is_looked_for(tmp_path: Path):
    run = RunDir(tmp_path)
    run.create(CONFIG, [])
    lock = tmp_path / ".hydra" / "lock"
    with run.claimed():
        here = json.loads(lock.read_text())
        assert RunDir(tmp_path).alive() is True
        with pytest.raises(UsageError, match="another process"), RunDir(tmp_path).claimed():
            pass
    assert lock.read_text() == "", "who ends takes the name out"
    assert run.alive() is False
    for other in ({"pid": 2**22 + 1}, {"began": "1"}):  # no such process; another one that got its number
        lock.write_text(json.dumps({**here, **other}))
        assert run.alive() is False
    lock.write_text(json.dumps({**here, "host": "elsewhere"}))
    assert run.alive() is None, "of another machine nothing can be told"
    with run.claimed():
        pass
    for torn in ("", "{", "[]", "null", '{"pid": "x"}', "[" * 100_000):
        lock.write_text(torn)
        assert run.alive() is False


def test_a_reader_does_not_keep_a_writer_out(tmp_path: Path):
    import fcntl

    run = RunDir(tmp_path)
    run.create(CONFIG, [])
    with (tmp_path / ".hydra" / "lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        letting_go = threading.Timer(0.05, lambda: fcntl.flock(file, fcntl.LOCK_UN))
        letting_go.start()
        with run.claimed():
            assert run.alive(), "the writer has it"
        letting_go.join()


@pytest.mark.parametrize("begun", [True, False])
def test_a_folder_that_cannot_be_written_is_told_in_words(tmp_path: Path, begun: bool, monkeypatch: pytest.MonkeyPatch):
    run = RunDir(tmp_path / "run")
    if begun:
        run.create(CONFIG, [])

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("cnnlab.runs.lock.os.open", refuse)
    words = "cnnlab eval reads it as it is" if begun else "type another"
    with pytest.raises(UsageError, match=f"Read-only file system.*{words}"), run.claimed():
        pass


def test_torn_files_of_a_killed_writer_are_swept(tmp_path: Path):
    run = RunDir(tmp_path)
    run.create(CONFIG, [])
    torn = [
        ".run.json.12.tmp",
        ".hydra/.config.yaml.12.tmp",
        "checkpoints/.last.pt.12.tmp",
        "evidence/.shape.json.1.tmp",
    ]
    kept = ["mine.tmp", ".hidden", "checkpoints/.keep.tmp"]
    for name in (*torn, *kept):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
    with run.claimed():
        pass
    assert [name for name in (*torn, *kept) if (tmp_path / name).exists()] == kept


# ---- damage ----

ALIASES = "a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}, *{p}]\n" for p, c in zip("abcdefghi", "bcdefghij"))
DAMAGE = {
    "empty": b"",
    "another encoding": b"\xff\xfe\x00",
    "binary": bytes(range(256)),
    "cut short": b'{"a": [',
    "a list": b"[1, 2]",
    "a text": b'"text"',
    "a number": b"3",
    "null": b"null",
    "deep": b"[" * 100_000,
    "deep, closed": b"[" * 50_000 + b"]" * 50_000,
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
}
YAML_DAMAGE = {
    **DAMAGE,
    "aliases": ALIASES.encode(),
    "itself": b"a: &a [*a]",
    "an anchor at the top": b"&a\ntrainer: *a",
    "a tag": b"trainer: !!python/object/apply:os.system [true]",
    "a set": b"trainer: !!set {a, b}",
    "keys that are no texts": b"1: 2\nnull: 3",
    "twice": b"a: 1\na: 2",
    "deep blocks": b"".join(b" " * i + b"a:\n" for i in range(300)),
}


@pytest.mark.parametrize("name", ["config.yaml", "overrides.yaml"])
@pytest.mark.parametrize("damage", YAML_DAMAGE)
def test_damaged_yaml_is_refused_by_name(tmp_path: Path, name: str, damage: str):
    run = RunDir(tmp_path)
    run.create(CONFIG, [])
    if name == "overrides.yaml" and damage == "a list":
        return  # numbers, below
    (tmp_path / ".hydra" / name).write_bytes(YAML_DAMAGE[damage])
    with pytest.raises(CheckpointError, match=rf"\.hydra/{name}"):
        run.config() if name == "config.yaml" else run.overrides()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_is_refused_by_name(tmp_path: Path, damage: str):
    run = RunDir(tmp_path)
    run.run_json.write_bytes(DAMAGE[damage])
    for read in (run.read, run.status, lambda: run.update(steps=1)):
        with pytest.raises(CheckpointError, match=r"run\.json"):
            read()
    assert run.run_json.read_bytes() == DAMAGE[damage], "what is damaged is not overwritten"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"status": 3}, "expected `status` to be a text, received the number 3"),
        ({"steps": -1}, "expected `steps` to be a count"),
        ({"steps": True}, "expected `steps` to be a count, received a truth value"),
        ({"steps": 10**400}, None),
        ({"best": [1]}, "expected `best` to be an object or null, received a list"),
        ({"best": {"epoch": "1"}}, "expected `best.epoch` to be a count, received a text"),
        ({"metrics": {"test/loss": "x"}}, "expected `metrics` to be numbers by name"),
        ({"config_dirs": ["a", 1]}, "expected `config_dirs` to be a list of texts"),
        ({"classes": "ab"}, "expected `classes` to be a list of texts, received a text"),
        ({"choices": 1}, "expected `choices` to be an object"),
        (
            {"schema_version": 99, "versions": {"cnnlab": "9.1"}},
            r"received 99; the run was written by another cnnlab \(9\.1\)",
        ),
    ],
)
def test_a_record_of_other_types_is_refused_by_name(tmp_path: Path, record: dict[str, object], words: str | None):
    run = RunDir(tmp_path)
    run.run_json.write_text(json.dumps(record))
    if words is None:
        assert run.read() == record
        return
    with pytest.raises(CheckpointError, match=rf"run\.json.*{words}"):
        run.read()


@pytest.mark.parametrize("name", ["run.json", ".hydra/config.yaml", ".hydra/overrides.yaml"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "huge"])
def test_what_is_no_document_is_refused_and_not_waited_for(tmp_path: Path, name: str, kind: str):
    run = RunDir(tmp_path)
    run.create(CONFIG, [])
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)  # a hole: no byte of it is there
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        {"run.json": run.read, ".hydra/config.yaml": run.config}.get(name, run.overrides)()


# ---- writing ----


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# ---- hashes and shapes ----


def changed(**values: object) -> dict[str, object]:
    return {**CONFIG, **values}


def test_the_hash_tells_experiments_apart():
    first = config_hash(CONFIG)
    assert first == config_hash(dict(reversed(CONFIG.items())))
    assert first != config_hash(changed(seed=1))
    assert first != config_hash(changed(optim={"lr": 0.2, "betas": [0.9, 0.99]}))


def test_the_hash_leaves_out_what_may_change():
    first = config_hash(CONFIG)
    assert first == config_hash(changed(name="b"))
    assert first == config_hash(changed(resume="x"))
    assert first == config_hash(changed(trainer={"epochs": 5}))
    assert first == config_hash(changed(paths={"outputs": "elsewhere"}))


def test_flatten():
    assert flatten({"a": {"b": {"c": 1}, "d": []}, "e": {}}) == {"a.b.c": 1, "a.d": [], "e": {}}


def test_json_has_no_nan():
    value = {"a": float("inf"), "b": [float("nan"), 1.5], 3: (True, None, "x", -float("inf"))}
    assert json.loads(json.dumps(jsonable(value), allow_nan=False)) == {
        "a": None,
        "b": [None, 1.5],
        "3": [True, None, "x", None],
    }


def test_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert git_commit() is None
    monkeypatch.setenv("PATH", "")
    facts = environment()
    assert facts["git_commit"] is None
    assert {"python", "cnnlab", "torch"} <= set(facts["versions"])
