"""Looking at a network leaves no trace in it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from cnnlab.inspect.untouched import kept, modes_kept, untouched, zeros


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU())
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    return model


def test_a_training_pass_leaves_no_trace():
    model = network()
    weight, before = model[0].weight.grad, copy.deepcopy(model)
    draws = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="on the way"), untouched(model):
        model.train().requires_grad_(True)
        assert all(p.grad is None for p in model.parameters())
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        assert not torch.equal(model[1].running_mean, before[1].running_mean), "there was something to put back"
        raise RuntimeError("on the way")
    assert torch.equal(torch.get_rng_state(), draws)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values()))
    assert model[0].weight.grad is weight and bool((weight == 1).all()), "the same tensor, with its values"
    assert model[1].weight.grad is None and model[0].bias.grad is None


def test_it_is_put_back_in_place():
    model = network()
    where = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    with untouched(model):
        model.train()(torch.randn(2, 3, 8, 8))
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == where


def test_values_and_modes_are_kept_alone():
    model, tensor = network(), torch.ones(3)
    with kept([tensor]), modes_kept(model):
        tensor.zero_()
        model.train()
    assert bool((tensor == 1).all()) and not model[1].training and model[0].training


def test_a_network_without_memory_or_weights():
    with torch.device("meta"):
        model = nn.BatchNorm2d(3)
    with untouched(model):
        assert model.eval()(zeros(model, (3, 4, 4))).shape == (1, 3, 4, 4)
    assert model.training
    with untouched(nn.ReLU()):
        pass
