"""What is measured of a network: against theory, against closed forms, and without a trace."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from nets import IMAGES, plain, signals
from torch import Tensor, nn

from cnnlab.diagnose.signal import DIRECTIONS, Signals, jacobian_of
from cnnlab.init import Constant, Default, Delta, He, LeCun, Normal, Orthogonal, Xavier
from cnnlab.models.cnn import CNN
from cnnlab.models.mlp import MLP
from cnnlab.models.norm import group, instance, layer
from cnnlab.models.resnet import CifarResNet
from cnnlab.models.vgg import VGG

WIDE = {"depth": 6, "width": 160}


def errors(found: Signals, key: str) -> list[float]:
    """|measured/theory - 1| of each layer, in a logarithm's measure."""
    pairs = [(getattr(row.measured, key), getattr(row.theory, key)) for row in found.layers if row.theory is not None]
    return [abs(math.log(measured / theory)) for measured, theory in pairs]


def initialized(model: nn.Module, init: Callable[[nn.Module, int], None] | None = None) -> nn.Module:
    (init or He())(model, 0)
    return model


# ---- theory ----


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU, nn.Sigmoid])
@pytest.mark.parametrize("init", [He(mode="fan_in"), Default()])
def test_theory_says_what_is_measured_in_a_wide_network(activation: type[nn.Module], norm: bool, init: He):
    found = signals(initialized(plain(activation, norm=norm, **WIDE), init))
    assert [row.theory is not None for row in found.layers] == [True] * 6
    # Without a norm a rectifier's deviation is a product of each layer's chance, which nothing draws back.
    bound = 0.45 if not norm and activation in (nn.ReLU, nn.GELU) else 0.15
    for key in ("pre_std", "std"):
        assert max(errors(found, key)) < bound, key
    # What a sigmoid gives all channels alike falls off at the padding, and batch norm keeps that and little else.
    assert max(errors(found, "gradient")) < (1.2 if norm and activation is nn.Sigmoid else 0.35)


@pytest.mark.parametrize("init", [Xavier(), LeCun(), Orthogonal(), Delta(orthogonal=True), Normal(0.03)])
def test_theory_reads_the_weights_of_any_init(init: Xavier):
    found = signals(initialized(plain(nn.Tanh, **WIDE), init))
    assert max(errors(found, "pre_std")) < 0.1
    assert max(errors(found, "gradient")) < 0.35


def test_a_rectifier_under_he_keeps_the_second_moment_but_at_the_padding():
    """Circular padding has no border: n·Var(w)/2 = 1, layer after layer (He et al. 2015, equation 10)."""
    model = plain(depth=10, width=64)
    padded = signals(initialized(model, He(mode="fan_in"))).layers
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.kernel_size, module.padding = (1, 1), (0, 0)
            module.weight = nn.Parameter(torch.zeros(64, module.in_channels, 1, 1))
    initialized(model, He(mode="fan_in"))
    theory = [row.theory.pre_std for row in signals(model).layers if row.theory is not None]
    assert theory == pytest.approx([theory[0]] * 10, rel=0.1)
    assert padded[-1].theory is not None and padded[0].theory is not None
    assert padded[-1].theory.pre_std < 0.8 * padded[0].theory.pre_std


def test_batch_norm_lets_gradients_grow_by_the_known_factor():
    """Yang et al. 2019, section 4: √(π/(π - 1)) = 1.21 a layer of ReLU, of inputs that have nothing in common."""
    blocks = [[nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU()] for _ in range(12)]
    model = nn.Sequential(nn.Flatten(), *[module for block in blocks for module in block], nn.Linear(256, 5))
    images = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    layers = signals(initialized(model), images).layers
    gradients = [row.theory.gradient for row in layers if row.theory is not None]
    assert (gradients[1] / gradients[9]) ** (1 / 8) == pytest.approx(math.sqrt(math.pi / (math.pi - 1)), rel=0.05)
    assert max(errors(signals(model, images), "gradient")) < 0.4


@pytest.mark.parametrize(
    "model",
    [
        lambda shared: CifarResNet(depth=14, width=32, **shared),
        lambda shared: CifarResNet(depth=14, width=32, projection="B", norm=group, **shared),
        lambda shared: CifarResNet(depth=8, width=32, norm=instance, **shared),
        lambda shared: CifarResNet(depth=14, width=32, activation=nn.SiLU, norm=layer, **shared),
        lambda shared: VGG(width=1.0, **shared),
        lambda shared: CNN(widths=(32, 64), depth=2, pool="avg", **shared),
        lambda shared: MLP(hidden=(256, 256, 256), **shared),
    ],
)
def test_theory_follows_the_laboratorys_networks(model: Callable[[dict[str, object]], nn.Module]):
    """Shortcuts, of which the sum is no Gaussian any more, cost some of the accuracy."""
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    made = initialized(model({"num_classes": 5, "in_channels": 3, "image_size": (16, 16)}), He(mode="fan_in"))
    found = signals(made, images)
    assert all(row.theory is not None for row in found.layers)
    for key, bound in (("pre_std", 0.4), ("std", 0.4), ("gradient", 0.8)):
        assert max(errors(found, key)) < bound, key


def test_weights_that_are_not_random_have_no_theory():
    found = signals(initialized(plain(depth=3, width=8), Constant(0.1)))
    assert [row.theory for row in found.layers] == [None] * 3
    assert all(math.isfinite(row.measured.std) for row in found.layers)


# ---- closed forms ----


