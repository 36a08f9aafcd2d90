"""Checkpoints: whole or refused; plain tensors; the old one stays until the new one is complete."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_runs import all_state, differences, fitted, make_run, resume_run
from torch import nn

from cnnlab.errors import CheckpointError, DiskError
from cnnlab.runs import checkpoint
from cnnlab.runs.checkpoint import State
from cnnlab.runs.folder import RunDir
from cnnlab.train import fit
from cnnlab.verbs.eval import evaluate_run

CONTENT = {"model": {"w": torch.arange(5.0)}, "clock": {"step": 3, "name": "ä"}, "nothing": None}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "last.pt"
    checkpoint.save(CONTENT, path)
    return path


def test_what_is_saved_is_loaded(saved: Path):
    assert differences(checkpoint.load(saved), CONTENT) == []


def test_torch_alone_loads_a_checkpoint_without_running_code(saved: Path):
    assert differences(torch.load(saved, weights_only=True), CONTENT) == []


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_checkpoint_that_was_cut_short_is_refused(saved: Path, share: float):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match="cut short"):
        checkpoint.load(saved)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.99])
def test_one_altered_bit_is_noticed(saved: Path, share: float):
    content = bytearray(saved.read_bytes())
    content[int(share * len(content))] ^= 1
    saved.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(saved)


def test_a_missing_and_a_foreign_file_are_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such"):
        checkpoint.load(tmp_path / "last.pt")
    torch.save(CONTENT, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match="no checkpoint of cnnlab"):
        checkpoint.load(tmp_path / "foreign.pt")
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(tmp_path / "folder.pt")
    assert CheckpointError.exit_code == 5


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_checkpoint(saved: Path, call: str, monkeypatch: pytest.MonkeyPatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    class FullFile(io.FileIO):
        write = full

    if call == "write":
        monkeypatch.setattr(Path, "open", lambda path, mode: FullFile(path, mode))
    else:
        monkeypatch.setattr(*(os, "fsync") if call == "fsync" else (Path, "replace"), full)
    with pytest.raises(DiskError, match="No space left.*free space"):
        checkpoint.save({"model": {"w": torch.zeros(5)}}, saved)
    monkeypatch.undo()
    assert differences(checkpoint.load(saved), CONTENT) == []
    assert [path.name for path in saved.parent.iterdir()] == ["last.pt"]


def test_a_state_refuses_what_does_not_fit_by_name():
    state = State()
    state.register("model", nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="no model"):
        state.load_state_dict({"other": {}})
    with pytest.raises(CheckpointError, match=r"model does not fit.*weight is .* of shape"):
        state.load_state_dict({"model": nn.Linear(3, 2).state_dict()})
    with pytest.raises(AssertionError, match="twice"):
        state.register("model", nn.Linear(2, 2))


def test_only_some_parts_can_be_loaded():
    first, second = State(), State()
    for state in (first, second):
        state.register("a", nn.Linear(2, 2))
        state.register("b", nn.Linear(2, 2))
    second.load_state_dict(first.state_dict(), only=("b",))
    assert {path.split("/")[1] for path in differences(first.state_dict(), second.state_dict())} == {"a"}


# ---- of runs ----


def test_the_checkpoint_of_a_run_is_its_whole_state_as_plain_tensors(tmp_path: Path):
    run = fitted("trainer.max_steps=3", "regularization.ema=0.9", "optim=momentum", folder=tmp_path)
    content = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)
    for name in ("wall", "training"):
        del content["clock"][name]
    del content["observer"]["overhead"]["charged"]
    state = all_state(run)
    state["records"] = content["records"]  # the test record came after it
    assert differences(content, state) == []
    assert {"model", "optimizer", "ema", "clock", "totals", "selection", "observer", "taps"} <= content.keys()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("seed=1",), "its config is"),
        (("data.split_seed=1",), "its config is"),
        (("model.width=8",), "its config is"),
        (("optim=momentum",), "its config is"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(tmp_path: Path, overrides: tuple[str, ...], words: str):
    fitted("trainer.max_steps=1", folder=tmp_path / "own")
    fitted("trainer.max_steps=1", *overrides, folder=tmp_path / "other")
    (tmp_path / "other" / "checkpoints" / "last.pt").replace(tmp_path / "own" / "checkpoints" / "last.pt")
    with pytest.raises(CheckpointError, match=words):
        resume_run(tmp_path / "own")


def test_changed_data_is_noticed_on_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fitted("trainer.max_steps=1", folder=tmp_path)
    from cnnlab.data.digits import Digits

    load = Digits.load

    def other(self):
        splits = load(self)
        splits["train"].fingerprint = "0" * 16
        return splits

    monkeypatch.setattr(Digits, "load", other)
    with pytest.raises(CheckpointError, match="its data is"):
        resume_run(tmp_path)


def test_a_run_without_a_checkpoint_cannot_go_on(tmp_path: Path):
    fitted("trainer.max_steps=1", "trainer.checkpoint=false", folder=tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    with pytest.raises(CheckpointError, match="start it again"):
        resume_run(tmp_path)


def test_a_full_disk_in_mid_run_ends_it_and_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = make_run(folder=tmp_path)

    def fsync(descriptor):
        if run.clock.step > 4:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DiskError, match="No space left.*free space"):
        fit(run)
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "checkpoints" / "last.pt")["clock"]["step"] == 4
    resumed = resume_run(tmp_path)
    fit(resumed)
    whole = fitted(folder=tmp_path / "whole")
    assert differences(all_state(resumed), all_state(whole)) == []


# ---- whose weights ----


def rewritten(path: Path, **parts: object) -> None:
    """The checkpoint with other parts (or other values in them), and a right checksum."""
    state = checkpoint.load(path)
    for name, value in parts.items():
        state[name] = {**state[name], **value} if isinstance(value, dict) and name in state else value
    checkpoint.save(state, path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose best evaluation was its first one (its selection says so)."""
    folder = tmp_path_factory.mktemp("whole")
    fitted("trainer.epochs=2", folder=folder)
    state = checkpoint.load(folder / "checkpoints" / "last.pt")
    first = {"value": 0.5, "epoch": 1, "step": 4, "waited": 1}
    rewritten(folder / "checkpoints" / "last.pt", selection=first)
    checkpoint.save({**state, "selection": first, "clock": {**state["clock"], "step": 4, "epoch": 1}},
                    folder / "checkpoints" / "best.pt")  # fmt: skip
    return folder


