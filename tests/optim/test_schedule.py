"""Schedules against torch.optim.lr_scheduler and closed forms."""

from __future__ import annotations

import math
import re
import warnings

import pytest
import torch
from lab_runs import make_run
from torch.optim import lr_scheduler

from cnnlab.optim.schedule import Constant, Cosine, Exponential, OneCycle, Plateau, Polynomial, Step

TOTAL, PER_EPOCH, BATCH = 40, 10, 8
SCHEDULES = {
    "constant": Constant,
    "step": Step,
    "exponential": Exponential,
    "cosine": Cosine,
    "polynomial": Polynomial,
    "plateau": Plateau,
}


def factors(schedule, total=TOTAL):
    schedule.resolve(steps_per_epoch=PER_EPOCH, total_steps=total, batch_size=BATCH)
    return [schedule.factor(step, total) for step in range(total)]


def torch_factors(make, total=TOTAL):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of its own use of `epoch` in SequentialLR
            scheduler.step()
    return found


def one_cycle(optimizer, **options):
    return lr_scheduler.OneCycleLR(optimizer, 1.0, TOTAL, cycle_momentum=False, **options)


def warm_cosine(optimizer):
    parts = [
        lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10),
        lr_scheduler.CosineAnnealingLR(optimizer, TOTAL - 10),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, [10])


EQUALS = {
    "cosine": (Cosine(0.1, warmup=None), lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL, eta_min=0.1)),
    "step": (Step(("50 %", "30 steps"), 0.3), lambda o: lr_scheduler.MultiStepLR(o, [20, 30], 0.3)),
    "fractions": (Step((0.5, 0.75), 0.1), lambda o: lr_scheduler.MultiStepLR(o, [20, 30], 0.1)),
    "polynomial": (Polynomial(0.9), lambda o: lr_scheduler.PolynomialLR(o, TOTAL, 0.9)),
    "exponential": (Exponential(0.9, "1 step"), lambda o: lr_scheduler.ExponentialLR(o, 0.9)),
    "staircase": (Exponential(0.5, "1 epoch"), lambda o: lr_scheduler.StepLR(o, PER_EPOCH, 0.5)),
    "one_cycle": (
        OneCycle(0.3, 0.04, 4e-6),
        lambda o: one_cycle(o, pct_start=0.3, final_div_factor=1e4),
    ),
    "one_cycle_linear": (
        OneCycle(0.4, 0.1, 0.01, anneal="linear"),
        lambda o: one_cycle(o, pct_start=0.4, div_factor=10, final_div_factor=10, anneal_strategy="linear"),
    ),
    "warmup": (
        Constant(warmup="8 steps", warmup_start=0.2),
        lambda o: lr_scheduler.LinearLR(o, start_factor=0.2, total_iters=8),
    ),
    "cosine_warmup": (Cosine(0.0, warmup="1 epoch", warmup_start=0.1), warm_cosine),
}


@pytest.mark.parametrize(("ours", "theirs"), EQUALS.values(), ids=EQUALS)
def test_equal_to_torch(ours, theirs):
    assert factors(ours) == pytest.approx(torch_factors(theirs), rel=1e-6, abs=1e-9)


def test_exponential_without_stairs_falls_at_every_step():
    smooth = factors(Exponential(0.5, "1 epoch", staircase=False))
    assert smooth == pytest.approx([0.5 ** (step / 10) for step in range(TOTAL)])


@pytest.mark.parametrize(
    ("warmup", "steps"), [("10 %", 4), ("5 steps", 5), ("1 epoch", 10), ("32 examples", 4), (None, 0)]
)
def test_warmup_takes_any_duration(warmup, steps):
    found = factors(Constant(warmup=warmup, warmup_start=0.0))
    assert found == pytest.approx([min(1.0, step / steps) if steps else 1.0 for step in range(TOTAL)])


@pytest.mark.parametrize("name", SCHEDULES)
def test_any_length_of_run_has_finite_factors_between_zero_and_one(name):
    for total in (1, 2, 3, 7, 100):
        for warmup in (None, "5 %", "50 steps"):
            found = factors(SCHEDULES[name](warmup=warmup), total)
            assert all(0 <= factor <= 1 + 1e-12 for factor in found)
    assert all(0 <= factor <= 1 + 1e-12 for total in (1, 2, 3, 7) for factor in factors(OneCycle(), total))


def test_a_longer_run_stretches_the_curve():
    schedule = Cosine(warmup="10 %")
    short = factors(schedule, 40)
    long = factors(schedule, 80)
    assert long[::2] == pytest.approx(short)


def test_steps_past_the_end_keep_the_last_value():
    assert Cosine(0.25, warmup=None).factor(50, 40) == pytest.approx(0.25)


def test_epochs_need_to_be_resolved():
    with pytest.raises(RuntimeError, match=r"resolve\(\)"):
        Constant(warmup="1 epoch").factor(0, 10)
    assert Constant(warmup="10 %").factor(0, 10) == 0.01


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="expected a duration"):
        Cosine(warmup="a while")
    with pytest.raises(ValueError, match='"30 steps"'):
        Step((30.0,))
    with pytest.raises(ValueError, match="at least one step"):
        Cosine().resolve(steps_per_epoch=0, total_steps=10, batch_size=1)