def test_the_jacobian_of_a_linear_network_is_the_product_of_its_matrices():
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 20), nn.Linear(20, 7), nn.Linear(7, 5))
    product = model[3].weight @ model[2].weight @ model[1].weight
    found = jacobian_of(model, IMAGES[:2])
    assert found.exact and found.output == "logits"
    assert found.singular_values == pytest.approx(torch.linalg.svdvals(product.detach()).tolist(), rel=1e-4)
    assert found.condition == pytest.approx(float(torch.linalg.cond(product.detach())), rel=1e-3)


def test_an_orthogonal_linear_network_is_an_isometry():
    """Saxe et al. 2014, section 3: all singular values are 1, and so is each layer's share of signal and gradient."""
    model = nn.Sequential(nn.Flatten(), *[nn.Linear(108, 108, bias=False) for _ in range(6)])
    found = signals(initialized(model, Orthogonal()))
    assert found.jacobian.singular_values == pytest.approx([1] * DIRECTIONS, rel=1e-4)
    assert not found.jacobian.exact
    assert [row.kind for row in found.layers] == ["linear"] * 6
    for key in ("gradient", "angle", "signal"):
        values = [getattr(row.measured, key) for row in found.layers]
        assert values == pytest.approx([values[0]] * 6, rel=1e-3), key
    assert [row.effective_rank for row in found.layers] == pytest.approx([found.input_rank] * 6, rel=1e-4)
    assert max(errors(found, "std")) < 5e-3
    assert max(errors(found, "gradient")) < 1e-3


def test_gradients_are_those_of_a_samples_loss():
    model = initialized(plain(nn.Tanh, depth=2, width=4))
    found = signals(model)
    kept: list[Tensor] = []
    handle = model[3].register_forward_hook(lambda module, args, output: kept.append(output))
    logits = model(IMAGES)
    handle.remove()
    loss = nn.functional.cross_entropy(logits, torch.arange(8) % 5, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, kept[0])
    row = found.layers[1]
    assert row.name == "3"
    assert row.measured.gradient == pytest.approx(float(gradient.square().mean().sqrt()), rel=1e-5)
    assert row.measured.std == pytest.approx(float(kept[0].detach().std(correction=0)), rel=1e-5)
    between = (kept[0] - kept[0].mean(0)).detach()
    assert row.measured.signal == pytest.approx(float(between.square().mean().sqrt()), rel=1e-5)


def test_the_effective_rank_falls_under_he():
    layers = signals(initialized(plain())).layers
    assert layers[0].effective_rank > 7
    assert layers[-1].effective_rank < 5


# ---- whatever way a network is written ----


class Written(nn.Module):
    """Functions instead of modules, in place and not, a module that is used twice, and what theory does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1)
        self.act = nn.ReLU(inplace=True)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        x = (self.act(self.second(x)) - 0.1).relu_()
        left, right = x.chunk(2, 1)
        x = torch.tanh(torch.cat([right, left.sin()], 1))
        return self.fc(x.flatten(2).amax(2))


def test_functions_are_seen_and_modules_that_are_used_again_are_told_apart():
    found = signals(initialized(Written()))
    assert [(row.name, row.kind) for row in found.layers] == [
        ("act", "relu"),
        ("act #2", "relu"),
        ("relu", "relu"),
        ("tanh", "tanh"),
    ]
    assert [row.theory is not None for row in found.layers] == [True, True, False, False]
    assert all(row.measured.gradient > 0 for row in found.layers)
    assert found.outputs[0].name == "logits"


class Own(nn.Module):
    is_activation = True

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.7 * x)


def test_an_activation_of_ones_own_is_followed():
    found = signals(initialized(plain(Own, depth=4, width=128)))
    assert [row.kind for row in found.layers] == ["Own"] * 4
    assert max(errors(found, "std")) < 0.1
    assert max(errors(found, "gradient")) < 0.2


def test_what_is_computed_twice_is_measured_once():
    shared = {"num_classes": 5, "in_channels": 3, "image_size": (8, 8), "depth": 8, "width": 4}
    found = [signals(initialized(CifarResNet(checkpoint=checkpoint, **shared))) for checkpoint in (False, True)]
    assert [row.measured for row in found[0].layers] == [row.measured for row in found[1].layers]
    assert found[0].jacobian.singular_values == pytest.approx(found[1].jacobian.singular_values, rel=1e-5)


def test_auxiliary_heads_are_outputs():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.aux, self.fc = plain(depth=2, width=8)[:4], nn.LazyLinear(5), nn.LazyLinear(5)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            flat = self.body(x).flatten(1)
            return {"logits": self.fc(flat), "aux": self.aux(flat)} if self.training else {"logits": self.fc(flat)}

    model = Two()
    model(IMAGES)
    found = signals(model)
    assert [row.name for row in found.outputs] == ["logits", "aux"]
    assert found.jacobian.output == "logits"


# ---- no trace ----


@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_changed(training: bool):
    model = CifarResNet(num_classes=5, in_channels=3, image_size=(6, 6), depth=8, width=4, dropout=0.5)
    initialized(model).train(training)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    signals(model, torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "fc.weight")
    assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_nothing_is_changed_by_a_network_that_fails():
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            self.norm(x)
            raise RuntimeError("broken")

    model = Fails()
    with pytest.raises(RuntimeError, match="broken"):
        signals(model)
    assert torch.equal(model.norm.running_mean, torch.zeros(3)) and model.norm.momentum == 0.1
    assert not model._forward_hooks and not model.norm._forward_pre_hooks


def test_one_image_is_too_few():
    with pytest.raises(ValueError, match="at least two images, received 1"):
        signals(plain(depth=2), IMAGES[:1])
