"""Every part of every network can be swapped: activation, norm, width, dropout, channels, size, stem, pooling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lab_runs import make_run
from torch import nn

from cnnlab.building.assemble import make_network, make_task
from cnnlab.building.trial import checked, read
from cnnlab.composing.composer import Composer
from cnnlab.errors import ConfigError

NETWORKS = ("resnet", "resnet18", "vgg", "alexnet_2012", "inception_v3", "cnn", "mlp", "speednet")
WIDTHS = {"resnet": "8", "resnet18": "8", "cnn": "[4,8]", "mlp": "[16]", "speednet": "[8,8]"}
WIDTH_KEYS = {"cnn": "widths", "mlp": "hidden", "speednet": "widths"}
WITHOUT_STEM = ("cnn", "mlp", "speednet")
WITHOUT_POOL = ("mlp", "speednet")
SWAPS = {
    "width": lambda name: [f"model.{WIDTH_KEYS.get(name, 'width')}={WIDTHS.get(name, '0.125')}"],
    "activation": lambda name: ["activation=tanh"],
    "norm": lambda name: ["norm=group"],
    "no norm": lambda name: ["norm=none"],
    "dropout": lambda name: ["regularization.dropout=0.4"],
    "size": lambda name: ["data.size=80"],
    "channels": lambda name: ["data=digits", "data.size=64"],
    **{f"stem {stem}": lambda name, stem=stem: [f"model.stem={stem}"] for stem in ("imagenet", "small")},
    **{f"pool {pool}": lambda name, pool=pool: [f"model.pool={pool}"] for pool in ("avg", "conv")},
}


def lacks(name: str, swap: str) -> bool:
    return (
        (swap.startswith("stem") and name in WITHOUT_STEM)
        or (swap.startswith("pool") and name in WITHOUT_POOL)
        or (swap == "dropout" and name == "speednet")
    )


def built(composer: Composer, *overrides: str) -> tuple[nn.Module, torch.Tensor]:
    """The network on the meta device, and two of its images."""
    experiment = read(composer.compose(["data=shapes", "data.size=96", *overrides]))
    spec = experiment.node("data").make().spec()
    with torch.device("meta"):
        model = make_network(experiment, spec, make_task(experiment, spec, None))
        return model, torch.empty(2, spec.channels, *spec.size)


@pytest.fixture(scope="module")
def as_it_is(shared_composer: Composer) -> dict[str, Any]:
    return {name: described(built(shared_composer, f"model={name}")[0]) for name in NETWORKS}


def described(model: nn.Module) -> Any:
    """Kinds and settings of the layers, shapes of the weights."""
    layers = [repr(module) for module in model.modules() if next(module.children(), None) is None]
    return layers, [tuple(p.shape) for p in model.parameters()]


SAME = {
    "size": ("resnet", "resnet18", "vgg", "alexnet_2012", "inception_v3", "cnn", "speednet"),
    "stem imagenet": ("resnet", "resnet18", "vgg", "alexnet_2012", "inception_v3"),  # 96 pixels have it anyway
    "no norm": ("vgg", "mlp"),
}
"""Networks that a swap leaves as they are."""


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_part_is_swapped(name: str, swap: str, shared_composer: Composer, as_it_is: dict[str, Any]):
    overrides = [f"model={name}", *SWAPS[swap](name)]
    if lacks(name, swap):
        with pytest.raises(ConfigError):
            checked(shared_composer, ["data=shapes", "data.size=96", *overrides])
        return
    model, images = built(shared_composer, *overrides)
    assert model(images)["logits"].shape == (2, 10 if swap == "channels" else 6)
    assert (described(model) == as_it_is[name]) is (name in SAME.get(swap, ()))


@pytest.mark.parametrize("pool", ["max", "avg", "conv"])
def test_a_strided_convolution_learns_its_pooling(pool: str):
    run = make_run("model=cnn", "model.widths=[4,8]", f"model.pool={pool}")
    (layer,) = run.model.pools
    assert type(layer) is {"max": nn.MaxPool2d, "avg": nn.AvgPool2d, "conv": nn.Conv2d}[pool]
    batch, count = next(run.batches())
    before = [p.detach().clone() for p in layer.parameters()]
    with run.observer(0) as look:
        run.step(batch, count, 0, look)
    assert len(before) == (2 if pool == "conv" else 0)
    assert all(not torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
