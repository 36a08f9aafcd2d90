import pytest
import torch
import torchvision
from models_helpers import DIGITS, assert_same_network, count, drawn, images
from torch import nn

from cnnlab.models.alexnet import AlexNet
from cnnlab.models.norm import batch, no_norm

IMAGENET = {"num_classes": 1000, "in_channels": 3, "image_size": (224, 224)}


def test_equals_torchvision():
    ours = drawn(lambda: AlexNet(num_classes=10, in_channels=3, image_size=(70, 70)), fill=False)
    theirs = drawn(lambda: torchvision.models.alexnet(weights=None, num_classes=10))
    assert_same_network(ours, theirs, images(70))


def test_the_paper_variant_has_the_papers_size():
    with torch.device("meta"):
        model = AlexNet(**IMAGENET, variant="paper")
    assert count(model) == 60_965_224  # the paper rounds to 60 million; Caffe's replica has the same number
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert [(m.out_channels, m.groups) for m in convolutions] == [
        (96, 1),
        (256, 2),
        (384, 1),
        (384, 2),
        (256, 2),
    ]
    assert sum(isinstance(module, nn.LocalResponseNorm) for module in model.modules()) == 2
    assert model.own_init == {"_target_": "cnnlab.init.PaperAlexNet"}
    assert AlexNet.own_init["_target_"] == "cnnlab.init.He"


def test_norm_layers_rename_nothing():
    plain, normed = AlexNet(**DIGITS, width=0.125), AlexNet(**DIGITS, width=0.125, norm=batch)
    extra = normed.state_dict().keys() - plain.state_dict().keys()
    assert plain.state_dict().keys() < normed.state_dict().keys()
    assert {name.rpartition(".")[0] for name in extra} == {f"features.norm{n}" for n in range(1, 6)}


def test_a_chosen_norm_takes_the_place_of_the_papers_own():
    for norm in (no_norm, batch):
        model = AlexNet(**DIGITS, width=0.125, variant="paper", norm=norm)
        assert not any(isinstance(module, nn.LocalResponseNorm) for module in model.modules())


@pytest.mark.parametrize("variant", ["torchvision", "paper"])
@pytest.mark.parametrize("pool", ["max", "avg", "conv"])
@pytest.mark.parametrize(
    ("side", "sides"), [(4, (4, 4, 4, 4)), (8, (8, 4, 4, 4)), (28, (28, 14, 7, 7)), (32, (32, 16, 8, 4))]
)
def test_small_images_keep_a_map_for_the_classifier(variant, pool, side, sides):
    model = AlexNet(num_classes=3, in_channels=1, image_size=(side, side), width=0.0625, variant=variant, pool=pool)
    x = images(side, channels=1)
    stages = model.features(x).stages
    assert tuple(stage.shape[-1] for stage in stages) == sides
    assert tuple(stage.shape[1] for stage in stages) == model.stage_channels
    assert model(x)["logits"].shape == (2, 3)


def test_refusals_say_what_to_type():
    with pytest.raises(ValueError, match=r"at least 63x63 for AlexNet, received 32x62; model\.stem=small"):
        AlexNet(num_classes=3, in_channels=1, image_size=(32, 62), stem="imagenet")


def test_compiles_whole():
    model = AlexNet(**DIGITS, width=0.125, variant="paper")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert compiled(images(8, channels=1))["logits"].shape == (2, 10)
