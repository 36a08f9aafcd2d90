"""Initializations against the closed forms of their papers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from cnnlab import init as inits

SCHEMES = {
    "default": inits.Default(),
    "zeros": inits.Zeros(),
    "constant": inits.Constant(0.5),
    "normal": inits.Normal(),
    "truncated_normal": inits.TruncatedNormal(),
    "lecun": inits.LeCun(),
    "xavier": inits.Xavier(),
    "he": inits.He(),
    "orthogonal": inits.Orthogonal(),
    "delta": inits.Delta(),
    "delta_orthogonal": inits.Delta(orthogonal=True),
    "lsuv": inits.LSUV(),
    "alexnet_2012": inits.PaperAlexNet(),
    "vgg_2014": inits.PaperVgg(),
    "own": inits.Own(),
}
LAYERS = {
    "conv": lambda: nn.Conv2d(32, 64, 3),
    "grouped": lambda: nn.Conv2d(64, 128, 3, groups=4),
    "depthwise": lambda: nn.Conv2d(512, 1024, 5, groups=512),
    "transposed": lambda: nn.ConvTranspose2d(32, 64, 4, groups=2),
    "linear": lambda: nn.Linear(256, 128),
}
FANS = {  # (fan_in, fan_out): what an output adds up, and how many outputs an input reaches
    "conv": (32 * 9, 64 * 9),
    "grouped": (16 * 9, 32 * 9),
    "depthwise": (25, 2 * 25),
    "transposed": (16 * 16, 32 * 16),
    "linear": (256, 128),
}


class Block(nn.Module):
    residual_norm = "last"

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.BatchNorm2d(8)

    def forward(self, x):
        return x + self.last(self.conv(x))


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.PReLU(8),
        Block(),
        nn.Flatten(),
        nn.Linear(8 * 36, 5),
    )


def filled(layer, init, seed=0):
    init(layer, seed)
    return layer.weight.detach()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_variances_are_those_of_the_papers(name, distribution):
    fan_in, fan_out = FANS[name]
    expected = {
        inits.LeCun(distribution): 1 / fan_in,
        inits.Xavier(distribution): 2 / (fan_in + fan_out),
        inits.Xavier(distribution, gain=3.0): 18 / (fan_in + fan_out),
        inits.He("fan_in", distribution): 2 / fan_in,
        inits.He("fan_out", distribution): 2 / fan_out,
        inits.He("fan_in", distribution, negative_slope=0.5): 2 / (1.25 * fan_in),
    }
    for init, variance in expected.items():
        weight = filled(LAYERS[name](), init)
        # The standard error of a variance is at most √(2/n) of it; five of them.
        assert float(weight.var() / variance) == pytest.approx(1, abs=5 * math.sqrt(2 / weight.numel()))
        assert abs(float(weight.mean())) < 5 * math.sqrt(variance / weight.numel())
        if distribution == "uniform":
            assert float(weight.abs().max()) <= math.sqrt(3 * variance) * (1 + 1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_default_has_the_bounds_of_pytorch(name):
    torch.manual_seed(0)
    theirs, ours = LAYERS[name](), LAYERS[name]()
    inits.Default()(ours, 0)
    for parameter in ("weight", "bias"):
        a, b = getattr(ours, parameter).detach(), getattr(theirs, parameter).detach()
        assert float(a.abs().max() / b.abs().max()) == pytest.approx(1, abs=0.06)
        assert float(a.std() / b.std()) == pytest.approx(1, abs=0.2 if parameter == "bias" else 0.05)


def test_truncated_normal_has_the_variance_of_the_cut_distribution():
    weight = filled(nn.Linear(500, 400), inits.TruncatedNormal(std=0.1, cut=2.0)).double()
    density, inside = math.exp(-2) / math.sqrt(2 * math.pi), math.erf(2 / math.sqrt(2))
    assert float(weight.std()) == pytest.approx(0.1 * math.sqrt(1 - 4 * density / inside), rel=0.01)
    assert float(weight.abs().max()) <= 0.2 + 1e-7


@pytest.mark.parametrize("name", LAYERS)
def test_orthogonal_is_orthonormal_in_every_group(name):
    layer = LAYERS[name]()
    groups = getattr(layer, "groups", 1)
    matrices = filled(layer, inits.Orthogonal(gain=2.0)).flatten(1).unflatten(0, (groups, -1))
    rows, columns = matrices.shape[1:]
    gram = matrices @ matrices.mT if rows <= columns else matrices.mT @ matrices
    torch.testing.assert_close(gram, 4 * torch.eye(min(rows, columns)).expand(groups, -1, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("groups", [1, 2])
def test_delta_passes_the_input_on(groups):
    layer = nn.Conv2d(6, 6, 3, padding=1, groups=groups)
    inits.Delta()(layer, 0)
    x = torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(layer(x), x)
    inits.Delta(orthogonal=True, gain=2.0)(layer, 0)
    y = layer(x).detach()
    torch.testing.assert_close(y.square().sum(1), 4 * x.square().sum(1))
    assert not torch.allclose(y, 2 * x)


def test_zeros_and_constant_leave_every_unit_of_a_layer_the_same_gradient():
    x, target = torch.randn(16, 3, 6, 6), torch.randint(5, (16,))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, 5))
    for init in (inits.Zeros(), inits.Constant(0.01)):
        init(model, 0)
        model.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        for layer in (model[0], model[2]):
            torch.testing.assert_close(layer.weight.grad, layer.weight.grad[:1].expand_as(layer.weight))
    assert model[0].weight.grad.abs().max() > 0
    inits.Zeros()(model, 0)
    model.zero_grad()
    nn.functional.cross_entropy(model(x), target).backward()
    assert all(torch.all(layer.weight.grad == 0) for layer in (model[0], model[2]))


def test_xavier_falls_behind_he_by_a_factor_of_root_two_a_layer():
    """He et al. 2015, section 2.2: with equal fans the ratio of pre-activations is exactly 2^(-l/2)."""
    depth = 30
    model = nn.Sequential(*[part for _ in range(depth) for part in (nn.Conv2d(12, 12, 3, padding=1), nn.ReLU())])
    images = torch.randn(8, 12, 8, 8, generator=torch.Generator().manual_seed(0))

    def stds(init):
        init(model, 3)
        found, x = [], images
        with torch.no_grad():
            for part in model:
                x = part(x)
                if isinstance(part, nn.Conv2d):
                    found.append(float(x.double().std()))
        return found

    he, xavier = stds(inits.He("fan_in", "normal")), stds(inits.Xavier("normal"))
    for place, (a, b) in enumerate(zip(xavier, he), start=1):
        assert a / b == pytest.approx(2 ** (-place / 2), rel=0.01)


@pytest.mark.parametrize("name", SCHEMES)
def test_other_parameters(name):
    model = network()
    with torch.no_grad():
        model[3].last.running_mean.fill_(7)
        for parameter in model.parameters():
            parameter.fill_(9)
    SCHEMES[name](model, 0)
    if name not in ("default", "alexnet_2012"):
        assert all(torch.all(layer.bias == 0) for layer in (model[0], model[3].conv, model[5]))
    assert torch.all(model[1].weight == 1)
    assert torch.all(model[1].bias == 0)
    assert torch.all(model[2].weight == 0.25)
    assert torch.all(model[3].last.running_mean == 0)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_tensor_depends_on_seed_and_name_only(name):
    first, second = network(), network()
    second[0] = nn.Conv2d(3, 8, 5, padding=2)
    SCHEMES[name](first, 4)
    torch.manual_seed(123)
    SCHEMES[name](second, 4)
    kept = {key: value for key, value in first.state_dict().items() if not key.startswith("0.")}
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in kept.items())
    if name not in ("zeros", "constant", "delta"):
        SCHEMES[name](second, 5)
        assert not torch.equal(first[5].weight, second[5].weight)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_global_random_state_is_left_alone(name):
    before = torch.get_rng_state()
    model = network()
    between = torch.get_rng_state()
    SCHEMES[name](model, 0)
    assert torch.equal(torch.get_rng_state(), between)
    assert not torch.equal(before, between)


@pytest.mark.parametrize("name", SCHEMES)
def test_memory_that_was_never_set_is_filled(name):
    reference = network()
    SCHEMES[name](reference, 0)
    with torch.device("meta"):
        empty = network()
    empty = empty.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in empty.parameters():
            parameter.fill_(float("nan"))
    SCHEMES[name](empty, 0)
    for key, value in reference.state_dict().items():
        assert torch.equal(value, empty.state_dict()[key]), key


def test_half_precision_parameters_get_the_rounded_numbers():
    single, half = network(), network().bfloat16()
    inits.He()(single, 0)
    inits.He()(half, 0)
    assert torch.equal(half[0].weight, single[0].weight.bfloat16())


# --- residual branches


def test_zero_residual_makes_a_block_the_identity():
    model = network()
    inits.He(zero_residual=True)(model, 0)
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(model[3](x), x)


def test_zero_residual_knows_torchvisions_blocks():
    from torchvision.models import resnet18, resnet50

    for make, last in ((resnet18, "bn2"), (resnet50, "bn3")):
        with torch.device("meta"):
            model = make()
        found = inits.base.residual_norms(model)
        assert found == [getattr(block, last) for block in model.modules() if hasattr(block, last)]


def test_zero_residual_without_branches_is_refused():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="zero_residual=false"):
        inits.He(zero_residual=True).validate(plain.to("meta"))


# --- papers and the model's own


def test_alexnet_of_2012_has_biases_of_one_where_the_paper_has():
    convolutions = [nn.Conv2d(4, 4, 3) for _ in range(5)]
    model = nn.Sequential(*convolutions, nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    inits.PaperAlexNet()(model, 0)
    assert [float(layer.bias.detach().mean()) for layer in model] == [0, 1, 0, 1, 1, 1, 1, 0]
    weights = torch.cat([layer.weight.detach().flatten() for layer in model])
    assert float(weights.std()) == pytest.approx(0.01, rel=0.15)


def test_own_is_what_the_model_states():
    model = network()
    model.own_init = {"_target_": "cnnlab.init.Constant", "value": 0.125}
    inits.Own()(model, 0)
    assert torch.all(model[0].weight == 0.125)
    model.own_init["zero_residual"] = True
    inits.Own()(model, 0)
    assert torch.all(model[3].last.weight == 0)
    inits.Own(zero_residual=False)(model, 0)
    assert torch.all(model[3].last.weight == 1)
    assert model.own_init == {"_target_": "cnnlab.init.Constant", "value": 0.125, "zero_residual": True}


def test_own_of_a_model_that_states_none_is_he():
    own, he = network(), network()
    inits.Own()(own, 0)
    inits.He(mode="fan_out")(he, 0)
    assert torch.equal(own[0].weight, he[0].weight)


def test_own_refuses_an_initialization_that_needs_data():
    model = network()
    model.own_init = {"_target_": "cnnlab.init.LSUV"}
    with pytest.raises(ValueError, match="init=lsuv"):
        inits.Own().validate(model)


# --- LSUV


def outputs_std(model, images):
    found = []
    handles = [
        layer.register_forward_hook(lambda _, __, output: found.append(float(output.std())))
        for layer in model.modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


def test_lsuv_gives_every_layer_unit_variance():
    model = nn.Sequential(
        *[part for width in (3, 8, 8, 8) for part in (nn.Conv2d(width, 8, 3, padding=1), nn.ReLU())],
        nn.Flatten(),
        nn.Linear(8 * 36, 5),
    )
    images = torch.randn(32, 3, 6, 6)
    init = inits.LSUV()
    init(model, 0)
    assert max(outputs_std(model, images)) < 0.9
    init.calibrate(model, images)
    assert outputs_std(model, images) == pytest.approx([1] * 5, abs=1e-3)


def test_calibration_leaves_modes_buffers_hooks_and_random_state():
    model = network()
    model.insert(5, nn.Dropout(0.5))
    model[0].eval()
    init = inits.LSUV()
    init(model, 0)
    modes = [module.training for module in model.modules()]
    buffers = copy.deepcopy(dict(model.named_buffers()))
    state = torch.get_rng_state()
    init.calibrate(model, torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0)))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_with_constant_output_keeps_its_weight():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    init = inits.LSUV()
    init(model, 0)
    before = model[0].weight.detach().clone()
    init.calibrate(model, torch.zeros(4, 3, 6, 6))
    assert torch.equal(model[0].weight, before)
    assert torch.isfinite(model[2].weight).all()


def test_speednets_convolutions_pass_their_input_on_and_its_classifier_has_unit_weights():
    model = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.Flatten(), nn.Linear(16 * 25, 200))
    inits.PaperSpeedNet()(model, seed=0)
    image = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    out = model[0](image)
    torch.testing.assert_close(out[:, :4], image)
    other = model[0].weight[4:]
    assert other.abs().max() <= 1 / 6, "PyTorch's bound, 1/√fan_in"
    assert other.std().item() == pytest.approx(1 / 6 / 3**0.5, rel=0.05)
    assert model[2].weight.std().item() == pytest.approx(1, rel=0.01)
    assert not any(module.bias.any() for module in (model[0], model[2]))
