import pytest
import torch
import torchvision
from models_helpers import images
from torch import nn

from cnnlab.models.external import Timm, Torchvision, as_mapping

SMALL = {"num_classes": 5, "in_channels": 1, "image_size": (32, 32)}


class MeanHead(nn.Module):
    def forward(self, features):
        return {"logits": features.stages[-1].mean((2, 3))}


def test_torchvision_network_is_torchvisions():
    ours = Torchvision(**{**SMALL, "in_channels": 3}, name="squeezenet1_1").eval()
    theirs = torchvision.models.squeezenet1_1(weights=None, num_classes=5).eval()
    ours.network.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(images(32))["logits"], theirs(images(32)))


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("resnet18", 5),
        ("mobilenet_v3_small", 5),
        ("regnet_y_400mf", 5),
        ("shufflenet_v2_x0_5", 0),
        ("swin_t", 0),
    ],
)
def test_stages_where_the_build_is_known(name, stages):
    with torch.device("meta"):
        model = Torchvision(**{**SMALL, "image_size": (64, 64)}, name=name)
        x = torch.empty(2, 1, 64, 64)
        assert model(x)["logits"].shape == (2, 5)
        assert len(model.stage_channels) == stages
        if not stages:
            with pytest.raises(ValueError, match="expected a network with known feature stages"):
                model.replace_head(MeanHead())
            return
        found = model.features(x).stages
        assert tuple(stage.shape[1] for stage in found) == model.stage_channels
        model.replace_head(MeanHead())
        assert model(x)["logits"].shape == (2, model.stage_channels[-1])
        assert not [name for name, _ in model.named_parameters() if ".fc." in name or ".classifier." in name]


def test_auxiliary_outputs_become_one():
    class Outputs(torchvision.models.GoogLeNetOutputs):
        pass

    one, two = torch.ones(2, 3), torch.full((2, 3), 3.0)
    mapped = as_mapping(Outputs(logits=one, aux_logits2=one, aux_logits1=two))
    assert mapped.keys() == {"logits", "aux"}
    assert torch.equal(mapped["aux"], torch.full((2, 3), 2.0))
    assert as_mapping(torchvision.models.InceptionOutputs(one, None)).keys() == {"logits"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet19"}, r"received 'resnet19' \(did you mean `resnet1"),
        (
            {"name": "vgg11", "image_size": (8, 8)},
            "that vgg11 can take, received 8x8",
        ),
        ({"activation": nn.GELU}, "expected activation=auto"),
        ({"norm": nn.BatchNorm2d}, "expected norm=auto"),
        ({"dropout": 0.1}, "expected regularization.dropout=null for resnet18"),
    ],
)
def test_refusals_say_what_to_type(options, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        Torchvision(**{**SMALL, **options})


def test_dropout_is_set_where_there_is_some():
    with torch.device("meta"):
        model = Torchvision(**SMALL, name="squeezenet1_1", dropout=0.125)
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.125}


def test_timm_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ValueError, match="pip install 'cnnlab"):
        Timm(**SMALL)


def test_timm_network_has_logits_and_stages():
    pytest.importorskip("timm")
    model = Timm(**SMALL, name="resnet18", dropout=0.1)
    assert model(images(32, channels=1))["logits"].shape == (2, 5)
    stages = model.features(images(32, channels=1)).stages
    assert tuple(stage.shape[1] for stage in stages) == model.stage_channels


@pytest.mark.parametrize("stride", [8, 16])
def test_timms_output_stride_is_timms_own(stride: int):
    """The same weights in timm's own backbone give the same maps."""
    timm = pytest.importorskip("timm")
    network = Timm(num_classes=3, in_channels=3, image_size=(64, 64), name="resnet18", output_stride=stride).eval()
    theirs = timm.create_model("resnet18", features_only=True, output_stride=stride).eval()
    own = {name.removeprefix("network."): value for name, value in network.state_dict().items()}
    theirs.load_state_dict({name: own[name] for name in theirs.state_dict()})
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        found, expected = network.features(image).stages, theirs(image)
    assert [tuple(m.shape[-2:]) for m in found] == [tuple(m.shape[-2:]) for m in expected]
    assert found[-1].shape[-1] == 64 // stride
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
