"""The prior goes into the bias that the logits end with, and nowhere else."""

from __future__ import annotations

import math

import pytest
import torch
from lab_runs import make_run
from torch import nn

from cnnlab.init.prior import start_from
from cnnlab.protocols import as_outputs

CLASSES, IMAGE = 7, (3, 8, 8)
PRIOR = torch.full((CLASSES,), -math.log(99))
SCENES = ("data=shapes", "data.limit=null", "data.train=8", "data.val=8", "data.test=8", "data.size=32")
GROWN = ("data=shapes", "data.limit=null", "data.train=8", "data.val=8", "data.test=8", "data.size=64")


class Summed(nn.Module):
    """Two classifiers add up, as in a network with scores from several depths; the second's output is a fourth."""

    def __init__(self):
        super().__init__()
        self.deep = nn.Sequential(nn.Conv2d(3, CLASSES, 3, padding=1), nn.BatchNorm2d(CLASSES), nn.ReLU())
        self.first, self.second = nn.Conv2d(3, CLASSES, 1), nn.Conv2d(CLASSES, CLASSES, 1)

    def forward(self, x):
        scores = self.first(x) + self.second(self.deep(x)) / 4
        return {"logits": nn.functional.interpolate(scores, scale_factor=2, mode="bilinear")}


class Scaled(nn.Module):
    """A scale a class, and then a bias that is no layer's."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, CLASSES)
        self.scale, self.offset = nn.Parameter(torch.rand(CLASSES) + 0.5), nn.Parameter(torch.zeros(CLASSES))

    def forward(self, x):
        return self.fc(x.mean((2, 3))) * self.scale + self.offset


class InPlace(nn.Module):
    def __init__(self, last):
        super().__init__()
        self.last = last

    def forward(self, x):
        return self.last(x.mul_(2).mean((2, 3)))


def normed():
    """As many channels as classes everywhere, and a norm layer before the classifier."""
    body = [nn.Conv2d(3, CLASSES, 3), nn.BatchNorm2d(CLASSES), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(CLASSES, CLASSES), nn.LayerNorm(CLASSES), nn.Linear(CLASSES, CLASSES))


NETWORKS = {
    "norm layers of the classes' number": (normed, {"7.bias"}),
    "classifiers that add up": (Summed, {"first.bias", "second.bias"}),
    "a norm layer at the end": (lambda: nn.Sequential(normed(), nn.GroupNorm(1, CLASSES)), {"1.bias"}),
    "a bias that is no layer's": (Scaled, {"offset"}),
    "in place": (lambda: InPlace(nn.Linear(3, CLASSES)), {"last.bias"}),
    "no bias": (lambda: InPlace(nn.Linear(3, CLASSES, bias=False)), set()),
    "a scale at the end": (lambda: InPlace(nn.Sequential(nn.Linear(3, CLASSES), nn.RMSNorm(CLASSES))), set()),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_last_bias_alone_is_set_and_the_logits_start_from_the_prior(name):
    make, expected = NETWORKS[name]
    torch.manual_seed(0)
    net = make()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    net.eval()
    images = torch.rand(4, *IMAGE)
    old, state = as_outputs(net(images.clone()))["logits"], torch.get_rng_state()
    assert set(start_from(net, PRIOR, IMAGE)) == expected
    changed = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in net.modules())
    assert all(p.grad is None for p in net.parameters())
    if expected:  # what the biases were before is no longer part of the logits
        with torch.no_grad():
            for bias in expected:
                net.get_parameter(bias).zero_()
            without = as_outputs(net(images.clone()))["logits"]
            start_from(net, PRIOR, IMAGE)
            shift = as_outputs(net(images.clone()))["logits"] - without
        torch.testing.assert_close(shift, PRIOR.mean().expand_as(shift))
    else:
        assert torch.equal(as_outputs(net(images.clone()))["logits"], old)


LAB = {
    "resnet": ((), {"fc.bias"}),
    "vgg": (("model=vgg",), {"classifier.1.bias"}),
    "alexnet": (("model=alexnet",), {"classifier.6.bias"}),
    "mlp": (("model=mlp",), {"classifier.bias"}),
    "inception": ((*GROWN, "model=inception"), {"AuxLogits.fc.bias", "fc.bias"}),
    "a decoder": ((*SCENES, "task=segmentation"), {"head.classifier.bias"}),
    "an unpooling decoder": (
        (*SCENES, "task=segmentation", "model=cnn", "model.widths=[7,16]"),
        {"head.classifier.bias"},
    ),
    "googlenet": (
        (*SCENES, "model=torchvision", "model.name=googlenet"),
        {"network.aux1.fc2.bias", "network.aux2.fc2.bias", "network.fc.bias"},
    ),
    "squeezenet, whose logits end with a ReLU": ((*SCENES, "model=torchvision", "model.name=squeezenet1_1"), set()),
    "speednet": (("model=speednet", "model.widths=[8,8,8]"), set()),
}


@pytest.mark.parametrize("name", LAB)
def test_of_every_network_it_is_the_last_classifiers_bias(name):
    overrides, expected = LAB[name]
    plain = make_run(*overrides, "stats=off", "loss=focal", "loss.prior=null")
    run = make_run(*overrides, "stats=off", "loss=focal")
    before = plain.model.state_dict()
    changed = {key for key, value in run.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == expected
    for bias in expected:
        assert run.model.get_parameter(bias).tolist() == pytest.approx([-math.log(99)] * run.task.criterion.num_classes)
    assert any("end with a bias" in notice for notice in run.notices) is not bool(expected)
