"""Penalties against their sums written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cnnlab.losses import penalty


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))


def test_penalties_sum_over_weights_only(model):
    weights = torch.cat([model[0].weight.flatten(), model[3].weight.flatten()])
    torch.testing.assert_close(penalty.l1(model.parameters()), weights.abs().sum())
    torch.testing.assert_close(penalty.l2(model.parameters()), 0.5 * weights.square().sum())


def test_gradient_of_the_penalties(model):
    (3 * penalty.l2(model.parameters()) + 5 * penalty.l1(model.parameters())).backward()
    weight = model[0].weight
    torch.testing.assert_close(weight.grad, 3 * weight.detach() + 5 * weight.detach().sign())
    assert model[0].bias.grad is None
    assert model[1].weight.grad is None


def test_frozen_weights_are_not_penalized(model):
    model[3].weight.requires_grad_(False)
    torch.testing.assert_close(penalty.l1(model.parameters()), model[0].weight.abs().sum())


def test_without_weights_the_penalties_are_zero():
    assert penalty.l1([]) == 0
    assert penalty.l2([nn.Parameter(torch.ones(3))]) == 0


def test_l2_has_a_second_derivative_at_zero():
    weight = torch.zeros(2, 2, requires_grad=True)
    (slope,) = torch.autograd.grad(penalty.l2([weight]), weight, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), weight)
    torch.testing.assert_close(curvature, torch.ones(2, 2))
