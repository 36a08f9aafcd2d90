"""Every YAML of the groups model, activation and norm: complete, checked, and buildable without memory."""

import inspect
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from cnnlab.composing.signature import check_part, locate

CONFIGS = Path(__file__).parents[2] / "configs"
WIRED = ("num_classes", "in_channels", "image_size", "activation", "norm", "dropout", "stochastic_depth")


def presets(group):
    return sorted((CONFIGS / group).glob("*.yaml"), key=lambda path: path.stem)


OWN = [path for path in presets("model") if path.stem not in ("torchvision", "timm")]


def read(path):
    return yaml.safe_load(path.read_text())


def made(node, **wired):
    target = locate(node["_target_"])
    return target(**{key: value for key, value in node.items() if key != "_target_"}, **wired)


@pytest.mark.parametrize("group", ["model", "activation", "norm"])
def test_presets_begin_with_a_line_on_what_they_are(group):
    for path in presets(group):
        assert path.read_text().startswith("# "), path


@pytest.mark.parametrize("path", presets("model"), ids=lambda path: path.stem)
def test_model_presets_list_every_knob_with_a_valid_value(path):
    node = read(path)
    assert check_part(node, "model", WIRED) == []
    knobs = set(inspect.signature(locate(node["_target_"])).parameters) - set(WIRED)
    assert knobs == node.keys() - {"_target_"}


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (32, 3), (224, 3)])
@pytest.mark.parametrize("path", OWN, ids=lambda path: path.stem)
def test_model_presets_build_on_the_meta_device(path, side, channels):
    with torch.device("meta"):
        model = made(read(path), num_classes=10, in_channels=channels, image_size=(side, side))
        assert min(side, 224) >= model.min_size
        assert isinstance(model.stem, str)
        assert all("\n" not in note for note in model.notes)
        if side == 8:
            outputs = model(torch.empty(4, channels, side, side))
            assert outputs["logits"].shape == (4, 10)


@pytest.mark.parametrize("path", presets("activation"), ids=lambda path: path.stem)
def test_activation_presets_make_fresh_modules(path):
    node = read(path)
    if path.stem == "auto":
        assert node == {"_target_": None}
        return
    assert node.pop("_partial_") is True
    assert "inplace" not in node
    x = torch.linspace(-2, 2, 5)
    before = x.clone()
    one, other = made(node), made(node)
    assert one is not other
    assert one(x).shape == x.shape
    assert torch.equal(x, before)


@pytest.mark.parametrize("model", ["resnet", "resnet18", "vgg", "inception", "alexnet", "cnn", "mlp"])
@pytest.mark.parametrize("path", presets("norm"), ids=lambda path: path.stem)
def test_norm_presets_fit_the_networks(path, model):
    node = read(path)
    if path.stem == "auto":
        assert node == {"_target_": None}
        return
    assert check_part(node, "norm", ("channels",)) == []
    assert node.pop("_partial_") is True
    options = {"num_classes": 10, "in_channels": 1, "image_size": (8, 8)}

    def norm(channels):
        return made(node, channels=channels)

    with torch.device("meta"):
        try:
            network = made(read(CONFIGS / "model" / f"{model}.yaml"), **options, norm=norm)
        except ValueError as error:
            assert path.stem == "instance" and "1x1 map" in str(error)
            return
        assert network(torch.empty(4, 1, 8, 8))["logits"].shape == (4, 10)
    kinds = {type(norm(4))} - {nn.Identity}
    assert kinds <= {type(module) for module in network.modules()}
