"""Where and how a run computes: `auto` decides, a wish is met or refused, what was chosen is kept."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, replace

import pytest
import torch

from cnnlab.errors import UsageError
from cnnlab.machine import device
from cnnlab.machine.device import choose_device, place
from cnnlab.machine.resolved import Resolved
from cnnlab.schema import DataPath, Decoder, Device, FeatureSource, Layout, Precision, StepKind, Trainer


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Pretends to be a machine with these devices."""

    def pretend(*devices: str, gpus: int = 1, fast_bf16: bool = False) -> None:
        monkeypatch.setattr(device, "available", lambda d: d.value in ("cpu", *devices))
        monkeypatch.setattr(device, "cpu_has_fast_bf16", lambda: fast_bf16)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus if "cuda" in devices else 0)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)

    return pretend


def trainer(**settings) -> Trainer:
    return dataclasses.replace(Trainer(), **settings)


def test_auto_takes_the_best_device_there_is(machine):
    machine("cuda", "mps")
    assert choose_device(Device.auto) == torch.device("cuda", 0)
    machine("mps")
    assert choose_device(Device.auto) == torch.device("mps")
    machine()
    assert choose_device(Device.auto) == torch.device("cpu")


def test_each_process_has_its_own_gpu(machine):
    machine("cuda", gpus=2)
    assert choose_device(Device.cuda, local_rank=1) == torch.device("cuda", 1)
    with pytest.raises(UsageError, match="nproc-per-node=2"):
        choose_device(Device.cuda, local_rank=2)


def test_a_device_that_is_not_there_is_refused_with_those_that_are(machine):
    machine()
    with pytest.raises(UsageError, match=r"it has: cpu. Type trainer.device=auto"):
        choose_device(Device.cuda)


@pytest.mark.parametrize(("fast", "expected"), [(True, Precision.bf16), (False, Precision.fp32)])
def test_the_precision_follows_the_machine(machine, fast: bool, expected: Precision):
    machine(fast_bf16=fast)
    assert place(trainer(), closure=False).precision is expected
    assert place(trainer(), closure=True).precision is Precision.fp32, "a line search compares losses"
    machine("cuda", fast_bf16=fast)
    assert place(trainer(), closure=False).precision is Precision.bf16


def test_slow_bf16_is_said_and_obeyed(machine):
    machine(fast_bf16=False)
    placement = place(trainer(precision=Precision.bf16), closure=False)
    assert placement.precision is Precision.bf16
    assert "slower" in placement.notices[0]


def test_what_a_device_cannot_do_is_refused(machine):
    machine()
    with pytest.raises(UsageError, match="CUDA graphs need a CUDA device"):
        place(trainer(step=StepKind.captured), closure=False)
    machine("cuda")
    with pytest.raises(UsageError, match="one process"):
        place(trainer(step=StepKind.captured), closure=False, world=2)
    with pytest.raises(UsageError, match="step=eager"):
        place(trainer(step=StepKind.captured), closure=True)


def test_compiling_needs_a_compiler(machine, monkeypatch: pytest.MonkeyPatch):
    machine()
    assert place(trainer(step=StepKind.compiled), closure=False).step is StepKind.compiled
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UsageError, match="C\\+\\+ compiler"):
        place(trainer(step=StepKind.compiled), closure=False)


def test_a_run_goes_on_with_what_was_chosen_for_it(machine):
    machine(fast_bf16=True)
    resolved = Resolved.placed(place(trainer(), closure=False))
    assert resolved.record() == {"device": "cpu", "precision": "bf16", "step": "eager", "layout": "channels_last"}
    machine("cuda")  # another machine, where `auto` would choose otherwise
    again = Resolved.of(resolved.record()).applied(trainer())
    assert (again.device, again.precision, again.step, again.layout) == (
        Device.cpu,
        Precision.bf16,
        StepKind.eager,
        Layout.channels_last,
    )
    assert Resolved().applied(trainer()) == trainer()


def test_what_a_checkpoint_keeps_of_auto_is_read_as_it_was():
    every = Resolved(
        Device.cuda,
        Precision.fp16,
        StepKind.captured,
        Layout.contiguous,
        data_path=DataPath.stream,
        decode=Decoder.cuda,
        accumulate=4,
        lr=0.1 + 0.2,
        features=FeatureSource.kept,
    )
    assert Resolved.of(every.record()) == every
    assert None not in asdict(every).values(), "a new field is in this test"
    assert all(type(text) is str for text in every.record().values())
    assert every.eager() == replace(every, step=StepKind.eager)
    assert Resolved().eager() == Resolved(), "nothing is known of it"
    with pytest.raises(ValueError, match="fp12"):
        Resolved.of({"precision": "fp12"})


def test_on_another_kind_of_device_it_chooses_anew(machine):
    machine("cuda")
    resolved = Resolved.placed(place(trainer(step=StepKind.captured), closure=False))
    machine()
    assert resolved.applied(trainer()) == trainer()
    machine("cuda")
    assert resolved.applied(trainer(device=Device.cpu)) == trainer(device=Device.cpu)


def test_batch_statistics_are_synchronized_on_gpus_only(machine):
    machine("cuda", gpus=2)
    place(trainer(sync_batch_norm=True), closure=False, world=2)
    machine()
    place(trainer(sync_batch_norm=True), closure=False)
    with pytest.raises(UsageError, match="type norm=group"):
        place(trainer(sync_batch_norm=True), closure=False, world=2)


def test_on_a_gpu_auto_tries_a_graph(machine):
    machine("cuda")
    assert place(trainer(), closure=False).step is StepKind.captured
    assert place(trainer(), closure=True).step is StepKind.eager
    assert place(trainer(), closure=False, world=2).step is StepKind.eager
    machine()
    assert place(trainer(), closure=False).step is StepKind.eager


@pytest.mark.gpu
def test_the_gpu_is_found():
    assert choose_device(Device.auto).type == "cuda"
