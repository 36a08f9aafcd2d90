"""SpeedNet's shapes, and the number of its parameters in the paper's size."""

from __future__ import annotations

import pytest
import torch

from cnnlab.models.norm import instance
from cnnlab.models.speednet import SpeedNet


def build(size: int = 32, **settings) -> SpeedNet:
    return SpeedNet(num_classes=10, in_channels=3, image_size=(size, size), **settings)


def test_the_papers_size() -> None:
    net = build()
    convolutions = [24 * 64, 64 * 64, 64 * 256, 256 * 256, 256 * 256, 256 * 256]
    norms = 2 * 2 * (64 + 256 + 256)
    expected = (24 * 3 * 4 + 24) + 9 * sum(convolutions) + norms + 256 * 10
    assert sum(p.numel() for p in net.parameters()) == expected
    stages = net.features(torch.zeros(2, 3, 32, 32)).stages
    assert [tuple(stage.shape[1:]) for stage in stages] == [(64, 15, 15), (256, 7, 7), (256, 3, 3)]


def test_small_images_leave_the_first_poolings_out() -> None:
    net = build(8, widths=(8, 8, 8))
    assert net.notes == ["the first 1 of 3 poolings are left out"]
    assert [stage.shape[-1] for stage in net.features(torch.zeros(2, 3, 8, 8)).stages] == [7, 3, 1]
    with pytest.raises(ValueError, match="at least 3x3"):
        build(2)


def test_logits_are_scaled() -> None:
    torch.manual_seed(0)
    net = build(widths=(8, 8)).eval()
    x = torch.randn(2, 3, 32, 32)
    plain = net(x)["logits"] / net.scale
    net.scale = 1.0
    torch.testing.assert_close(net(x)["logits"], plain)


def test_instance_norm_of_a_single_pixel_is_refused() -> None:
    build(32, norm=instance)
    with pytest.raises(ValueError, match="norm=group"):
        build(8, widths=(8, 8, 8), norm=instance)
