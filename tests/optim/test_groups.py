"""Parameter groups on networks shaped like ResNet and VGG."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from lab_runs import make_run
from torch import nn

from cnnlab.inspect import meta
from cnnlab.inspect.layers import head_parameters, named_layers
from cnnlab.optim import freeze_parameters, parameter_groups


def parameters_of_layers(model: torch.nn.Module) -> list[list[str]]:
    return [names for _, names in named_layers(model)]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)
        self.norm = nn.LayerNorm([4, 2, 2])  # its scale has three axes


class Residual(nn.Module):
    classifier_modules = ("fc",)

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(Block(), Block())
        self.layer10 = nn.Sequential(Block())
        self.act = nn.PReLU()
        self.fc = nn.Linear(4, 2)


def plain():
    features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    model = nn.Sequential(OrderedDict(features=features, classifier=nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))))
    model.classifier_modules = ("classifier",)
    return model


def names_of(model, group):
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return [known[id(parameter)] for parameter in group["params"]]


def test_layers_of_a_residual_net_are_its_stem_and_stages():
    found = parameters_of_layers(Residual())
    assert [names[0] for names in found] == [
        "conv1.weight", "layer1.0.conv.weight", "layer10.0.conv.weight", "fc.weight",
    ]  # fmt: skip
    assert found[0] == ["conv1.weight", "bn1.weight", "bn1.bias"]
    assert found[2][-1] == "act.weight"  # no weight of its own: part of the layer before


def test_layers_of_a_plain_net_are_its_convolutions_and_the_head():
    found = parameters_of_layers(plain())
    assert found == [
        ["features.0.weight", "features.0.bias", "features.1.weight", "features.1.bias"],
        ["features.3.weight", "features.3.bias"],
        ["classifier.0.weight", "classifier.0.bias", "classifier.1.weight", "classifier.1.bias"],
    ]


def test_layers_of_another_librarys_network_are_those_inside_the_wrapper():
    wrapper = nn.Module()
    wrapper.network = Residual()
    assert parameters_of_layers(wrapper) == [
        [f"network.{name}" for name in names] for names in parameters_of_layers(Residual())
    ]
    wrapper.head = nn.Conv2d(4, 2, 1)
    assert [names[0] for names in parameters_of_layers(wrapper)][-2:] == ["network.fc.weight", "head.weight"]


@pytest.mark.parametrize("make", [Residual, plain])
@pytest.mark.parametrize("options", [{}, {"layer_decay": 0.5}, {"head_lr": 2.0, "decay_norm_and_bias": True}])
def test_every_parameter_is_in_exactly_one_group(make, options):
    model = make()
    groups = parameter_groups(model, weight_decay=0.1, **options)
    grouped = [name for group in groups for name in names_of(model, group)]
    assert sorted(grouped) == sorted(name for name, _ in model.named_parameters())


def test_norms_biases_and_slopes_do_not_decay():
    model = Residual()
    groups = {group["name"]: group for group in parameter_groups(model, weight_decay=0.1)}
    assert set(groups) == {"all", "all, no decay"}
    decaying = names_of(model, groups["all"])
    assert decaying == [
        "conv1.weight", "layer1.0.conv.weight", "layer1.1.conv.weight", "layer10.0.conv.weight", "fc.weight",
    ]  # fmt: skip
    assert groups["all"]["weight_decay"] == 0.1
    assert groups["all, no decay"]["weight_decay"] == 0


def test_all_may_decay_alike():
    (group,) = parameter_groups(Residual(), weight_decay=0.1, decay_norm_and_bias=True)
    assert group["weight_decay"] == 0.1


def test_an_optimizer_without_weight_decay_gets_none():
    (group,) = parameter_groups(Residual(), weight_decay=None)
    assert "weight_decay" not in group
    torch.optim.LBFGS([group])


def test_rates_fall_by_the_layer_and_the_head_has_its_own():
    model = Residual()
    groups = parameter_groups(model, weight_decay=None, layer_decay=0.5, head_lr=3.0)
    rates = {name: group["lr_scale"] for group in groups for name in names_of(model, group)}
    assert rates["conv1.weight"] == rates["bn1.bias"] == 0.125
    assert rates["layer1.0.conv.weight"] == rates["layer1.1.norm.weight"] == 0.25
    assert rates["layer10.0.conv.weight"] == 0.5
    assert rates["fc.weight"] == rates["fc.bias"] == 3.0


def test_a_tasks_head_is_the_head():
    model = Residual()
    model.fc = None
    model.head = nn.Conv2d(4, 2, 1)
    assert head_parameters(model) == {"head.weight", "head.bias"}
    groups = parameter_groups(model, weight_decay=None, head_lr=10.0)
    assert [(group["name"], group["lr_scale"]) for group in groups] == [("backbone", 1.0), ("head", 10.0)]


def test_extra_keys_survive_in_torchs_groups():
    groups = parameter_groups(Residual(), weight_decay=0.1, layer_decay=0.5)
    optimizer = torch.optim.SGD(groups, lr=0.1)
    state = optimizer.state_dict()["param_groups"]
    assert [group["lr_scale"] for group in state] == [group["lr_scale"] for group in groups]


def test_freezing_takes_whole_components_of_a_name():
    model = Residual()
    frozen = freeze_parameters(model, ["layer1", "fc.bias"])
    assert frozen == [name for name, _ in model.named_parameters() if name.startswith("layer1.")] + ["fc.bias"]
    assert all(parameter.requires_grad == (name not in frozen) for name, parameter in model.named_parameters())


def test_frozen_parameters_are_in_no_group():
    model = Residual()
    groups = parameter_groups(model, weight_decay=0.1, freeze=("conv1", "layer1"))
    grouped = [name for group in groups for name in names_of(model, group)]
    assert grouped
    assert not any(name.startswith(("conv1.", "layer1.")) for name in grouped)


@pytest.mark.parametrize(("prefix", "meant"), [("layr1", "layer1"), ("layer1.0.cnov", "layer1.0.conv")])
def test_an_unknown_prefix_is_answered_with_the_nearest(prefix, meant):
    with pytest.raises(ValueError, match=rf"received '{prefix}' \(did you mean `{meant}`\?\)"):
        freeze_parameters(Residual(), [prefix])


def test_combinations_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="frozen as a whole"):
        parameter_groups(plain(), weight_decay=None, freeze=("features", "classifier"))
    with pytest.raises(ValueError, match="type groups.head_lr=1"):
        parameter_groups(nn.Linear(2, 2), weight_decay=None, head_lr=2.0)
    with pytest.raises(ValueError, match="takes one parameter group"):
        parameter_groups(plain(), weight_decay=None, layer_decay=0.5, single_group=True)
    assert len(parameter_groups(plain(), weight_decay=None, single_group=True)) == 1


LAB = {
    "speednet": ["whiten", "blocks.0", "blocks.1", "blocks.2", "head"],
    "cnn": ["blocks.0", "blocks.1", "blocks.2", "head"],
    "mlp": ["layers.0", "layers.1", "head"],
    "resnet": ["conv1", "layer1", "layer2", "layer3", "head"],
    "vgg": [*(f"features.{place}" for place in (0, 3, 6, 8, 11, 13, 16, 18)), "head"],
}


@pytest.mark.parametrize("name", LAB)
def test_each_block_or_stage_of_the_labs_networks_is_a_layer(name):
    model = make_run(f"model={name}").model
    assert [title for title, _ in named_layers(model)] == LAB[name]
    groups = parameter_groups(model, weight_decay=None, layer_decay=0.5)
    rates = [group["lr_scale"] for group in groups]
    assert rates == [*(0.5**depth for depth in range(len(rates) - 1, 0, -1)), 1.0]
    assert [group["name"] for group in groups][:2] == [f"layer {place}: {LAB[name][place]}" for place in (0, 1)]


TORCHVISION = {
    "mobilenet_v3_small": ("features", 13),
    "efficientnet_b0": ("features", 9),
    "convnext_tiny": ("features", 8),
    "swin_t": ("features", 8),
    "vit_b_16": ("encoder.layers", 12),
    "regnet_y_400mf": ("trunk_output", 4),
    "maxvit_t": ("blocks", 4),
    "densenet121": ("features", 8),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_one_list_that_holds_the_depth_is_opened_wherever_it_lies(name):
    import torchvision

    wrapper = nn.Module()
    wrapper.network = meta.made(lambda: torchvision.models.get_model(name, weights=None))
    path, items = TORCHVISION[name]
    found = named_layers(wrapper)
    inside = [title for title, _ in found if title.startswith(f"network.{path}.")]
    assert len({title.split(".")[path.count(".") + 2] for title in inside}) == len(inside) == items
    assert sorted(name for _, names in found for name in names) == sorted(n for n, _ in wrapper.named_parameters())


def test_what_has_no_layer_of_its_own_belongs_to_its_neighbour():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.class_token = nn.Parameter(torch.zeros(1, 1, 4))
            self.patches = nn.Conv2d(3, 4, 2)
            self.encoder = nn.Module()
            self.encoder.positions = nn.Parameter(torch.zeros(1, 5, 4))
            self.encoder.layers = nn.ModuleList(Block() for _ in range(2))
            self.encoder.norm = nn.LayerNorm(4)
            self.reduce = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))

    assert [names for _, names in named_layers(Tokens())] == [
        ["class_token", "patches.weight", "patches.bias", "encoder.positions"],
        [f"encoder.layers.0.{name}" for name, _ in Block().named_parameters()],
        [f"encoder.layers.1.{name}" for name, _ in Block().named_parameters()]
        + ["encoder.norm.weight", "encoder.norm.bias"],
        ["reduce.0.weight", "reduce.0.bias", "reduce.1.weight", "reduce.1.bias"],
    ]
    assert len(parameters_of_layers(nn.Linear(2, 2))) == 1
