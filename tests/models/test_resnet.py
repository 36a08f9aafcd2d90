import pytest
import torch
import torchvision
from models_helpers import CIFAR, DIGITS, assert_same_network, count, drawn, images
from torch import nn

from cnnlab.models.blocks import StochasticDepth
from cnnlab.models.norm import group, instance, no_norm
from cnnlab.models.resnet import CifarResNet, ResNet


def slow(depth):
    return pytest.param(depth, marks=pytest.mark.slow)


IMAGENET = {"num_classes": 1000, "in_channels": 3, "image_size": (64, 64)}


@pytest.mark.parametrize("depth", [18, 34, 50, slow(101), slow(152)])
def test_equals_torchvision(depth):
    ours = drawn(lambda: ResNet(**IMAGENET, depth=depth, stem="imagenet"), fill=False)
    theirs = drawn(lambda: torchvision.models.get_model(f"resnet{depth}", weights=None))
    assert_same_network(ours, theirs, images(40))


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7), (1202, 19.4)]
)
def test_cifar_parameters_are_those_of_table_6(depth, millions):
    with torch.device("meta"):
        model = CifarResNet(**CIFAR, depth=depth)
    assert count(model) / 1e6 == pytest.approx(millions, rel=0.02)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert convolutions + 1 == depth


def test_paper_variant_strides_in_the_first_1x1():
    paper, vision = (ResNet(**IMAGENET, depth=50, variant=v) for v in ("paper", "torchvision"))
    strides = [(m.layer2[0].conv1.stride, m.layer2[0].conv2.stride) for m in (paper, vision)]
    assert strides == [((2, 2), (1, 1)), ((1, 1), (2, 2))]
    assert paper.state_dict().keys() == vision.state_dict().keys()
    paper.load_state_dict(vision.state_dict())
    x = images(64)
    assert not torch.equal(paper.eval()(x)["logits"], vision.eval()(x)["logits"])


def test_option_a_copies_and_pads():
    model = CifarResNet(**CIFAR, depth=8)
    shortcut = model.layer2[0].downsample
    x = images(7, channels=16)
    y = shortcut(x)
    assert y.shape == (2, 32, 4, 4)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2])
    assert not y[:, 16:].any()
    assert not list(shortcut.parameters())


def test_a_residual_block_with_a_zero_branch_is_its_shortcut():
    model = CifarResNet(**CIFAR, depth=8).eval()
    block = model.layer1[0]
    nn.init.zeros_(block.bn2.weight)
    x = images(8, channels=16).relu()
    assert torch.equal(block(x), x)
    plain = CifarResNet(**CIFAR, depth=8, shortcut=False).eval().layer1[0]
    nn.init.zeros_(plain.bn2.weight)
    assert not plain(x).any()


def test_the_plain_twin_has_the_same_convolutions():
    residual, plain = (CifarResNet(**CIFAR, depth=20, shortcut=s) for s in (True, False))
    assert residual.state_dict().keys() == plain.state_dict().keys()
    deep, plain_deep = (ResNet(**IMAGENET, depth=18, shortcut=s) for s in (True, False))
    extra = deep.state_dict().keys() - plain_deep.state_dict().keys()
    assert extra
    assert all(".downsample." in name for name in extra)


def test_stochastic_depth_decays_linearly_and_spares_evaluation():
    model = CifarResNet(**CIFAR, depth=14, stochastic_depth=0.6)
    rates = [module.rate for module in model.modules() if isinstance(module, StochasticDepth)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    whole = CifarResNet(**CIFAR, depth=14)
    whole.load_state_dict(model.state_dict())
    x = images(32)
    assert torch.equal(model.eval()(x)["logits"], whole.eval()(x)["logits"])
    with pytest.raises(ValueError, match=r"expected regularization\.stochastic_depth=0 for a plain network"):
        CifarResNet(**CIFAR, depth=14, shortcut=False, stochastic_depth=0.1)


@pytest.mark.parametrize(("norm", "bias"), [(None, False), (group, False), (no_norm, True)])
def test_convolutions_have_a_bias_only_without_a_norm_layer(norm, bias):
    model = ResNet(**CIFAR, depth=18, norm=norm)
    assert all((m.bias is not None) is bias for m in model.modules() if isinstance(m, nn.Conv2d))


def test_every_activation_is_its_own_module():
    model = CifarResNet(**CIFAR, depth=8, activation=nn.PReLU)
    assert sum(isinstance(module, nn.PReLU) for module in model.modules()) == 1 + 2 * 3
    calls = []
    for module in model.modules():
        if isinstance(module, nn.PReLU):
            module.register_forward_hook(lambda m, *_: calls.append(m))
    model(images(32))
    assert len(calls) == len(set(calls)) == 7


def test_stages_are_described():
    for model, size in (
        (ResNet(**CIFAR, depth=50), 32),
        (ResNet(**IMAGENET), 64),
        (CifarResNet(**CIFAR), 32),
    ):
        stages = model.features(images(size)).stages
        assert tuple(stage.shape[1] for stage in stages) == model.stage_channels
        sides = [stage.shape[-1] for stage in stages]
        assert sides == sorted(sides, reverse=True)


def test_stem_follows_the_image_size_and_can_be_set():
    assert ResNet(**CIFAR).stem == "small"
    assert ResNet(**IMAGENET).stem == "imagenet"
    assert ResNet(**IMAGENET, stem="small").conv1.kernel_size == (3, 3)
    assert "stem: small (images are 32x32)" in ResNet(**CIFAR).notes


@pytest.mark.parametrize("pool", ["max", "avg", "conv"])
def test_pools_of_the_imagenet_stem_have_one_geometry(pool):
    model = ResNet(**{**IMAGENET, "image_size": (65, 65)}, pool=pool)
    assert [stage.shape[-1] for stage in model.features(images(65)).stages] == [33, 17, 9, 5, 3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNet(**IMAGENET, depth=19), "expected a depth of 18, 34, 50, 101, 152, received 19"),
        (lambda: CifarResNet(**CIFAR, depth=21), "model.depth=20 or model.depth=26"),
        (lambda: CifarResNet(**CIFAR, depth=2), "model.depth=8 or"),
        (
            lambda: ResNet(**{**DIGITS, "image_size": (8, 4)}),
            "expected images of at least 8x8 for ResNet, received 8x4",
        ),
        (lambda: ResNet(**DIGITS, norm=instance), "expected a norm layer that can normalize a 1x1 map"),
    ],
)
def test_refusals_say_what_to_type(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_head_can_be_replaced():
    class Head(nn.Module):
        def forward(self, features):
            return {"logits": features.stages[-1].mean((2, 3))}

    model = CifarResNet(**CIFAR)
    model.replace_head(Head())
    assert model(images(32))["logits"].shape == (2, 64)
    assert not [name for name in model.state_dict() if name.startswith("fc")]


def test_compiles_whole():
    model = CifarResNet(**DIGITS, depth=8, stochastic_depth=0.2)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert compiled(images(8, channels=1))["logits"].shape == (2, 10)
