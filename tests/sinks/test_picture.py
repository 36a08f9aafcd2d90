"""Depth over time as a picture: the colors mean what the legend says."""

from __future__ import annotations

import numpy as np
import pytest

from cnnlab.sinks.picture import (
    MAX_COLUMNS,
    MAX_ROWS,
    NON_FINITE,
    UNKNOWN,
    VIRIDIS,
    ZERO,
    History,
    Scale,
    depth_picture,
    enlarged,
)


def test_viridis_grows_evenly_in_lightness():
    luma = VIRIDIS.astype(float) @ (0.2126, 0.7152, 0.0722)
    assert VIRIDIS.shape == (256, 3)
    assert np.all(np.diff(luma) > -0.5) and luma[-1] - luma[0] > 180


def test_a_log_scale_maps_equal_factors_to_equal_steps_and_marks_what_has_no_logarithm():
    scale = Scale(1e-4, 1.0, log=True)
    colors = scale.colors(np.array([1e-4, 1e-2, 1.0, 0.0, np.inf, np.nan]))
    assert np.array_equal(colors[:3], VIRIDIS[[0, 128, 255]])
    assert [tuple(color) for color in colors[3:]] == [ZERO, NON_FINITE, UNKNOWN]


def test_a_linear_scale_keeps_zero_as_a_value():
    colors = Scale(0.0, 1.0, log=False).colors(np.array([0.0, 1.0]))
    assert np.array_equal(colors, VIRIDIS[[0, 255]])


def test_one_early_peak_does_not_darken_the_rest():
    values = np.concatenate([np.geomspace(0.1, 10, 999), [1e30]])
    assert Scale.of(values, log=True).high < 11


def test_noise_is_not_stretched_to_the_full_scale():
    scale = Scale.of(np.array([1.0, 1.01]), log=True)
    assert scale.high / scale.low == pytest.approx(10)


@pytest.mark.parametrize("values", [[np.nan, np.nan], [0.0, 0.0], [-1.0, np.inf]])
def test_a_picture_without_a_usable_value_is_still_drawn(values):
    history = History(["a", "b"])
    history.add(1, values)
    assert depth_picture("t", history).dtype == np.uint8


def test_rows_are_depth_and_columns_are_time():
    history = History(["first", "middle", "last"])
    for step in range(4):
        history.add(step, [10.0**-step, 1.0, np.inf if step == 3 else 1.0])
    picture = depth_picture("activation std", history)
    left, top, wide, tall = 8, 22, 48, 24
    heat = picture[top + tall // 2 : top + 3 * tall : tall, left + wide // 2 : left + 4 * wide : wide]
    assert heat.shape == (3, 4, 3)
    lightness = heat.astype(float).sum(axis=2)
    assert np.all(np.diff(lightness[0]) < 0), "the first layer fades with time"
    assert np.array_equal(heat[1, 0], heat[1, 3])
    assert tuple(heat[2, 3]) == NON_FINITE


def test_memory_is_bounded_in_depth_and_time_and_the_whole_run_stays():
    history = History([f"layer{i}" for i in range(1202)])
    for step in range(5000):
        history.add(step, np.ones(1202))
    values = history.values()
    assert values.shape[0] == MAX_ROWS and MAX_COLUMNS // 2 <= values.shape[1] < MAX_COLUMNS
    assert history.steps[0] == 0 and history.steps[-1] > 4900
    assert len(set(np.diff(history.steps))) == 1


@pytest.mark.parametrize("sick", [1e-9, 0.0, np.nan, np.inf, 1e9])
def test_one_sick_layer_of_a_thousand_has_a_row(sick):
    history = History([f"layer{i}" for i in range(1000)])
    values = np.ones(1000)
    values[617] = sick
    history.add(1, values)
    column = history.values()[:, 0]
    (row,) = np.flatnonzero(~(column == 1.0))
    assert abs(row - 617 * MAX_ROWS / 1000) < 1


def test_enlarging_repeats_pixels():
    small = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert np.array_equal(enlarged(small, least=4)[::2, ::2], small)
    assert enlarged(np.zeros((100, 5, 3), np.uint8), least=96).shape == (100, 5, 3)
