"""A run that was stopped anywhere and resumed ends as one that never stopped: bit for bit, without gaps or doubles."""

from __future__ import annotations

import copy
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_runs import Interrupt, all_state, composed, differences, files_of, fitted, make_run, resume_run

from cnnlab.errors import InterruptedRun, UsageError
from cnnlab.protocols import Listener
from cnnlab.runs import checkpoint
from cnnlab.runs.folder import RunDir
from cnnlab.sinks.jsonl import read_records
from cnnlab.train import fit, loop

EVERYTHING = (
    "model=cnn",
    "model.widths=[4,8]",
    "regularization.dropout=0.3",
    "regularization.ema=0.9",
    "augment=standard",
    "trainer.accumulate=2",
    "trainer.log_every=3",
)
OPTIMIZERS = {
    "sgd": ("optim=momentum", "trainer.clip_norm=1"),
    "rmsprop": ("optim=rmsprop", "trainer.precision=fp16"),
    "lbfgs": ("optim=lbfgs", "optim.max_iter=3"),
    "newton_cg": ("optim=newton_cg", "optim.max_iter=3", "trainer.accumulate=1"),
    "plateau": ("schedule=plateau", "schedule.patience=0", "regularization.patience=5"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory):
    """The unbroken run of each kind: its state and its files."""
    made: dict[str, tuple[dict, dict]] = {}

    def get(kind: str) -> tuple[dict, dict]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            run = fitted(*EVERYTHING, *OPTIMIZERS[kind], folder=folder)
            made[kind] = all_state(run), files_of(folder)
        return made[kind]

    return get


def interrupted(*overrides: str, folder: Path, after: int, number: int = signal.SIGTERM) -> InterruptedRun:
    run = make_run(*overrides, folder=folder)
    run.listeners.insert(0, Interrupt(after, number))
    with pytest.raises(InterruptedRun) as caught:
        fit(run)
    assert run.clock.step == after
    return caught.value


@pytest.mark.parametrize(
    ("kind", "after", "number"),
    [
        ("sgd", 1, signal.SIGINT),
        ("sgd", 2, signal.SIGTERM),
        ("sgd", 4, signal.SIGTERM),  # an epoch's last update: its evaluation is yet to come
        ("sgd", 6, signal.SIGTERM),
        ("sgd", 8, signal.SIGTERM),  # the last update of all
        ("rmsprop", 5, signal.SIGTERM),
        ("lbfgs", 5, signal.SIGTERM),
        ("newton_cg", 5, signal.SIGTERM),
        ("plateau", 7, signal.SIGTERM),
    ],
)
def test_an_interrupted_run_goes_on_exactly(tmp_path: Path, whole, kind: str, after: int, number: int):
    error = interrupted(*EVERYTHING, *OPTIMIZERS[kind], folder=tmp_path, after=after, number=number)
    assert error.exit_code == 128 + number
    assert f"resume={tmp_path}" in str(error)
    record = RunDir(tmp_path).read()
    assert record["status"] == "interrupted"
    assert record["steps"] == after
    resumed = resume_run(tmp_path)
    fit(resumed)
    state, files = whole(kind)
    assert differences(all_state(resumed), state) == []
    assert files_of(tmp_path) == files
    assert RunDir(tmp_path).read()["status"] == "completed"


def test_a_run_can_be_interrupted_at_every_step(tmp_path: Path, whole):
    overrides = (*EVERYTHING, *OPTIMIZERS["sgd"])
    interrupted(*overrides, folder=tmp_path, after=1)
    for step in range(2, 9):
        run = resume_run(tmp_path)
        run.listeners.insert(0, Interrupt(step))
        with pytest.raises(InterruptedRun):
            fit(run)
    resumed = resume_run(tmp_path)
    fit(resumed)
    state, files = whole("sgd")
    assert differences(all_state(resumed), state) == []
    assert files_of(tmp_path) == files


class Killed(BaseException):
    """Stands for SIGKILL: nothing is told, nothing is saved."""


@pytest.mark.parametrize(("after", "minutes"), [(1, 5), (3, 5), (6, 5), (6, 0), (8, 0)])
def test_a_killed_run_goes_on_from_its_last_checkpoint(
    tmp_path: Path, whole, after: int, minutes: float, monkeypatch: pytest.MonkeyPatch
):
    """What came after the checkpoint is cut off the records and written again."""
    run = make_run(*EVERYTHING, *OPTIMIZERS["sgd"], f"trainer.checkpoint_minutes={minutes}", folder=tmp_path)

    settle = run.settle

    def killed(result):
        settle(result)
        if run.clock.step == after:
            run.observer.drain()
            raise Killed

    run.settle = killed
    monkeypatch.setattr("cnnlab.train.session._finish", lambda run, error: None)
    with pytest.raises(Killed):
        fit(run)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step":9')  # a torn line
    with (tmp_path / "evidence" / "sample_loss.f16").open("ab") as file:
        file.write(b"\x00" * 7)
    assert RunDir(tmp_path).read()["status"] == "killed"
    saved = checkpoint.load(tmp_path / "checkpoints" / "last.pt")["clock"]["step"]
    assert saved == (after if minutes == 0 else after // 4 * 4)
    resumed = resume_run(tmp_path)
    assert resumed.clock.step == saved
    fit(resumed)
    state, files = whole("sgd")
    assert differences(all_state(resumed), state) == []
    assert files_of(tmp_path) == files


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_kill_during_an_evaluation_is_no_different(
    tmp_path: Path, whole, split: str, monkeypatch: pytest.MonkeyPatch
):
    run = make_run(*EVERYTHING, *OPTIMIZERS["sgd"], folder=tmp_path)
    evaluate = loop.evaluate

    def killed(run, name):
        if name == split and run.clock.step == 8:
            raise Killed
        return evaluate(run, name)

    monkeypatch.setattr("cnnlab.train.session._finish", lambda run, error: None)
    monkeypatch.setattr(loop, "evaluate", killed)
    with pytest.raises(Killed):
        fit(run)
    monkeypatch.undo()
    resumed = resume_run(tmp_path)
    fit(resumed)
    state, files = whole("sgd")
    assert differences(all_state(resumed), state) == []
    assert files_of(tmp_path) == files


def test_a_checkpoint_at_every_step_changes_nothing(tmp_path: Path, whole):
    run = fitted(*EVERYTHING, *OPTIMIZERS["sgd"], "trainer.checkpoint_minutes=0", folder=tmp_path)
    state, files = whole("sgd")
    assert differences(all_state(run), state) == []
    assert files_of(tmp_path) == files


@pytest.mark.parametrize("options", [(), ("trainer.max_steps=6",)], ids=["at an epoch's end", "inside an epoch"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_during_an_evaluation_is_heard_in_it(tmp_path: Path, number: int, options: tuple[str, ...]):
    """The evaluation is made again by the session that goes on, and nothing differs."""
    options = (*EVERYTHING, *OPTIMIZERS["sgd"], "trainer.eval_batch_size=8", *options)
    unbroken = fitted(*options, folder=tmp_path / "unbroken")
    run = make_run(*options, folder=tmp_path / "own")
    asked, batches = run.total_steps, run.loaders["val"].batches

    def interrupting(*arguments: Any, **more: Any) -> Any:
        for count, batch in enumerate(batches(*arguments, **more)):
            if count == 1 and run.clock.step == asked:
                os.kill(os.getpid(), number)
            yield batch

    run.loaders["val"].batches = interrupting
    with pytest.raises(InterruptedRun, match=f"at step {asked} of {asked}; saved"):
        fit(run)
    assert not run.complete()
    assert RunDir(tmp_path / "own").read()["status"] == "interrupted"
    assert checkpoint.load(tmp_path / "own" / "checkpoints" / "last.pt")["clock"]["closed"] is False
    run = resume_run(tmp_path / "own")
    fit(run)
    assert differences(all_state(run), all_state(unbroken)) == []
    assert files_of(tmp_path / "own") == files_of(tmp_path / "unbroken")


def test_an_interrupt_after_an_evaluation_is_heard_behind_it(tmp_path: Path):
    run = make_run(folder=tmp_path)

    class AtRecord(Listener):
        def on_record(self, run, record):
            if record["split"] == "val":
                os.kill(os.getpid(), signal.SIGTERM)

    run.listeners.insert(0, AtRecord())
    with pytest.raises(InterruptedRun):
        fit(run)
    assert run.clock.step == 4
    assert run.clock.closed
    assert checkpoint.load(tmp_path / "checkpoints" / "best.pt")["clock"]["step"] == 4


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path):
    run = make_run(folder=tmp_path)

    class Twice(Listener):
        def on_step(self, run, result):
            if run.clock.step == 3:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    run.listeners.insert(0, Twice())
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(run)
    assert signal.getsignal(signal.SIGINT) is before
    assert RunDir(tmp_path).read()["status"] == "interrupted"
    assert checkpoint.load(tmp_path / "checkpoints" / "last.pt")["clock"]["step"] == 0


def test_more_epochs_may_be_asked_for(tmp_path: Path):
    """With a schedule that does not look at the end, the longer run is the one that was asked for at once."""
    overrides = (*EVERYTHING, *OPTIMIZERS["sgd"], "schedule=constant")
    whole = fitted(*overrides, "trainer.epochs=3", folder=tmp_path / "whole")
    fitted(*overrides, "trainer.epochs=2", folder=tmp_path / "parts")
    tested = [r["step"] for r in read_records(tmp_path / "parts" / "metrics.jsonl") if r["split"] == "test"]
    assert tested == [8]
    resumed = resume_run(tmp_path / "parts", epochs=3)
    fit(resumed)
    first, second = all_state(resumed), all_state(whole)
    del first["observer"], second["observer"]  # statistics have a new budget
    assert differences(first, second) == []
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


def test_a_run_cut_short_inside_an_epoch_goes_on_inside_it(tmp_path: Path):
    overrides = (*EVERYTHING, *OPTIMIZERS["sgd"], "schedule=constant")
    whole = fitted(*overrides, folder=tmp_path / "whole")
    fitted(*overrides, "trainer.max_steps=6", folder=tmp_path / "parts")
    resumed = resume_run(tmp_path / "parts", max_steps=None)
    assert (resumed.clock.epoch, resumed.clock.batch) == (1, 2)
    fit(resumed)
    assert differences(resumed.model.state_dict(), whole.model.state_dict()) == []
    assert (tmp_path / "parts/evidence/sample_loss.f16").read_bytes() == (
        tmp_path / "whole/evidence/sample_loss.f16"
    ).read_bytes()
    seen = [(r["epoch"], r["step"]) for r in read_records(tmp_path / "parts/metrics.jsonl") if r["split"] == "train"]
    assert seen == [(1, 3), (1, 4), (2, 6), (2, 8)]


def test_fewer_epochs_than_are_done_are_refused(tmp_path: Path):
    fitted("trainer.epochs=2", folder=tmp_path)
    with pytest.raises(UsageError, match=r"trainer\.epochs=2 or more"):
        resume_run(tmp_path, epochs=1)


def test_a_completed_run_that_is_resumed_is_only_tested_again(tmp_path: Path):
    run = fitted(folder=tmp_path)
    files = files_of(tmp_path)
    resumed = resume_run(tmp_path)
    assert resumed.complete()
    assert fit(resumed) == run.metrics
    assert files_of(tmp_path) == files


def test_choices_of_the_first_session_hold_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`auto` may choose otherwise on the machine that a run goes on on."""
    from cnnlab.machine import device

    config = composed("trainer.max_steps=2", "trainer.precision=auto", "trainer.device=auto")
    for fast in (True, False):
        monkeypatch.setattr(device, "cpu_has_fast_bf16", lambda fast=fast: fast)
        folder = RunDir(tmp_path / str(fast))
        folder.create(config.config, ())
        from cnnlab.building.builder import build

        run = build(copy.deepcopy(config), folder)
        run.listeners.insert(0, Interrupt(1))
        with pytest.raises(InterruptedRun):
            fit(run)
        monkeypatch.setattr(device, "cpu_has_fast_bf16", lambda fast=fast: not fast)
        resumed = resume_run(folder.path)
        assert resumed.facts["step"] == run.facts["step"]
        assert ("bf16" in run.facts["step"]) is fast


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_real_process_that_is_stopped_goes_on_exactly(tmp_path: Path, number: int):
    """`cnnlab train`, a signal in mid-epoch, `cnnlab train resume=`."""
    arguments = [
        "data.limit=400", "trainer.epochs=6", "trainer.batch_size=16", "trainer.device=cpu", "trainer.threads=1",
        "trainer.checkpoint_minutes=0", "optim=momentum", "augment=standard", "regularization.ema=0.9", "stats.every=5",
        "trainer.log_every=5", "stats.max_overhead=null",
    ]  # fmt: skip
    program = [sys.executable, "-m", "cnnlab", "train"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    subprocess.run([*program, *arguments, f"hydra.run.dir={whole}"], check=True, capture_output=True)
    process = subprocess.Popen(
        [*program, *arguments, f"hydra.run.dir={parts}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while sum(1 for _ in read_records(parts / "metrics.jsonl")) < 9 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    subprocess.run([*program, f"resume={parts}"], check=True, capture_output=True)
    assert files_of(parts) == files_of(whole)
    ends = [checkpoint.load(folder / "checkpoints" / "last.pt") for folder in (parts, whole)]
    for end in ends:
        del end["clock"]["wall"], end["clock"]["training"], end["observer"]["overhead"]["charged"]
        del end["records"]["events"]  # one file a session, named by the time
    assert differences(*ends) == []


@pytest.mark.gpu
@pytest.mark.parametrize("step", ["eager", "captured"])
@pytest.mark.parametrize("optim", ["momentum", "adamw", "rmsprop", "muon"])
def test_a_run_on_the_gpu_goes_on_as_if_it_had_not_stopped(tmp_path: Path, optim: str, step: str):
    overrides = (f"optim={optim}", f"trainer.step={step}", "trainer.device=cuda", "trainer.epochs=4", "norm=group")
    whole = fitted(*overrides, folder=tmp_path / "whole")
    interrupted(*overrides, folder=tmp_path / "cut", after=6)
    again = resume_run(tmp_path / "cut")
    fit(again)
    for one, other in zip(whole.optimizer.param_groups, again.optimizer.param_groups, strict=True):
        assert type(one["lr"]) is type(other["lr"]) and float(one["lr"]) == float(other["lr"]) > 0
        assert getattr(one["lr"], "device", None) == getattr(other["lr"], "device", None)
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-2, atol=1e-3)  # cuDNN's sums have no fixed order


@pytest.mark.gpu
@pytest.mark.parametrize("optim", ["momentum", "adamw", "rmsprop"])
@pytest.mark.parametrize(("first", "then"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_goes_on_on_another_kind_of_device(tmp_path: Path, first: str, then: str, optim: str):
    overrides = (f"optim={optim}", f"trainer.device={first}", "trainer.precision=auto", "trainer.epochs=4")
    interrupted(*overrides, folder=tmp_path, after=5)
    run = resume_run(tmp_path, device=then)
    fit(run)
    assert run.step.name == ("captured" if then == "cuda" else "eager")
    assert float(run.optimizer.param_groups[0]["lr"]) == pytest.approx(run.last_lr)
    assert math.isfinite(run.metrics["test/loss"])
