"""The range test: what it suggests, and that it takes everything back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lab_runs import all_state, differences, make_run

from cnnlab.errors import UsageError
from cnnlab.train import fit, range_test
from cnnlab.train.range_test import RULES, RangeTest, smoothed

RATES = [10 ** (-5 + 0.06 * i) for i in range(100)]


def curve(lowest: float, rising: float) -> RangeTest:
    """A loss of 2 that falls from `lowest`/100 on to 1 at `lowest`, and is 2 again from `rising` on."""

    def loss(rate: float) -> float:
        x = math.log10(rate)
        low, high = math.log10(lowest), math.log10(rising)
        if x < low:
            return 2 - min(1.0, max(0.0, (x - low + 2) / 2))
        return 1 + (x - low) / (high - low)

    return RangeTest(RATES, [loss(rate) for rate in RATES], len(RATES))


def test_each_rule_finds_its_place_on_a_known_curve():
    found = curve(lowest=0.05, rising=0.4).suggestions()
    assert found["valley"] == pytest.approx(0.0063, rel=0.25)
    assert found["minimum"] == pytest.approx(0.005, rel=0.3)
    assert found["limit"] == pytest.approx(0.4 / 3, rel=0.2)
    assert 0.0005 < found["steep"] < 0.05


def test_a_loss_that_does_not_fall_gives_no_rate():
    flat = RangeTest(RATES, [2.3 + 0.01 * (-1) ** i for i in range(100)], 100)
    assert set(flat.suggestions().values()) == {None}
    with pytest.raises(UsageError, match="the loss does not fall at any rate up to"):
        flat.suggestion()


def test_a_curve_that_never_rises_has_no_limit():
    falling = RangeTest(RATES, [2 - 0.01 * i for i in range(100)], 100)
    assert falling.suggestions()["limit"] is None and falling.suggestions()["valley"] is not None
    with pytest.raises(UsageError, match="does not rise again"):
        falling.suggestion("limit")
    with pytest.raises(UsageError, match="expected one of valley"):
        falling.suggestion("nonesuch")


def test_easier_batches_before_the_fall_are_no_slope():
    losses = [curve(lowest=0.05, rising=0.4).losses[i] - (0.9 if i == 2 else 0) for i in range(100)]
    found = RangeTest(RATES, losses, 100).suggestions()
    assert 0.0005 < found["steep"] < 0.05 and 0.0005 < found["valley"] < 0.05


def test_smoothing_keeps_a_line_and_does_not_lag():
    assert smoothed([1.0 + 2 * i for i in range(20)], 3.0) == pytest.approx([1.0 + 2 * i for i in range(20)])
    step = smoothed([1.0] * 20 + [0.0] * 20, 2.0)
    assert (step[19] + step[20]) / 2 == pytest.approx(0.5)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("optim=adamw", "regularization.ema=0.9", "regularization.max_norm=1", "regularization.dropout=0.2"),
        ("optim=lbfgs", "optim.max_iter=2"),
        ("optim=newton_cg", "optim.max_iter=2"),
        ("optim=adam", "trainer.accumulate=2", "regularization.l2=0.01", "augment=standard"),
    ],
    ids=lambda overrides: " ".join(overrides[:1]),
)
def test_a_run_after_it_is_the_run_without_it(overrides: tuple[str, ...]):
    """Bit for bit: weights, buffers, optimizer, averages, clock, generators; before its first update and later."""
    run, control = make_run(*overrides), make_run(*overrides)
    before, random = all_state(run), torch.get_rng_state()
    found = range_test.range_test(run, steps=12)
    assert len(found.losses) >= 2
    assert differences(before, all_state(run)) == []
    assert torch.equal(random, torch.get_rng_state())
    assert fit(run) == fit(control)
    assert differences(all_state(control), all_state(run)) == []
    range_test.range_test(run, steps=10)
    assert differences(all_state(control), all_state(run)) == []


def test_an_interruption_takes_everything_back():
    run = make_run("optim=adam")
    before = all_state(run)

    def stop(number: int, rate: float, loss: float) -> None:
        if number == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        range_test.range_test(run, progress=stop)
    assert differences(before, all_state(run)) == []
    assert all(p.grad is None for p in run.model.parameters())


def test_the_rates_grow_evenly_and_the_losses_are_those_of_the_updates():
    run, seen = make_run("trainer.epochs=1", "data.limit=400"), []
    found = range_test.range_test(
        run, lowest=1e-4, highest=1e-2, steps=10, progress=lambda *figures: seen.append(figures)
    )
    assert found.rates[0] == pytest.approx(1e-4) and found.rates[-1] == pytest.approx(1e-2)
    assert [b / a for a, b in zip(found.rates, found.rates[1:])] == pytest.approx([100 ** (1 / 9)] * 9)
    assert seen == [(i + 1, *pair) for i, pair in enumerate(zip(found.rates, found.losses))]
    batch, count = next(run.loaders["train"].batches(0))
    assert found.losses[0] == pytest.approx(float(run.objective(batch, count).value()), rel=1e-5)


def test_a_rate_that_explodes_ends_the_curve():
    found = range_test.range_test(make_run("optim=sgd", "model=cnn"), lowest=1e-3, highest=1e6, steps=20)
    assert len(found.losses) < 20 and all(map(math.isfinite, found.losses))
    assert found.limit is not None


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"lowest": 0.0}, "expected 0 < lowest < highest"),
        ({"lowest": 1.0, "highest": 0.1}, "from 1 to 0.1"),
        ({"steps": 3}, "at least 10 steps"),
    ],
)
def test_a_range_that_is_none_is_refused(settings: dict[str, Any], told: str):
    with pytest.raises(UsageError, match=told):
        range_test.range_test(make_run(), **settings)


def test_every_rule_is_described():
    assert set(curve(0.05, 0.4).suggestions()) == set(RULES)
