"""Expectations over Gaussian pre-activations, against closed forms."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from cnnlab.diagnose.gaussian import Activation, Moments, activated, expectation

DEGREES = [0.0, 10.0, 45.0, 90.0, 135.0, 180.0]


def pair(second: float, correlation: float, mean: float = 0.0) -> Moments:
    """Two inputs, one place."""
    around = second - mean**2
    values = (mean, second, correlation * around + mean**2)
    return Moments(*(torch.full((2, 1, 1), value, dtype=torch.float64) for value in values))


def value(moments: torch.Tensor) -> float:
    return float(moments[0, 0, 0])


def test_a_kink_at_zero_costs_no_accuracy():
    assert expectation(torch.abs) == pytest.approx(math.sqrt(2 / math.pi), rel=1e-10)
    assert expectation(torch.square, mean=3.0, std=2.0) == pytest.approx(13, rel=1e-12)
    assert expectation(torch.exp, std=1.5) == pytest.approx(math.exp(1.125), rel=1e-10)


@pytest.mark.parametrize("second", [1e-20, 0.3, 1.0, 50.0])
def test_a_rectifier_keeps_half_as_he_says(second: float):
    """He et al. 2015, equations 7 to 9: E ReLU(z)² = Var(z)/2, and half of the gradient's second moment passes."""
    after, slope = activated(F.relu, pair(second, 0.5))
    assert value(after.second) == pytest.approx(second / 2, rel=1e-10)
    assert value(after.mean) == pytest.approx(math.sqrt(second / (2 * math.pi)), rel=1e-10)
    assert value(slope) == pytest.approx(0.5, rel=1e-10)


@pytest.mark.parametrize("degrees", DEGREES)
def test_angles_behind_a_rectifier_are_those_of_the_arc_cosine_kernel(degrees: float):
    """Cho & Saul 2009, equations 3 and 6: cos θ' = (sin θ + (π - θ) cos θ)/π."""
    theta = math.radians(degrees)
    after, _ = activated(F.relu, pair(2.0, math.cos(theta)))
    expected = (math.sin(theta) + (math.pi - theta) * math.cos(theta)) / math.pi
    assert value(after.cross) / value(after.second) == pytest.approx(expected, abs=2e-4)
    assert after.angle == pytest.approx(math.degrees(math.acos(min(1, expected))), abs=0.1)


@pytest.mark.parametrize("slope", [0.01, 0.25])
def test_a_leaky_rectifier_is_a_mixture_of_a_rectifier_and_a_line(slope: float):
    """He et al. 2015, equation 15: (1 + a²)/2."""
    after, gradient = activated(partial(F.leaky_relu, negative_slope=slope), pair(3.0, 0.2))
    assert value(after.second) == pytest.approx(3 * (1 + slope**2) / 2, rel=1e-10)
    assert value(gradient) == pytest.approx((1 + slope**2) / 2, rel=1e-10)


@pytest.mark.parametrize("second", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("correlation", [-1.0, -0.5, 0.0, 0.9, 1.0])
def test_the_error_function_has_williams_closed_form(second: float, correlation: float):
    """Williams 1998, equation 11: E erf(z) erf(z') = (2/π) arcsin(2c/(1 + 2q)) of covariance c and variance q."""
    after, slope = activated(torch.erf, pair(second, correlation))
    angle = 2 * second / (1 + 2 * second)
    assert value(after.second) == pytest.approx(2 / math.pi * math.asin(angle), rel=1e-9)
    assert value(after.cross) == pytest.approx(2 / math.pi * math.asin(angle * correlation), abs=2e-4)
    assert value(slope) == pytest.approx(4 / math.pi / math.sqrt(1 + 4 * second), rel=1e-7)


@pytest.mark.parametrize("activation", [F.gelu, F.silu, F.elu, torch.tanh, torch.sigmoid, F.relu6, F.hardswish])
def test_any_activation_agrees_with_draws(activation: Activation):
    mean, second, correlation = 0.4, 1.7, 0.6
    after, slope = activated(activation, pair(second, correlation, mean))
    draws = torch.randn(2, 400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    std = math.sqrt(second - mean**2)
    left = (mean + std * draws[0]).requires_grad_()
    right = mean + std * (correlation * draws[0] + math.sqrt(1 - correlation**2) * draws[1])
    (slopes,) = torch.autograd.grad(activation(left).sum(), left)
    left, right = activation(left.detach()), activation(right)
    expected = (left.mean(), left.square().mean(), (left * right).mean(), slopes.square().mean())
    found = (after.mean, after.second, after.cross, slope)
    tolerance = 3e-2 if activation is F.relu6 else 1e-2  # its slope jumps between two nodes
    assert [value(moment) for moment in found] == pytest.approx([float(e) for e in expected], rel=tolerance)


def test_two_inputs_that_are_one_stay_one():
    after, _ = activated(torch.tanh, pair(1.3, 1.0))
    assert value(after.cross) == pytest.approx(value(after.second), rel=1e-12)
    assert after.signal == pytest.approx(0, abs=1e-6)


def test_places_may_be_many():
    """They are taken in pieces: what one piece gives does not depend on the others."""
    second = torch.rand(3, 1, 150, 150, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, _ = activated(torch.tanh, Moments(torch.zeros_like(second), second, 0.5 * second))
    corner = second[:, :, -1:, -1:]
    alone, _ = activated(torch.tanh, Moments(torch.zeros_like(corner), corner, 0.5 * corner))
    torch.testing.assert_close(whole.second[:, :, -1:, -1:], alone.second)
    torch.testing.assert_close(whole.cross[:, :, -1:, -1:], alone.cross)
