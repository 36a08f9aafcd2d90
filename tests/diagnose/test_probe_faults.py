"""Verdicts: what is flagged, where, and what is left alone."""

from __future__ import annotations

import pytest
import torch
from nets import plain, signals
from torch import nn

from cnnlab.diagnose.probe_faults import faults
from cnnlab.init import Constant, Default, He, LeCun, Normal, Orthogonal, Xavier, Zeros
from cnnlab.models.resnet import CifarResNet


def kinds(model: nn.Module, init: He) -> list[str]:
    init(model, 0)
    return [finding.kind for finding in faults(signals(model), model)]


@pytest.mark.parametrize(
    ("activation", "norm", "init"),
    [
        (nn.ReLU, False, He(mode="fan_in")),
        (nn.ReLU, True, Default()),
        (nn.ReLU, True, Normal(0.01)),
        (nn.Tanh, False, Xavier()),
        (nn.Tanh, False, LeCun()),
        (nn.Tanh, False, Orthogonal()),
        (nn.Tanh, True, He()),
    ],
)
def test_nothing_is_said_of_thirty_layers_that_are_fine(activation: type[nn.Module], norm: bool, init: He):
    assert kinds(plain(activation, norm=norm), init) == []


@pytest.mark.parametrize(
    ("activation", "init"),
    [(nn.ReLU, Xavier()), (nn.ReLU, Default()), (nn.Tanh, Default()), (nn.Sigmoid, Xavier()), (nn.ReLU, Normal(0.01))],
)
def test_thirty_layers_without_norm_die_under_an_init_that_is_not_theirs(activation: type[nn.Module], init: He):
    assert kinds(plain(activation), init) == ["fades", "gradient fades"]


def test_the_layer_is_the_one_that_theory_names():
    """Under Xavier a rectifier halves the second moment: a thousandth is left after 20 layers (He et al. 2015)."""
    model = plain(width=128, depth=24)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"
            module._reversed_padding_repeated_twice = [1, 1, 1, 1]
    Xavier()(model, 0)
    (forward, _) = faults(signals(model), model)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.ReLU)]
    assert names.index(forward.layer) + 1 == pytest.approx(20, abs=3)
    assert forward.factor == pytest.approx(0.5**0.5, rel=0.1)
    assert f"the signal dies at {forward.layer} (layer {names.index(forward.layer) + 1} of 24)" in forward.text


def test_a_signal_that_grows():
    assert kinds(plain(depth=12), He(mode="fan_in")) == []
    assert kinds(plain(depth=12), Normal(0.2))[0] == "grows"


def test_units_that_are_all_the_same():
    assert "alike" in kinds(plain(depth=3), Constant(0.01))
    assert kinds(plain(depth=3), Zeros())[:1] == ["fades"]


def test_a_classifier_of_zeros_is_no_fault():
    model = plain(depth=3)
    He()(model, 0)
    assert isinstance(model[-1], nn.Linear)
    nn.init.zeros_(model[-1].weight)
    assert faults(signals(model), model) == []


def test_what_is_not_finite_is_named():
    model = plain(depth=3)
    He()(model, 0)
    assert isinstance(model[2], nn.Conv2d)
    with torch.no_grad():
        model[2].weight[0, 0, 0, 0] = torch.inf
    (found,) = faults(signals(model), model)
    assert (found.kind, found.layer) == ("not finite", "3")


@pytest.mark.parametrize("zero", [False, True])
def test_residual_networks_are_fine(zero: bool):
    model = CifarResNet(num_classes=5, in_channels=3, image_size=(6, 6), depth=20, width=8)
    assert kinds(model, He(zero_residual=zero)) == []
