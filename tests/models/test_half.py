"""Convolutions that oneDNN gets wrong in half precision."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from cnnlab.models.half import protect_narrow

pytestmark = pytest.mark.filterwarnings("ignore:.*autocast.*:UserWarning")


def network() -> nn.Sequential:
    """8 x 8 pixels become 2 x 2, 1 x 1, and 1 x 1 again: the third is narrower than its stride."""
    layers = [nn.Conv2d(a, b, 3, stride, 1) for a, b, stride in ((3, 16, 4), (16, 16, 2), (16, 32, 2), (32, 16, 1))]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 4))


def test_what_is_narrower_than_its_stride_is_found():
    model = network()
    keys = list(model.state_dict())
    assert protect_narrow(model, (3, 8, 8)) == ["2"]
    assert protect_narrow(network(), (3, 16, 16)) == []
    assert list(model.state_dict()) == keys and model.training
    assert isinstance(model[2], nn.Conv2d) and repr(model[2]).startswith("Conv2d(16, 32")


def test_a_1x1_kernel_needs_no_protection():
    assert protect_narrow(nn.Sequential(nn.Conv2d(3, 4, 1, 2)), (3, 1, 1)) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_its_gradients_are_those_of_double_precision(dtype: torch.dtype):
    torch.manual_seed(0)
    model = network()
    exact = copy.deepcopy(model).double()
    protect_narrow(model, (3, 8, 8))
    model = copy.deepcopy(model)  # as an average of the weights would have it
    for _ in range(5):
        images = torch.randn(64, 3, 8, 8)
        junk = [torch.full((n,), 1e4) for n in (4608, 9216, 100_000)]  # for what reads memory that nobody wrote
        del junk
        for net, inputs in ((model, images), (exact, images.double())):
            net.zero_grad()
            with torch.autocast("cpu", dtype, enabled=net is model):
                outputs = net(inputs)
            outputs.to(inputs.dtype).square().mean().backward()
        found, wanted = model[2].weight.grad, exact[2].weight.grad
        assert found.isfinite().all()
        assert (found - wanted).norm() < 0.03 * wanted.norm()
