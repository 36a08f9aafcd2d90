import pytest
import torch
import torchvision
from models_helpers import DIGITS, assert_same_network, drawn, images

from cnnlab.models.inception import Inception
from cnnlab.models.norm import instance


def test_equals_torchvision():
    ours = drawn(lambda: Inception(num_classes=10, in_channels=3, image_size=(299, 299)), fill=False)
    theirs = drawn(lambda: torchvision.models.inception_v3(weights=None, init_weights=False, num_classes=10))
    assert_same_network(ours, theirs, images(299), images(96))  # 299: what the auxiliary classifier needs


@pytest.mark.parametrize(
    ("side", "grids"),
    [
        (4, (4, 4, 4, 2, 1)),
        (8, (8, 8, 8, 4, 2)),
        (16, (16, 16, 8, 4, 2)),
        (32, (32, 16, 8, 4, 2)),
        (75, (35, 15, 7, 3, 1)),
    ],
)
def test_stages_of_small_and_large_images(side, grids):
    model = Inception(num_classes=7, in_channels=1, image_size=(side, side), width=0.0625)
    x = images(side, channels=1)
    stages = model.features(x).stages
    assert tuple(stage.shape[-1] for stage in stages) == grids
    assert tuple(stage.shape[1] for stage in stages) == model.stage_channels
    assert {name: tuple(y.shape) for name, y in model(x).items()} == {"aux": (2, 7), "logits": (2, 7)}


def test_aux_is_for_training_only_and_optional():
    model = Inception(**DIGITS, width=0.0625)
    assert set(model.eval()(images(8, channels=1))) == {"logits"}
    without = Inception(**DIGITS, width=0.0625, aux=False)
    assert set(without(images(8, channels=1))) == {"logits"}
    assert not any(name.startswith("AuxLogits") for name in without.state_dict())


@pytest.mark.parametrize("pool", ["avg", "conv"])
@pytest.mark.parametrize("side", [32, 75])
def test_pools_have_one_geometry(pool, side):
    options = {"num_classes": 3, "in_channels": 1, "image_size": (side, side), "width": 0.0625}
    expected = Inception(**options).features(images(side, channels=1)).stages
    found = Inception(**options, pool=pool).features(images(side, channels=1)).stages
    assert [stage.shape for stage in found] == [stage.shape for stage in expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": (3, 8)}, "at least 4x4 for Inception v3, received 3x8"),
        ({"stem": "imagenet"}, "at least 75x75 .*, received 8x8; model.stem=small"),
        ({"norm": instance}, "model.aux=false"),
    ],
)
def test_refusals_say_what_to_type(options, message):
    with pytest.raises(ValueError, match=message):
        Inception(**{**DIGITS, **options}, width=0.0625)


def test_compiles_whole():
    model = Inception(**DIGITS, width=0.0625)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert set(compiled(images(8, channels=1))) == {"logits", "aux"}
