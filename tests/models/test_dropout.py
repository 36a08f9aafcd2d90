"""The kinds of dropout: their closed forms, and where they go in each network."""

from __future__ import annotations

import pytest
import torch
from lab_runs import composed, fitted, make_run
from torch import nn

from cnnlab.building.assemble import make_network, make_task
from cnnlab.building.trial import check, checked, read
from cnnlab.composing.composer import Composer
from cnnlab.errors import ConfigError
from cnnlab.inspect.summary import summarize
from cnnlab.models.dropout import ClassicDropout

RATE = 0.3
DRAWS = 40_000


def draws(dropout: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """(DRAWS, values) of training."""
    torch.manual_seed(0)
    return dropout.train()(x.expand(DRAWS, -1)).double()


def test_both_scalings_evaluate_at_the_mean_of_training():
    """r ~ Bernoulli(1 - p): classic y = rx has mean (1 - p)x and variance p(1 - p)x²; inverted y = rx/(1 - p) has mean
    x and variance p/(1 - p)x². Over 40,000 draws a mean is off by 5σ/200 at most."""
    x = torch.tensor([-2.0, 0.5, 3.0])
    for dropout, scale in ((ClassicDropout(RATE), 1 - RATE), (nn.Dropout(RATE), 1.0)):
        seen = draws(dropout, x)
        evaluated = dropout.eval()(x)
        torch.testing.assert_close(evaluated, scale * x)
        deviation = scale * (RATE / (1 - RATE)) ** 0.5 * x.abs()
        assert torch.all((seen.mean(0) - evaluated).abs() < 5 * deviation / DRAWS**0.5)
        torch.testing.assert_close(seen.std(0), deviation.double(), rtol=0.02, atol=0)


def test_classic_dropout_scales_nothing_in_training():
    x = torch.tensor([-2.0, 0.5, 3.0])
    seen = draws(ClassicDropout(RATE), x)
    assert torch.all((seen == 0) | (seen == x))
    assert torch.equal(ClassicDropout(0.0).train()(x), x)


def test_a_layer_behind_either_scaling_has_one_expected_output():
    """w·(1 - p)x of the classic kind is (1 - p)w·x of the inverted: the networks of the paper's figure 2."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, generator=generator), torch.randn(4, 5, generator=generator)
    classic = nn.functional.linear(ClassicDropout(RATE).eval()(x), weight)
    inverted = nn.functional.linear(nn.Dropout(RATE).eval()(x), weight * (1 - RATE))
    torch.testing.assert_close(classic, inverted)
    mean = nn.functional.linear(draws(ClassicDropout(RATE), x).float(), weight).mean(0)
    torch.testing.assert_close(mean, classic, atol=0.05, rtol=0)


NETWORKS = ("cnn", "resnet", "resnet18", "vgg", "vgg16", "alexnet", "inception", "mlp")


def network(composer: Composer, *overrides: str) -> nn.Module:
    """On the meta device, as `cnnlab summary` has it."""
    experiment = read(composer.compose(["data=shapes", "data.size=64", *overrides]))
    spec = experiment.node("data").make().spec()
    with torch.device("meta"):
        return make_network(experiment, spec, make_task(experiment, spec, None))


@pytest.mark.parametrize("name", NETWORKS)
def test_classic_dropout_takes_every_place_and_renames_nothing(name: str, shared_composer: Composer):
    plain = network(shared_composer, f"model={name}", "regularization=dropout")
    classic = network(shared_composer, f"model={name}", "regularization=classic_dropout")
    assert list(classic.state_dict()) == list(plain.state_dict())
    places = [name for name, module in plain.named_modules() if type(module) is nn.Dropout]
    assert places and places == [name for name, m in classic.named_modules() if type(m) is ClassicDropout]
    assert all(classic.get_submodule(place).p == 0.5 for place in places)


@pytest.mark.parametrize("name", [*(name for name in NETWORKS if name != "mlp"), "speednet"])
def test_spatial_dropout_drops_channels_in_place_of_values(name: str, shared_composer: Composer):
    plain = network(shared_composer, f"model={name}")
    spatial = network(shared_composer, f"model={name}", "regularization=spatial_dropout")
    assert list(spatial.state_dict()) == list(plain.state_dict())
    assert not any(module.p for module in spatial.modules() if type(module) is nn.Dropout)
    assert isinstance(spatial.channel_dropout, nn.Dropout2d)
    assert spatial.channel_dropout.p == 0.2


def test_the_models_own_rate_is_taken_where_none_is_given(shared_composer: Composer):
    model = network(shared_composer, "model=vgg16", "regularization.dropout_kind=classic")
    assert [m.p for m in model.modules() if isinstance(m, ClassicDropout)] == [0.5, 0.5]


@pytest.mark.parametrize("model", ["vgg", "cnn"])
def test_whole_channels_of_the_last_map_go(model: str):
    run = make_run(f"model={model}", "regularization=spatial_dropout", "regularization.dropout=0.5")
    seen = []
    run.model.channel_dropout.register_forward_hook(lambda m, inputs, output: seen.append((inputs[0], output)))
    batch, _ = next(run.batches())
    run.model.train()(batch["image"])
    (before, after), *rest = seen
    assert not rest
    dropped = (after == 0).all(dim=(2, 3)) & (before != 0).any(dim=(2, 3))
    kept = torch.isclose(after, 2 * before).all(dim=(2, 3))
    assert torch.all(dropped | kept)
    alive = (before != 0).any(dim=(2, 3))
    assert 0.4 < (dropped & alive).sum() / alive.sum() < 0.6
    run.model.eval()(batch["image"])
    assert torch.equal(*seen[-1])


def test_a_decoder_gets_features_without_the_dropped_channels():
    run = make_run(
        "data=shapes", "data.limit=null", "data.train=16", "data.val=16", "data.test=16", "data.size=16",
        "task=segmentation", "model=vgg", "norm=batch", "regularization=spatial_dropout", "trainer.batch_size=16",
    )  # fmt: skip
    shapes = []
    run.model.channel_dropout.register_forward_hook(lambda m, inputs, output: shapes.append(output.shape))
    batch, _ = next(run.batches())
    assert run.model.train()(batch["image"])["mask"].shape == (16, 7, 16, 16)
    assert len(shapes) == 1


@pytest.mark.parametrize("option", ["classic_dropout", "spatial_dropout"])
def test_a_run_with_either_kind_trains_and_repeats(option: str):
    first, second = (fitted(f"regularization={option}", "trainer.max_steps=3", "stats=off") for _ in range(2))
    assert all(map(torch.equal, first.model.parameters(), second.model.parameters()))


def test_spatial_dropout_compiles_whole_and_is_summarized():
    torch._dynamo.reset()
    model = make_run("regularization=spatial_dropout").model
    x = torch.randn(2, 1, 8, 8)
    compiled = torch.compile(model.eval(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)["logits"], model(x)["logits"])
    named = {layer.name: layer for layer in summarize(model, (1, 8, 8)).layers}
    assert named["channel_dropout"].type == "Dropout2d"
    assert named["channel_dropout"].receptive_field is not None


REFUSED = {
    ("model=mlp", "regularization=spatial_dropout"): "no feature maps",
    ("model=torchvision", "data=shapes", "data.size=64", "regularization=spatial_dropout"): "classifies inside itself",
    ("regularization.dropout_kind=spatial",): "expected a rate",
    ("regularization.dropout_kind=classic",): "no dropout that could be",
    ("model=speednet", "data=cifar10", "regularization=classic_dropout"): "SpeedNet has none",
    ("data=shapes", "task=segmentation", "regularization=dropout"): "dropout_kind=spatial, which acts before",
}


@pytest.mark.parametrize("overrides", REFUSED, ids=" ".join)
def test_a_kind_without_effect_is_refused(overrides: tuple[str, ...], shared_composer: Composer):
    with pytest.raises(ConfigError, match=REFUSED[overrides]):
        checked(shared_composer, overrides)


@pytest.mark.parametrize("kind", ["classic", "spatial"])
def test_a_rate_of_zero_is_a_rate(kind: str):
    """As in a sweep over rates."""
    check(composed(f"regularization.dropout_kind={kind}", "regularization.dropout=0"))
