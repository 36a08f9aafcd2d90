"""The cost of the statistics is measured on a clock that the tests turn by hand, and kept within its bounds."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from lab_runs import fitted, make_run
from torch import nn

from cnnlab.observe.observer import IDLE, Observer
from cnnlab.observe.overhead import ONE_THREAD, Aside, Overhead
from cnnlab.protocols import Listener
from cnnlab.runs.folder import RunDir
from cnnlab.train import fit


@dataclass
class Clock:
    now: float = 0.0

    def mark(self) -> Mark:
        return Mark(self.now)


@dataclass
class Mark:
    at: float

    def ready(self) -> bool:
        return True

    def seconds_until(self, later: Mark) -> float:
        return later.at - self.at


def decide(overhead: Overhead, steps: int, every: int, taken: int, left: int) -> None:
    overhead.decide(steps, taken, lambda factor: steps // (every * factor), lambda factor: left // (every * factor))


def simulated(
    limit: float | None, *, steps: int, every: int, cost: float, writing: float = 0.0
) -> tuple[Overhead, int]:
    """A run of steps that take 1 s, whose samples take `cost` more, and `writing` in the step after; how many there
    were."""
    clock = Clock()
    overhead = Overhead(limit, clock.mark)
    samples, sampled = 0, False
    for step in range(steps):
        if overhead.end():
            decide(overhead, steps, every, samples, steps - step)
        clock.now += writing * sampled
        overhead.charge(writing * sampled)
        sampled = (step + 1) % (every * overhead.slowdown) == 0
        overhead.begin(sampled)
        clock.now += 1 + cost * sampled
        samples += sampled
    return overhead, samples


def test_the_cost_is_that_of_the_sampled_step_and_of_the_writing_after_it():
    overhead, _ = simulated(None, steps=200, every=10, cost=0.5, writing=0.25)
    assert overhead.step_seconds == pytest.approx(1)
    assert overhead.sample_seconds == pytest.approx(0.5)
    assert overhead.spent(20) == pytest.approx(20 * 0.5 + 19 * 0.25), "the last one's is yet to be written"
    assert overhead.slowdown == 1, "without a limit nothing is slowed down"


@pytest.mark.parametrize(("cost", "expected"), [(0.05, 1), (0.35, 4), (3.0, 32)])
def test_samples_become_as_rare_as_they_must(cost: float, expected: int):
    overhead, samples = simulated(0.01, steps=100_000, every=10, cost=cost)
    assert overhead.slowdown == expected
    assert samples * cost <= 0.01 * 100_000 + 4 * cost, "but for those before anything is known"


def test_a_second_is_free():
    overhead, samples = simulated(0.01, steps=60, every=6, cost=0.08)
    assert (overhead.slowdown, samples) == (1, 10)
    overhead, samples = simulated(0.01, steps=60, every=6, cost=0.5)
    assert overhead.slowdown > 1
    assert samples <= 6, "five before anything is known, and hardly any after"


def test_a_burst_of_noise_is_forgiven():
    clock = Clock()
    overhead = Overhead(0.01, clock.mark)
    for step in range(20_000):
        sampled = step % (10 * overhead.slowdown) == 0
        if overhead.end():
            decide(overhead, 20_000, 10, 0, 0)
        overhead.begin(sampled)
        clock.now += 1 + sampled * (2.0 if step < 100 else 0.05)
        if step == 90:
            assert overhead.slowdown > 1
    assert overhead.slowdown == 1


def test_what_happens_between_epochs_is_not_counted():
    clock = Clock()
    overhead = Overhead(None, clock.mark)
    for step in range(100):
        overhead.end()
        overhead.begin(step % 5 == 4)
        clock.now += 1.0
        if step % 5 == 4:
            overhead.pause()
            clock.now += 100.0  # an evaluation
    assert overhead.step_seconds == pytest.approx(1)
    assert overhead.sample_seconds is None, "the end of a step before a pause is not known"


@pytest.mark.parametrize(("total", "every"), [(20, 1), (400, 8), (2_500, 50), (10**6, 50)])
def test_a_run_that_states_no_cadence_has_fifty_samples(total: int, every: int):
    class Probe:
        name, needs = "probe", frozenset()

        def __init__(self) -> None:
            self.every = None

    observer = Observer(nn.Linear(2, 2), [Probe()], None, every=None, total_steps=total, max_records=10**6)
    sampled = [step for step in range(200) if observer(step) is not IDLE]
    assert sampled[0] == 0
    assert [step + 1 for step in sampled if step][:3] == [n * every for n in range(1, 5) if n * every > 1][:3]


def test_the_cost_is_recorded_and_a_resumed_run_keeps_the_cadence(tmp_path):
    fitted("stats.every=3", folder=tmp_path)
    found = RunDir(tmp_path).read()["statistics"]
    assert (found["samples"], found["every"]) == (3, 3)
    run, other = make_run("stats.every=2"), make_run("stats.every=2")
    run.observer.overhead.slowdown = 8
    other.restore(run.state.state_dict())
    assert other.observer.cadence == 8


class Dear:
    """Takes .2 s of the clock."""

    name, needs, every = "dear", frozenset(), None

    def __init__(self, clock: Clock):
        self.clock = clock

    def read(self, view) -> dict[str, torch.Tensor]:
        self.clock.now += 0.2
        return {"dear": torch.zeros(())}


class Turning(Listener):
    """A step takes 1 s, and writing a sample .1 s."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.sampled: list[int] = []

    def on_step(self, run, result) -> None:
        self.clock.now += 1

    def on_stats(self, run, record) -> None:
        self.clock.now += 0.1
        self.sampled.append(record["step"])


def test_a_short_run_begins_sparsely_and_keeps_to_its_second():
    """Its first update; then, with five others to compare with, one more; then what is left of the second."""
    run, clock = make_run("stats.every=null", "trainer.batch_size=2"), Clock()
    turning = Turning(clock)
    run.listeners.insert(0, turning)
    run.observer.overhead = Overhead(0.01, clock.mark, lambda: clock.now)
    run.observer.probes = [(Dear(clock), 2)]
    fit(run)
    assert turning.sampled == [1, 8, 64]
    assert clock.now - 100 == pytest.approx(3 * 0.3)
    assert run.observer.describe()["seconds"] == pytest.approx(3 * 0.3)


def test_a_sample_of_each_step_has_a_cost_that_is_told(tmp_path):
    fitted("stats.every=1", folder=tmp_path)
    found = RunDir(tmp_path).read()["statistics"]
    assert (found["samples"], found["every"]) == (8, 1)
    assert 0 < found["seconds"] < RunDir(tmp_path).read()["seconds"]


@pytest.mark.parametrize(("elements", "inside"), [(100, 1), (ONE_THREAD + 1, 2)])
def test_what_is_small_is_looked_at_by_one_thread(elements: int, inside: int):
    """Where other work has a core, each parallel operation waits for it."""
    before, aside = torch.get_num_threads(), Aside(torch.device("cpu"))
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError), aside(elements):
            assert torch.get_num_threads() == inside
            raise KeyError
        assert torch.get_num_threads() == 2
        assert aside.seconds > 0
    finally:
        torch.set_num_threads(before)
