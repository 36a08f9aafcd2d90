import pytest
import torch
import torch.nn.functional as F
import torchvision
from models_helpers import CIFAR, DIGITS, assert_same_network, drawn, images
from torch import nn

from cnnlab.models.norm import batch, no_norm
from cnnlab.models.vgg import VGG


def slow(depth):
    return pytest.param(depth, marks=pytest.mark.slow)


IMAGENET = {"num_classes": 10, "in_channels": 3, "image_size": (32, 32), "stem": "imagenet"}


@pytest.mark.parametrize("depth", [11, slow(13), slow(16), 19])
@pytest.mark.parametrize("norm", [None, batch])
def test_equals_torchvision(depth, norm):
    name = f"vgg{depth}" if norm is None else f"vgg{depth}_bn"
    ours = drawn(lambda: VGG(**IMAGENET, depth=depth, norm=norm), fill=False)
    theirs = drawn(lambda: torchvision.models.get_model(name, weights=None, num_classes=10))
    assert_same_network(ours, theirs, images(32))


def test_indices_unpool_each_stage():
    features = VGG(**CIFAR, width=0.125).features(images(32))
    assert len(features.indices) == len(features.sizes) == 5
    for stage, indices, size in zip(features.stages[:5], features.indices, features.sizes, strict=True):
        assert stage.shape[-2:] == size
        pooled, expected = F.max_pool2d(stage, 2, return_indices=True)
        assert torch.equal(indices, expected)
        unpooled = F.max_unpool2d(pooled, indices, 2, output_size=size)
        assert torch.equal(F.max_pool2d(unpooled, 2), pooled)


@pytest.mark.parametrize(("side", "acting"), [(8, 3), (15, 3), (16, 4), (31, 4), (32, 5), (63, 5)])
def test_the_first_poolings_are_left_out_for_small_images(side, acting):
    model = VGG(num_classes=10, in_channels=1, image_size=(side, side), width=0.125)
    features = model.features(images(side, channels=1))
    assert len(features.indices) == acting
    assert model.pool_channels == tuple(stage.shape[1] for stage in features.stages[:5])[5 - acting :]
    assert tuple(stage.shape[1] for stage in features.stages) == model.stage_channels
    assert any("poolings are left out" in note for note in model.notes) is (acting < 5)
    assert [stage.shape[-1] for stage in features.stages[: 6 - acting]] == [side] * (6 - acting)


def test_keys_do_not_depend_on_pooling_or_stem():
    def keys(**options):
        return {k for k in VGG(num_classes=10, in_channels=1, width=0.125, **options).state_dict() if "feat" in k}

    expected = keys(image_size=(64, 64))
    assert keys(image_size=(8, 8)) == expected
    assert keys(image_size=(64, 64), pool="avg") == expected
    assert keys(image_size=(64, 64), pool="conv") > expected
    assert keys(image_size=(64, 64), norm=no_norm) == expected


def test_pool_conv_and_avg_hand_on_no_indices():
    for pool in ("avg", "conv"):
        model = VGG(**DIGITS, width=0.125, pool=pool)
        features = model.features(images(8, channels=1))
        assert features.indices == features.sizes == model.pool_channels == ()
        assert features.stages[-1].shape[-2:] == (1, 1)


def test_features_are_reachable_as_module_and_as_method():
    model = VGG(**DIGITS, width=0.125)
    assert isinstance(model.get_submodule("features.0"), nn.Conv2d)
    parameters = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    outputs = torch.func.functional_call(model, parameters, (images(8, channels=1),))
    assert not outputs["logits"].any()


def test_dropout_is_the_papers_and_can_be_set():
    def rates(**options):
        return {module.p for module in VGG(**options, width=0.125).modules() if isinstance(module, nn.Dropout)}

    assert rates(**IMAGENET) == {0.5}
    assert rates(**IMAGENET, dropout=0.0) == {0.0}
    assert rates(**DIGITS) == {0.0}
    assert rates(**DIGITS, dropout=0.3) == {0.3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 12}, "expected a depth of 11, 13, 16, 19, received 12"),
        ({"image_size": (7, 9)}, "expected images of at least 8x8 for VGG-11, received 7x9"),
        ({"image_size": (31, 40), "stem": "imagenet"}, "at least 32x32 .*; model.stem=small"),
    ],
)
def test_refusals_say_what_to_type(options, message):
    with pytest.raises(ValueError, match=message):
        VGG(**{**DIGITS, **options})


def test_compiles_whole():
    compiled = torch.compile(VGG(**DIGITS, width=0.125), fullgraph=True, backend="eager")
    assert compiled(images(8, channels=1))["logits"].shape == (2, 10)
