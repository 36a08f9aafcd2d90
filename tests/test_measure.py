"""Norms and moments against NumPy and single tensors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from cnnlab import measure


def tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((3, 4), (5,), (2, 3, 3, 3), ())]


def test_norms_are_those_of_each_tensor():
    expected = [np.linalg.norm(t.numpy().ravel()) for t in tensors()]
    assert measure.norms(tensors()).tolist() == pytest.approx(expected, rel=1e-6)
    assert measure.total_norm(tensors()).item() == pytest.approx(np.linalg.norm(expected), rel=1e-6)


def test_norms_of_half_precision_are_taken_in_float32():
    tensor = torch.full((1000,), 300.0, dtype=torch.float16)  # its square, 9e4, is no float16
    assert measure.norms([tensor]).item() == pytest.approx(300 * math.sqrt(1000), rel=1e-5)


def test_one_non_finite_element_shows_in_the_total_norm():
    broken = [*tensors(), torch.tensor([1.0, float("nan")])]
    assert not measure.total_norm(broken).isfinite()


def test_update_ratios_are_relative_and_skip_tensors_of_norm_zero():
    before = [torch.tensor([3.0, 4.0]), torch.zeros(3)]
    after = [torch.tensor([3.0, 4.5]), torch.ones(3)]
    ratio = measure.update_ratios(before, after)
    assert ratio[0].item() == pytest.approx(0.1)
    assert ratio[1].isnan()


def test_nothing_to_measure_gives_nothing():
    assert measure.norms([]).shape == measure.update_ratios([], []).shape == (0,)
    assert measure.total_norm([]).item() == 0


def test_a_parameter_without_gradient_has_a_gradient_of_zeros():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    (2 * used).sum().backward()
    assert [g.tolist() for g in measure.gradients_of([used, unused])] == [[2, 2], [0, 0, 0]]


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_merged_moments_are_those_of_the_groups_taken_together(offset: float):
    generator = np.random.default_rng(0)
    groups = [offset + generator.normal(size=n) for n in (5, 1, 40)]
    rows = torch.tensor([[len(g), g.mean(), g.std()] for g in groups] + [[0, math.nan, math.nan]])
    mean, std = measure.merge_moments(*rows.unbind(1))
    together = np.concatenate(groups)
    assert mean.item() == pytest.approx(together.mean(), rel=1e-6, abs=1e-6)
    assert std.item() == pytest.approx(together.std(), rel=2e-3)


def test_moments_of_no_group_are_nan():
    mean, std = measure.merge_moments(torch.zeros(2), torch.zeros(2), torch.zeros(2))
    assert mean.isnan()
    assert std.isnan()


def test_lists_of_tensors_are_vectors():
    left, right = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])], [torch.tensor([4.0, 5.0]), torch.tensor([[6.0]])]
    assert measure.dot(left, right).item() == 32
    assert [t.tolist() for t in measure.moved(left, right, -2)] == [[-7, -8], [[-9]]]
    assert [t.tolist() for t in measure.normalized([torch.tensor([3.0]), torch.tensor([4.0])])] == [
        [0.6000000238418579],
        [0.800000011920929],
    ]
    assert measure.normalized([torch.zeros(2)])[0].tolist() == [0, 0]


def test_a_hessian_vector_product_of_a_cubic():
    """f = Σ x³ + x·c·y, with y linear: H = [[6x, c], [c, 0]]."""
    x, y = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    slopes = torch.autograd.grad((x**3).sum() + 5 * x[0] * y[0], [x, y], create_graph=True)
    products = measure.hessian_vector_products(slopes, [x, y], [torch.tensor([1.0, 1.0]), torch.tensor([2.0])])
    assert [p.tolist() for p in products] == [[16, 12], [5]]
