"""The run folder: who may write there, what it holds, and what damage does."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from cnnlab.errors import CheckpointError, DataError, UsageError
from cnnlab.rundir import RunDir, claim, config_hash, environment, flatten, git_commit, jsonable, write_atomically

CONFIG = {"seed": 0, "name": "a", "trainer": {"epochs": 1}, "optim": {"lr": 0.1, "betas": [0.9, 0.99]}}


def test_what_is_written_is_read(tmp_path: Path):
    run = RunDir(tmp_path / "deep" / "run")
    run.create(CONFIG, ["seed=0", "name='a b'"])
    assert run.config() == CONFIG
    assert run.overrides() == ["seed=0", "name='a b'"]
    assert run.read() == {}
    run.update(status="running", metrics={"test/loss": float("nan")})
    run.update(steps=3)
    assert run.read() == {"schema_version": 2, "status": "running", "metrics": {"test/loss": None}, "steps": 3}


def test_a_folder_that_is_there_already_may_be_used_once(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    run = RunDir(tmp_path)
    run.create(CONFIG, [])
    with pytest.raises(UsageError, match="already holds a run"):
        run.create(CONFIG, [])
    assert (tmp_path / "notes.txt").read_text() == "mine"


def create(path: str, barrier: multiprocessing.Barrier, results: multiprocessing.Queue) -> None:  # type: ignore[valid-type]
    barrier.wait()  # type: ignore[attr-defined]
    try:
        RunDir(path).create(CONFIG, [])
        results.put("created")  # type: ignore[attr-defined]
    except UsageError:
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
    with run.claimed(), pytest.raises(UsageError, match="another process is writing this run"), run.claimed():
        pass
    with run.claimed():
        pass


def test_a_claim_ends_with_its_block_whatever_happens(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), claim(tmp_path / "lock", "taken"):
        raise ZeroDivisionError
    with claim(tmp_path / "lock", "taken"):
        pass


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
