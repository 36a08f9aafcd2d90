"""The strips find what a person would find in the numbers, and nothing in a healthy net."""

from __future__ import annotations

import math

import pytest
from sink_helpers import stats_record

from cnnlab.sinks.health import COLUMNS, Verdict, health


def strips(record):
    return {strip.title: strip for strip in health(record)}


def test_a_healthy_network_is_good_throughout():
    found = strips(stats_record(5, layers=20))
    assert list(found) == ["activation std", "dead units", "gradient std", "update/weight"]
    assert all(strip.verdict is Verdict.GOOD and strip.words == "" for strip in found.values())


def test_he_and_xavier_at_thirty_layers_as_measured():
    """Activation std and gradient ratio of 30 conv-ReLU layers (research/diagnostics.md, He et al. 2015)."""
    he = [1.36 * (0.96 / 1.36) ** (layer / 29) for layer in range(30)]
    xavier = [0.96 * (2.9e-5 / 0.96) ** (layer / 29) for layer in range(30)]
    back_he = [1e-3 * 0.717 ** (1 - layer / 29) for layer in range(30)]
    back_xavier = [1e-3 * 3.3e-5 ** (1 - layer / 29) for layer in range(30)]
    good = strips(stats_record(1, 30, **{"activation/std": he, "activation_gradient/std": back_he}))
    bad = strips(stats_record(1, 30, **{"activation/std": xavier, "activation_gradient/std": back_xavier}))
    assert good["activation std"].verdict is Verdict.GOOD and good["gradient std"].verdict is Verdict.GOOD
    assert bad["activation std"].verdict is Verdict.BAD and "layer29" in bad["activation std"].words
    assert bad["gradient std"].verdict is Verdict.BAD and "layer0" in bad["gradient std"].words
    assert bad["activation std"].cells[0].verdict is Verdict.GOOD, "the first layer is not to blame"


@pytest.mark.parametrize(
    ("quantity", "values", "verdict"),
    [
        ("activation/std", [1.0, 20.0, 1.0], Verdict.WATCH),
        ("activation/std", [1.0, 0.0, 1.0], Verdict.BAD),
        ("activation/std", [1.0, math.nan, 1.0], Verdict.BAD),
        ("activation/std", [1.0, math.inf, 1.0], Verdict.BAD),
        ("activation/dead", [0.0, 0.2, 0.0], Verdict.WATCH),
        ("activation/dead", [0.0, 0.6, 0.0], Verdict.BAD),
        ("activation_gradient/std", [1.0, 100.0, 1.0], Verdict.BAD),
        ("activation_gradient/std", [1e-3, 0.0, 1e-3], Verdict.BAD),
        ("activation_gradient/std", [1e-1, 1e-4, 1e-1], Verdict.WATCH),
        ("update/ratio", [1e-3, 0.05, 1e-3], Verdict.WATCH),
        ("update/ratio", [1e-3, 0.5, 1e-3], Verdict.BAD),
        ("update/ratio", [1e-3, 0.0, 1e-3], Verdict.BAD),
        ("activation/saturated", [0.0, 0.7, 0.0], Verdict.BAD),
    ],
)
def test_thresholds(quantity, values, verdict):
    (strip,) = health({"step": 1, "layers": ["a", "b", "c"], "tensors": ["a", "b", "c"], quantity: values})
    assert strip.verdict is verdict
    assert [cell.verdict for cell in strip.cells].index(verdict) == 1
    assert strip.words.startswith("b: ")


def test_biases_start_at_zero_and_are_not_judged():
    (strip,) = health({"tensors": ["a.weight", "a.bias"], "update/ratio": [1e-3, 5.0]})
    assert len(strip.cells) == 1 and strip.verdict is Verdict.GOOD


def test_a_tensor_without_a_ratio_is_unknown_not_bad():
    (strip,) = health({"layers": [], "tensors": ["w", "v"], "update/ratio": [1e-3, None]})
    assert [cell.verdict for cell in strip.cells] == [Verdict.GOOD, Verdict.UNKNOWN]
    assert strip.cells[1].height is None and strip.verdict is Verdict.GOOD


def test_updates_are_judged_as_at_the_full_rate():
    record = {"layers": [], "tensors": ["w"], "update/ratio": [2e-6]}
    assert health(record)[0].verdict is Verdict.WATCH
    assert health(record, annealed=0.01)[0].verdict is Verdict.GOOD


def test_updates_are_not_judged_where_they_are_rounded_away():
    assert health({"layers": [], "tensors": ["w"], "update/ratio": [0.0]}, annealed=1e-3) == []


@pytest.mark.parametrize(
    ("quantity", "values"), [("activation/dead", [0.6, 0.9, 0.7]), ("update/ratio", [0.2, 0.9, 0.3])]
)
def test_the_worst_of_several_sick_layers_is_named(quantity, values):
    (strip,) = health({"layers": ["a", "b", "c"], "tensors": ["a", "b", "c"], quantity: values})
    assert strip.words.startswith("b: ")


def test_zeros_stand_in_where_no_death_is_known():
    record = stats_record(1, 3, **{"activation/zeros": [0.5, 0.995, 0.5]})
    assert "zeros" not in strips(record)
    del record["activation/dead"]
    assert strips(record)["zeros"].verdict is Verdict.BAD


def test_a_thousand_layers_share_cells_and_one_sick_layer_stays_visible():
    values = [1.0] * 1000
    values[617] = 1e-9
    strip = strips(stats_record(1, 1000, **{"activation/std": values}))["activation std"]
    assert len(strip.cells) == COLUMNS
    assert [position for position, cell in enumerate(strip.cells) if cell.verdict is Verdict.BAD] == [
        617 * COLUMNS // 1000
    ]
    assert "layer617" in strip.words


def test_a_factor_of_two_is_no_cliff():
    strip = strips(stats_record(1, 2, **{"activation/std": [1.0, 2.0]}))["activation std"]
    low, high = (cell.height for cell in strip.cells)
    assert 0 < high - low < 0.2