@pytest.fixture
def own(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "own")


def gone(folder: Path) -> None:
    (folder / "checkpoints" / "best.pt").unlink()


def of_another_evaluation(folder: Path) -> None:
    rewritten(folder / "checkpoints" / "best.pt", selection={"value": 0.7, "epoch": 2, "step": 8, "waited": 0})


def of_another_step(folder: Path) -> None:
    rewritten(folder / "checkpoints" / "best.pt", clock={"step": 3, "epoch": 0, "batch": 3})


def of_another_run(folder: Path) -> None:
    fitted("trainer.epochs=2", "seed=1", folder=folder.parent / "other")
    (folder.parent / "other" / "checkpoints" / "best.pt").replace(folder / "checkpoints" / "best.pt")


@pytest.mark.parametrize("change", [gone, of_another_evaluation, of_another_step, of_another_run])
def test_the_best_weights_are_not_taken_on_trust(own: Path, change: Callable[[Path], None]):
    assert evaluate_run(RunDir(own), "test")
    change(own)
    with pytest.raises(CheckpointError, match=r"best\.pt"):
        evaluate_run(RunDir(own), "test")
    with pytest.raises(CheckpointError, match=r"best\.pt"):
        resume_run(own)
    assert evaluate_run(RunDir(own), "test", "last")


def test_a_run_killed_between_its_two_files_has_its_best_weights_in_the_last_one(tmp_path: Path):
    run = fitted("trainer.max_steps=4", folder=tmp_path)
    gone(tmp_path)
    assert evaluate_run(RunDir(tmp_path), "test")["test/loss"] == pytest.approx(run.metrics["test/loss"])
    resumed = resume_run(tmp_path)
    assert fit(resumed) == run.metrics
    assert (tmp_path / "checkpoints" / "best.pt").exists()


WRONG = {
    "another type": {"clock": [1]},
    "no clock": {"clock": None},
    "a negative step": {"clock": {"step": -1}},
    "a step that is none": {"clock": {"step": float("nan")}},
    "a truth value": {"clock": {"step": True}},
    "a step that no epoch has": {"clock": {"step": 7}},
    "a best value that is none": {"selection": {"value": float("nan")}},
    "a best value without its epoch": {"selection": {"epoch": None}},
    "no origin": {"origin": {}},
    "an origin of another type": {"origin": 3},
    "data of another type": {"origin": {"data": 3}},
    "a model of another type": {"model": [1]},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_right_checksum_with_a_wrong_content_is_refused_by_name(own: Path, wrong: str):
    path = own / "checkpoints" / "last.pt"
    state = checkpoint.load(path)
    for name, value in WRONG[wrong].items():
        state[name] = {**state[name], **value} if isinstance(value, dict) and value else value
    checkpoint.save(state, path)
    with pytest.raises(CheckpointError):
        resume_run(own)


class Code:
    def __reduce__(self):
        return (os.system, ("touch executed",))


@pytest.mark.parametrize("content", [{"model": Code()}, [1], 3, {1: 2}])
def test_code_and_other_documents_are_refused_without_torchs_advice(tmp_path: Path, content: Any):
    path = tmp_path / "last.pt"
    if isinstance(content, dict):
        checkpoint.save(content, path)
    else:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        whole = buffer.getvalue()
        comment = b"sha256:" + hashlib.sha256(whole).hexdigest().encode()
        path.write_bytes(whole[:-2] + len(comment).to_bytes(2, "little") + comment)
    with pytest.raises(CheckpointError, match="is no checkpoint of cnnlab") as caught:
        checkpoint.load(path)
    assert "weights_only" not in str(caught.value)
    assert not Path("executed").exists()
