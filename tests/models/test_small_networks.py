import pytest
import torch
from models_helpers import DIGITS, images
from torch import nn

from cnnlab.models.cnn import CNN
from cnnlab.models.mlp import MLP
from cnnlab.models.norm import batch, instance


@pytest.mark.parametrize("pool", ["max", "avg", "conv"])
def test_cnn_has_a_stage_a_block(pool):
    model = CNN(**DIGITS, widths=(4, 6, 8), depth=2, kernel=5, pool=pool)
    features = model.features(images(8, channels=1))
    assert [tuple(stage.shape[1:]) for stage in features.stages] == [(4, 8, 8), (6, 4, 4), (8, 2, 2)]
    assert features.sizes == (((8, 8), (4, 4)) if pool == "max" else ())
    assert model.pool_channels == ((4, 6) if pool == "max" else ())
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (5, 5) for m in model.modules()) == 6
    assert model(images(8, channels=1))["logits"].shape == (2, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": ()}, "expected at least one block"),
        ({"kernel": 4}, "model.kernel=5"),
        ({"widths": (4,) * 5}, "at least 16x16 for this CNN, received 8x8; fewer model.widths"),
        ({"widths": (4,) * 4, "norm": instance}, "expected a norm layer that can normalize a 1x1 map"),
    ],
)
def test_cnn_refusals_say_what_to_type(options, message):
    with pytest.raises(ValueError, match=message):
        CNN(**{**DIGITS, **options})


def test_mlp_is_the_composition_of_its_layers():
    model = MLP(**DIGITS, hidden=(5, 6)).eval()
    x = images(8, channels=1)
    first, second = (layer.linear for layer in model.layers)
    expected = model.classifier(second(first(x.flatten(1)).relu()).relu())
    assert torch.equal(model(x)["logits"], expected)
    assert [tuple(stage.shape) for stage in model.features(x).stages] == [(2, 5, 1, 1), (2, 6, 1, 1)]
    assert model.stage_channels == (5, 6)


def test_mlp_batch_norm_is_that_of_vectors():
    model = MLP(**DIGITS, hidden=(5,), norm=batch)
    vector = nn.BatchNorm1d(5)
    x = images(8, channels=1, count=6)
    expected = model.classifier(vector(model.layers[0].linear(x.flatten(1))).relu())
    torch.testing.assert_close(model(x)["logits"], expected)


def test_mlp_refusals_say_what_to_type():
    with pytest.raises(ValueError, match="expected at least one hidden layer"):
        MLP(**DIGITS, hidden=())
    with pytest.raises(ValueError, match="norm=group"):
        MLP(**DIGITS, norm=instance)


@pytest.mark.parametrize("network", [CNN, MLP])
def test_compiles_whole(network):
    compiled = torch.compile(network(**DIGITS), fullgraph=True, backend="eager")
    assert compiled(images(8, channels=1))["logits"].shape == (2, 10)
