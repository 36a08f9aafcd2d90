"""The whitening first layer: its outputs on the images that it saw are uncorrelated and of equal variance."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cnnlab.init import Whitening
from cnnlab.models.speednet import SpeedNet


def images() -> torch.Tensor:
    """Smooth random images: neighbouring pixels and channels are strongly correlated."""
    raw = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    smooth = nn.functional.avg_pool2d(raw, 5, stride=1, padding=2)
    return 4 * (smooth + smooth.mean(1, keepdim=True))


def net() -> SpeedNet:
    return SpeedNet(num_classes=10, in_channels=3, image_size=(16, 16), widths=(8, 8))


def test_outputs_are_white_and_come_in_pairs_of_opposite_sign() -> None:
    model, batch = net(), images()
    init = Whitening(epsilon=1e-8)
    init(model, 0)
    init.calibrate(model, batch)
    out = model.whiten(batch).transpose(0, 1).flatten(1)
    covariance = torch.cov(out[:12], correction=0)
    torch.testing.assert_close(covariance, torch.eye(12), atol=2e-3, rtol=0)
    torch.testing.assert_close(out[:12], -out[12:])


def test_the_rest_of_the_network_keeps_its_own_init() -> None:
    white, plain = net(), net()
    init = Whitening()
    init(white, 0)
    init.calibrate(white, images())
    init(plain, 0)
    same = {name: torch.equal(p, q) for (name, p), q in zip(white.named_parameters(), plain.parameters(), strict=True)}
    assert [name for name, equal in same.items() if not equal] == ["whiten.weight"]


def test_networks_without_room_for_the_transform_are_refused() -> None:
    with pytest.raises(ValueError, match="begins with a convolution"):
        Whitening().validate(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
    with pytest.raises(ValueError, match="at least 54 filters"):
        Whitening().validate(nn.Sequential(nn.Conv2d(3, 16, 3)))
