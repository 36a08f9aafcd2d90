"""The step that `auto` settles on: what works here, and compiled only where it pays."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import torch
from lab_runs import bits, make_run, watched
from torch import nn

from cnnlab.observe.taps import Taps
from cnnlab.protocols import Batch
from cnnlab.train.run import Run
from cnnlab.train.steps import trial
from cnnlab.train.steps.eager import EagerStep


class Paced(EagerStep):
    """Takes `pace` seconds a rehearsal, the first time `cost` more."""

    pace = 0.0
    cost = 0.0
    error: Exception | None = None

    def rehearse(self, batch: Batch, count: int) -> None:
        if self.error is not None:
            raise self.error
        time.sleep(self.pace + self.cost)
        self.cost = 0.0
        super().rehearse(batch, count)


class Other(Paced):
    name = "compiled"


def paced(cls: type[Paced], run: Run, pace: float = 0.0, error: Exception | None = None) -> Paced:
    step = cls(run.step.forward, run.optimizer, run.step.parameters, seed=0, ranks=run.ranks)  # type: ignore[arg-type]
    step.pace, step.error = pace, error
    return step


@pytest.fixture
def run() -> Run:
    return make_run("stats.every=2")


def settle(run: Run, eager: EagerStep, compiled: Callable[[], EagerStep], steps: int = 10**6, **options: float):
    return trial.compiled_if_it_pays(eager, compiled, lambda: next(run.loaders["train"].batches(0)), steps, **options)


def test_the_faster_step_is_taken_and_the_figures_are_told(run: Run):
    slow, fast = paced(Paced, run, 0.05), paced(Other, run)
    step, notice = settle(run, slow, lambda: fast)
    assert step is fast
    assert notice is not None and notice.startswith("step: compiled (") and "ms eager" in notice
    fast, slow = paced(Paced, run), paced(Other, run, 0.05)
    step, notice = settle(run, fast, lambda: slow)
    assert step is fast
    assert notice is not None and "does not pay" in notice


@pytest.mark.parametrize("steps", [trial.MIN_STEPS - 1, trial.MIN_STEPS])
def test_a_short_run_is_not_kept_waiting(run: Run, steps: int):
    def compile_() -> EagerStep:
        raise AssertionError("nothing to win here")

    step, notice = settle(run, run.step, compile_, steps)
    assert (step, notice) == (run.step, None)


def test_a_deep_network_must_run_longer_before_a_trial_pays(run: Run):
    """Compiling a thousand layers takes a quarter of an hour."""
    seconds = trial.compile_seconds(run.model)
    deep = nn.Sequential(*(nn.ReLU() for _ in range(3600)))
    assert trial.compile_seconds(deep) > 900 > 60 > seconds
    compiled = paced(Other, run)
    for share, tried in ((1e-9, False), (1e9, True)):
        _, notice = settle(run, paced(Paced, run, 0.01), lambda: compiled, steps=trial.MIN_STEPS, share=share)
        assert (notice is not None) is tried


def test_what_cannot_be_compiled_runs_eagerly_and_says_why(run: Run):
    broken = paced(Other, run, error=RuntimeError("\n  a graph break\nin line 3"))
    step, notice = settle(run, run.step, lambda: broken)
    assert step is run.step
    assert notice == "step: eager, as torch.compile refuses this network (a graph break)"


def test_the_taps_are_open_for_a_compiled_step_only(run: Run):
    seen: dict[str, set[bool]] = {"eager": set(), "compiled": set()}
    taps = run.observer.taps
    assert isinstance(taps, Taps)

    class Watched(Paced):
        def rehearse(self, batch: Batch, count: int) -> None:
            seen[self.name].add(taps.open)

    class WatchedToo(Watched):
        name = "compiled"

    settle(run, paced(Watched, run), lambda: paced(WatchedToo, run), share=math.inf, taps=taps)  # type: ignore[arg-type]
    assert seen == {"eager": {False}, "compiled": {True}}


def test_a_rehearsal_leaves_no_trace():
    overrides = ("model=cnn", "regularization.dropout=0.3", "augment=standard", "optim=momentum", "norm=batch")
    plain, expected = watched(*overrides)
    run = make_run(*overrides)
    batch, count = next(run.loaders["train"].batches(0))
    before = {name: bits(tensor).clone() for name, tensor in run.model.state_dict().items()}
    run.step.rehearse(batch, count)
    assert all(torch.equal(before[name], bits(tensor)) for name, tensor in run.model.state_dict().items())
    assert all(p.grad is None for p in run.step.parameters)
    assert not run.optimizer.state


def test_a_compiled_step_that_was_chosen_is_the_one_that_a_resumed_run_takes(monkeypatch: pytest.MonkeyPatch):
    def always(eager, make_compiled, *args, **options):
        return make_compiled(), "step: compiled (told so)"

    monkeypatch.setattr(trial, "compiled_if_it_pays", always)
    run = make_run("stats.every=2")
    assert run.step.name == "compiled"
    assert run.observer.taps is not None and run.observer.taps.open
    assert "step: compiled (told so)" in run.notices
    assert run.facts["step"].startswith("compiled, ")
    assert run.state.state_dict()["origin"]["choices"]["step"] == "compiled"
    forced = make_run("stats.every=2", "trainer.step=eager")
    assert forced.step.name == "eager"
    assert forced.observer.taps is not None and not forced.observer.taps.open
