"""The observer: what is due when, what it costs, and how much it may leave behind."""

from __future__ import annotations

import math

import pytest
import torch
from lab_runs import fitted, make_run, watched
from torch import nn

from cnnlab.observe import observer as module
from cnnlab.observe.observer import IDLE, Observer
from cnnlab.protocols import Probe
from cnnlab.sinks.jsonl import read_records
from cnnlab.train import train_epoch


class Counting(Probe):
    """Reads one number, and how often."""

    def __init__(self, every: int | None = None, size: int = 1, reason: str | None = None):
        super().__init__(every)
        self.size = size
        self.reason = reason
        self.steps: list[int] = []

    def supports(self, run):
        return self.reason

    def read(self, view):
        self.steps.append(view.step)
        return {f"count/{id(self)}": torch.zeros(self.size)}


def run_through(probes: list[Probe], total: int, *, every: int = 10, max_records: int = 1000) -> list[dict]:
    records: list[dict] = []
    observer = Observer(
        nn.Linear(2, 2), probes, None, every=every, total_steps=total, max_records=max_records, receive=records.append
    )
    for step in range(total):
        with observer(step) as look:
            look.gradients(8)
            look.before_update()
            look.updated()
    observer.drain()
    return records


def test_a_probe_is_due_at_its_own_cadence_or_the_common_one():
    own, common = Counting(every=4), Counting()
    records = run_through([own, common], 21)
    assert own.steps == [1, 4, 8, 12, 16, 20]
    assert common.steps == [1, 10, 20]
    assert [r["step"] for r in records] == [1, 4, 8, 10, 12, 16, 20]


def test_between_samples_a_step_costs_nothing():
    observer = Observer(nn.Linear(2, 2), [Counting()], None, every=10, total_steps=100, max_records=11)
    assert observer(3) is IDLE
    assert observer(9) is not IDLE, "the tenth update"


@pytest.mark.parametrize("total", [1, 99, 100, 101, 5000, 12_345])
@pytest.mark.parametrize("cadences", [(1,), (7,), (10, 20), (3, 7)])
def test_a_run_leaves_at_most_max_records(total: int, cadences: tuple[int, ...]):
    records = run_through([Counting(every) for every in cadences], total, max_records=25)
    assert 1 <= len(records) <= 25
    if total / min(cadences) > 100:
        assert len(records) > 8, "stretched no more than needed"
    assert records[0]["step"] == 1


def test_a_run_that_is_prolonged_is_watched_on():
    def observer(total: int) -> Observer:
        return Observer(nn.Linear(2, 2), [Counting(every=1)], None, every=1, total_steps=total, max_records=10)

    def sampled(watching: Observer, steps: range) -> list[int]:
        found = []
        for step in steps:
            with watching(step) as look:
                look.gradients(1)
            found += [] if look is IDLE else [step]
        return found

    first = observer(100)
    assert len(sampled(first, range(50))) == 5
    same, longer = observer(100), observer(1000)
    for resumed in (same, longer):
        resumed.load_state_dict(first.state_dict())
    assert sampled(same, range(50, 100)) == [54, 65, 76, 87, 98]
    assert 5 < len(sampled(longer, range(50, 1000))) <= 10


def test_large_records_are_taken_more_rarely(monkeypatch: pytest.MonkeyPatch):
    """A network of a thousand layers must not write gigabytes."""
    monkeypatch.setattr(module, "MAX_FIGURES", 1000)
    for size in (1, 10, 100, 999, 5000):
        records = run_through([Counting(every=2, size=size)], 400)
        assert len(records) >= 1
        assert len(records) * size <= max(1000, size)


def test_a_thousand_layers_stay_bounded():
    from cnnlab.observe.taps import Taps

    model = nn.Sequential(*(layer for _ in range(1000) for layer in (nn.Linear(2, 2), nn.ReLU())))
    taps = Taps(model, 8, torch.device("cpu"), gradients=True, always=False)
    from cnnlab.observe.probes import ActivationGradients, Activations, Gradients, Updates

    records: list[dict] = []
    observer = Observer(
        model,
        [Activations(), ActivationGradients(), Gradients(), Updates()],
        taps,
        every=1,
        total_steps=10**6,
        max_records=2000,
        receive=records.append,
    )
    with observer(0) as look:
        model(torch.randn(4, 2)).sum().backward()
        look.gradients(4)
        look.before_update()
        look.updated()
    observer.drain()
    assert len(records[0]["layers"]) == 1000
    figures = sum(len(v) for tag, v in records[0].items() if isinstance(v, list) and tag not in ("layers", "tensors"))
    assert figures == 1000 * 7 + 2000 * 3
    assert math.ceil(10**6 / observer.stretch) * figures <= module.MAX_FIGURES + figures


def test_what_several_probes_need_is_paid_for_once(monkeypatch: pytest.MonkeyPatch):
    from cnnlab.observe.taps import Taps

    reads = []
    real = Taps.read
    monkeypatch.setattr(Taps, "read", lambda self, scale: reads.append(1) or real(self, scale))
    run = make_run("stats.every=1", "+probe.again._target_=cnnlab.observe.probes.Activations")
    assert len(run.observer.probes) == 5
    train_epoch(run)
    assert len(reads) == run.steps_per_epoch


def test_without_activation_probes_the_network_has_no_taps():
    run = make_run("stats=light")
    assert run.observer.taps is None
    assert not any(m._forward_hooks for m in run.model.modules())
    assert make_run("stats=off").observer.probes == []


def test_a_probe_that_cannot_measure_the_run_is_left_out_with_its_reason():
    observer = Observer(
        nn.Linear(2, 2), [Counting(), Counting(reason="no second batch")], None, every=1, total_steps=3, max_records=3
    )
    assert observer.drop_unsupported(None) == ["Counting is not measured: no second batch"]
    assert len(observer.probes) == 1
    notices = make_run("optim=newton_cg").notices
    assert any(n.startswith("ActivationGradients is not measured") for n in notices)


def test_a_record_is_handed_over_one_sample_late_and_none_is_lost():
    records: list[dict] = []
    observer = Observer(
        nn.Linear(2, 2), [Counting(every=1)], None, every=1, total_steps=9, max_records=9, receive=records.append
    )
    for step in range(3):
        with observer(step) as look:
            look.gradients(1)
        assert [r["step"] for r in records] == list(range(1, step + 1))
    observer.drain()
    observer.drain()
    assert [r["step"] for r in records] == [1, 2, 3]


def test_the_file_of_statistics_names_layers_once(tmp_path):
    fitted("stats.every=1", "trainer.max_steps=3", folder=tmp_path)
    first, *rest = read_records(tmp_path / "stats.jsonl")
    assert len(first["layers"]) == len(first["activation/std"])
    assert len(first["tensors"]) == len(first["gradient/norm"])
    assert all("layers" not in record and "tensors" not in record for record in rest)
    assert [record["step"] for record in (first, *rest)] == [1, 2, 3]


def test_frozen_weights_are_not_listed():
    run, said = watched("groups.freeze=[conv1]", "trainer.max_steps=1")
    assert "conv1.weight" not in said.stats[0]["tensors"]
    assert len(said.stats[0]["update/ratio"]) == len(said.stats[0]["tensors"]) == len(run.step.parameters)
