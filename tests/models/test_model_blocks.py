import pytest
import torch
from models_helpers import images
from torch import nn

from cnnlab.models import norm as norms
from cnnlab.models.blocks import StochasticDepth, downsampler


def test_local_response_is_the_papers_formula():
    x = images(3, channels=7)
    found = norms.local_response(7)(x)
    for channel in range(7):
        near = x[:, max(0, channel - 2) : channel + 3]
        expected = x[:, channel] / (2 + 1e-4 * near.square().sum(1)) ** 0.75
        torch.testing.assert_close(found[:, channel], expected)


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (7, 1), (16, 8), (64, 32), (96, 32), (100, 25)])
def test_group_norm_chooses_groups_of_two_channels_or_more(channels, groups):
    assert norms.group(channels).num_groups == groups


def test_group_norm_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match=r"divides 10 channels, received 4; norm\.groups=null"):
        norms.group(10, groups=4)


def test_layer_and_instance_norm_have_their_moments():
    x = images(5, channels=6) * 3 + 1
    for factory, axes in ((norms.layer, (1, 2, 3)), (norms.instance, (2, 3))):
        y = factory(6)(x)
        torch.testing.assert_close(y.mean(axes), torch.zeros_like(y.mean(axes)), atol=1e-5, rtol=0)
        torch.testing.assert_close(y.var(axes, correction=0), torch.ones_like(y.mean(axes)), atol=1e-3, rtol=0)
    assert norms.batch(6, eps=1e-3, momentum=0.2).momentum == 0.2
    assert isinstance(norms.no_norm(6), nn.Identity)


def test_stochastic_depth_drops_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    layer = StochasticDepth(0.25)
    y = layer(torch.ones(4000, 2, 3, 3))
    values = y.flatten(1)
    assert torch.equal(values.amin(1), values.amax(1))
    torch.testing.assert_close(values[:, 0].unique(), torch.tensor([0.0, 1 / 0.75]))
    assert values.mean().item() == pytest.approx(1, abs=0.03)
    x = images(3)
    assert layer.eval()(x) is x
    with pytest.raises(ValueError, match=r"rate in \[0, 1\), received 1"):
        StochasticDepth(1.0)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 0), (3, 2, 1)])
def test_downsamplers_have_one_geometry(kernel, stride, padding):
    x = images(9, channels=4)
    shapes = {downsampler(pool, 4, kernel, stride, padding)(x).shape for pool in ("max", "avg", "conv")}
    assert len(shapes) == 1