# --- plateau


@pytest.mark.parametrize("better", ["min", "max"])
@pytest.mark.parametrize(("patience", "cooldown"), [(0, 0), (2, 0), (1, 2)])
def test_plateau_equals_torch(better, patience, cooldown):
    values = torch.rand(60, generator=torch.Generator().manual_seed(0)).tolist()
    ours = Plateau(decay=0.5, patience=patience, cooldown=cooldown, threshold=0.05, min_factor=1e-3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = lr_scheduler.ReduceLROnPlateau(
        optimizer,
        better,
        factor=0.5,
        patience=patience,
        cooldown=cooldown,
        threshold=0.05,
        min_lr=1e-3,
        eps=0,
    )
    for value in values:
        ours.observe(value, better)
        theirs.step(value)
        assert ours.factor(0, 10) == pytest.approx(optimizer.param_groups[0]["lr"])


def test_plateau_resumes_where_it_stopped():
    values = [1.0, 0.9, 0.95, 0.94, 0.93, 0.92, 0.91, 0.9]
    whole, first = Plateau(patience=1), Plateau(patience=1)
    for value in values[:4]:
        whole.observe(value, "min")
        first.observe(value, "min")
    resumed = Plateau(patience=1)
    resumed.load_state_dict(first.state_dict())
    for value in values[4:]:
        whole.observe(value, "min")
        resumed.observe(value, "min")
        assert whole.factor(5, 10) == resumed.factor(5, 10)
    assert whole.state_dict() == resumed.state_dict()


def test_plateau_takes_nan_for_no_better():
    schedule = Plateau(decay=0.1, patience=0)
    schedule.observe(math.nan, "max")
    assert schedule.factor(0, 1) == pytest.approx(0.1)
    schedule.observe(0.5, "max")
    assert schedule.factor(0, 1) == pytest.approx(0.1)


def test_only_the_plateau_remembers():
    assert Cosine().state_dict() == {}
    Cosine().load_state_dict({})


# --- lengths that do not fit


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "step"])  # whose shares of the run fall inside
@pytest.mark.parametrize("warmup", ["500 steps", "50 epochs", "4000 examples"])
def test_a_warmup_longer_than_the_run_keeps_its_length_and_says_so(name, warmup):
    schedule = SCHEDULES[name](warmup=warmup, warmup_start=0.1)
    assert factors(schedule) == pytest.approx([0.1 + 0.9 * step / 500 for step in range(TOTAL)])
    said = schedule.notices(TOTAL)
    assert "this run of 40 steps ends within the warm-up of 500, at 0.17 times" in said[0]
    longer = factors(schedule, 1000)
    assert longer[:TOTAL] == pytest.approx(factors(schedule)) and longer[500] == pytest.approx(1, abs=0.5)


def test_a_percentage_of_more_than_the_run_is_refused():
    for make in (lambda: Cosine(warmup="101 %"), lambda: Step(("150 %",)), lambda: Exponential(every="200 %")):
        with pytest.raises(ValueError, match="at most 100 % of the run"):
            make()
    with pytest.raises(ValueError, match="longer than nothing"):
        Exponential(every="0 steps")


def test_milestones_are_counted_from_the_runs_start_inside_the_warmup_too():
    found = factors(Step(("10 %",), 0.5, warmup="20 steps", warmup_start=1.0))
    assert found == [1.0] * 4 + [0.5] * 36


@pytest.mark.parametrize(
    ("schedule", "word"),
    [
        (Step(("10 steps", "40 steps", "7 epochs")), r"2 of 3 milestones \(step 40, 70\) come after this run of 40"),
        (Exponential(0.5, "40 steps"), "interval of 40 steps is longer"),
        (Exponential(0.5, "1 example"), "less than a step"),
        (Exponential(0.5, "30 steps", warmup="10 steps"), "interval of 30 steps is longer"),
    ],
)
def test_what_never_comes_about_is_said(schedule, word):
    schedule.resolve(steps_per_epoch=PER_EPOCH, total_steps=TOTAL, batch_size=BATCH)
    (said,) = schedule.notices(TOTAL)
    assert re.search(word, said)


@pytest.mark.parametrize(
    "schedule", [Cosine(), Step(), Exponential(), OneCycle(), Plateau(), Constant(warmup="39 steps")]
)
def test_of_lengths_that_fit_nothing_is_said(schedule):
    schedule.resolve(steps_per_epoch=PER_EPOCH, total_steps=TOTAL, batch_size=BATCH)
    assert schedule.notices(TOTAL) == []


def test_a_run_passes_it_on():
    run = make_run("schedule.warmup=500 steps", "trainer.max_steps=3")
    assert any("this run of 3 steps ends within the warm-up of 500" in notice for notice in run.notices)
