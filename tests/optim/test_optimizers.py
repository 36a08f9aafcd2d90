"""Optimizers against hand loops, closed forms and known problems."""

from __future__ import annotations

import copy
import importlib
import io
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from cnnlab.optim import Muon, NewtonCG, RMSPropInside, Traits
from cnnlab.optim.muon import orthogonalize
from cnnlab.optim.traits import accelerated, keep_kernels

PRESETS = sorted((Path(__file__).parents[2] / "configs" / "optim").glob("*.yaml"))

LARGER_RATES = dict.fromkeys(("adam", "adamw", "nadam", "rmsprop", "soap", "lion"), 0.02)
LARGER_RATES |= {"momentum": 0.02, "nesterov": 0.02, "adagrad": 0.1, "radam": 0.1, "sophia": 2.0}
"""A preset's rate is meant for hundreds of steps of a deep network; sixty steps of a small one need more."""


def make(path, params, **overrides):
    """The optimizer of a YAML node; skips where its library is an extra that is not installed."""
    node = yaml.safe_load(path.read_text()) | overrides
    module, _, name = node.pop("_target_").rpartition(".")
    if path.stem in ("lion", "shampoo", "soap", "sophia"):
        pytest.importorskip("pytorch_optimizer")
    return getattr(importlib.import_module(module), name)(params, **node)


class Problem:
    """Two Gaussian clusters a class and a small network: solvable, not convex."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3))
        self.target = torch.arange(48) % 3
        centers = torch.randn(6, 1, 4, 4)
        self.images = centers[torch.arange(48) % 6] + 0.3 * torch.randn(48, 1, 4, 4)

    def loss(self):
        return nn.functional.cross_entropy(self.model(self.images), self.target)

    def step(self, optimizer):
        traits = Traits.of(type(optimizer))

        def closure():
            loss = self.loss()
            if not traits.create_graph:
                optimizer.zero_grad()
                loss.backward()
            return loss

        if traits.closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_solves_a_small_problem(path):
    problem = Problem()
    overrides = {"lr": LARGER_RATES[path.stem]} if path.stem in LARGER_RATES else {}
    optimizer = make(path, problem.model.parameters(), **overrides)
    before = float(problem.loss().detach())
    for _ in range(60):
        problem.step(optimizer)
    assert float(problem.loss().detach()) < 0.3 * before


@pytest.mark.parametrize("name", ["muon", "newton_cg", "rmsprop_inception", "sophia"])
def test_a_resumed_optimizer_goes_on_bit_for_bit(name):
    path = next(path for path in PRESETS if path.stem == name)
    whole = Problem()
    optimizer = make(path, whole.model.parameters())
    for _ in range(4):
        whole.step(optimizer)
    file = io.BytesIO()
    torch.save({"model": whole.model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = Problem()
    resumed.model.load_state_dict(saved["model"])
    again = make(path, resumed.model.parameters())
    again.load_state_dict(saved["optimizer"])
    torch.rand(5)  # nothing may hang on the global random state
    for _ in range(8):
        whole.step(optimizer)
        resumed.step(again)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("make_optimizer", [Muon, RMSPropInside, NewtonCG])
def test_the_rate_may_be_a_tensor(make_optimizer):
    number, tensor = Problem(), Problem()
    first = make_optimizer(number.model.parameters(), lr=0.5)
    second = make_optimizer(tensor.model.parameters(), lr=0.1)
    for group in second.param_groups:
        group["lr"] = torch.tensor(0.5)
    for _ in range(3):
        number.step(first)
        tensor.step(second)
    for a, b in zip(number.model.parameters(), tensor.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_captured_update_reads_nothing_on_the_host():
    gpu = torch.device("cuda")
    assert accelerated(torch.optim.AdamW, {}, gpu, captured=True) == {"fused": True, "capturable": True}
    assert accelerated(torch.optim.AdamW, {"fused": False}, gpu, captured=True) == {"capturable": True}
    assert accelerated(torch.optim.RMSprop, {}, gpu, captured=True) == {"capturable": True}
    assert accelerated(torch.optim.SGD, {}, gpu, captured=True) == {"fused": True}
    assert accelerated(torch.optim.AdamW, {}, gpu) == {"fused": True}
    assert accelerated(Muon, {}, gpu, captured=True) == accelerated(torch.optim.RMSprop, {}, gpu) == {}


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.RMSprop])
def test_a_checkpoint_of_a_gpu_leaves_the_kernels_to_the_cpu(kind):
    written, read = Problem(), Problem()
    theirs, ours = kind(written.model.parameters(), lr=0.1), kind(read.model.parameters(), lr=0.1)
    keep_kernels(ours)
    written.step(theirs)
    state = theirs.state_dict()
    for group in state["param_groups"]:  # as a captured run has it, read to the CPU
        group |= {"lr": torch.tensor(0.25), "capturable": True, "foreach": True}
    ours.load_state_dict(state)
    read.step(ours)  # refuses, if it is told to be captured
    (group,) = ours.param_groups
    assert group["lr"] == 0.25 and isinstance(group["lr"], float)
    assert group["capturable"] is False and group["foreach"] is None
    with pytest.raises(ValueError, match="different number of parameter groups"):
        ours.load_state_dict({**state, "param_groups": state["param_groups"] * 2})


@pytest.mark.parametrize("make_optimizer", [Muon, RMSPropInside])
def test_parameters_without_gradient_stay(make_optimizer):
    used, unused = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    optimizer = make_optimizer([used, unused])
    used.square().sum().backward()
    optimizer.step()
    assert torch.all(unused == 1)
    assert not torch.any(used == 1)


# --- formulas


def gradients(shape, count=6):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def test_momentum_preset_is_v_equals_beta_v_plus_g():
    path = next(path for path in PRESETS if path.stem == "momentum")
    weight = nn.Parameter(torch.ones(4))
    optimizer = make(path, [weight], lr=0.1, momentum=0.8, weight_decay=0.0)
    w, v = torch.ones(4), torch.zeros(4)
    for g in gradients(4):
        weight.grad = g.clone()
        optimizer.step()
        v = 0.8 * v + g
        w = w - 0.1 * v
        torch.testing.assert_close(weight.detach(), w, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_rmsprop_has_epsilon_inside_the_root(momentum, weight_decay):
    weight = nn.Parameter(torch.ones(4))
    optimizer = RMSPropInside([weight], lr=0.05, decay=0.9, eps=0.5, momentum=momentum, weight_decay=weight_decay)
    w, s, v = torch.ones(4, dtype=torch.float64), 0.0, 0.0
    for step, g in enumerate(gradients(4)):
        rate = 0.05 / (1 + step)  # the rate is inside the velocity
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = g.clone()
        optimizer.step()
        g = g.double() + weight_decay * w
        s = 0.9 * s + 0.1 * g**2
        v = momentum * v + rate * g / (s + 0.5).sqrt()
        w = w - v
        torch.testing.assert_close(weight.detach().double(), w, rtol=1e-5, atol=1e-6)


def test_the_rmsprop_preset_has_epsilon_outside_the_root():
    """PyTorch's convention: s = ρs + (1-ρ)g², w = w - αg/(√s + ε), with the preset's own ρ and ε."""
    path = next(path for path in PRESETS if path.stem == "rmsprop")
    node = yaml.safe_load(path.read_text())
    weight = nn.Parameter(torch.ones(4))
    optimizer = make(path, [weight], lr=0.05, eps=0.5, momentum=0.0, weight_decay=0.0)
    w, s = torch.ones(4, dtype=torch.float64), 0.0
    for g in gradients(4):
        weight.grad = g.clone()
        optimizer.step()
        s = node["alpha"] * s + (1 - node["alpha"]) * g.double() ** 2
        w = w - 0.05 * g / (s.sqrt() + 0.5)
        torch.testing.assert_close(weight.detach().double(), w, rtol=1e-5, atol=1e-6)


def test_nesterov_preset_looks_ahead():
    """v = βv + g, w = w - α(g + βv) (Sutskever et al. 2013, equations 3 and 4, at the looked-ahead weights)."""
    path = next(path for path in PRESETS if path.stem == "nesterov")
    weight = nn.Parameter(torch.ones(4))
    optimizer = make(path, [weight], lr=0.1, momentum=0.8, weight_decay=0.0)
    w, v = torch.ones(4), torch.zeros(4)
    for g in gradients(4):
        weight.grad = g.clone()
        optimizer.step()
        v = 0.8 * v + g
        w = w - 0.1 * (g + 0.8 * v)
        torch.testing.assert_close(weight.detach(), w, rtol=1e-6, atol=1e-7)


def test_rmsprop_of_tiny_gradients_makes_tiny_steps():
    ours, theirs = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    for weight, optimizer in (
        (ours, RMSPropInside([ours], lr=1.0, momentum=0.0)),
        (theirs, torch.optim.RMSprop([theirs], lr=1.0, alpha=0.9)),
    ):
        weight.grad = torch.full((1,), 1e-4)
        optimizer.step()
    assert float(-ours.detach()) == pytest.approx(1e-4, rel=1e-3)
    assert float(-theirs.detach()) == pytest.approx(10**0.5, rel=1e-3)


# --- Muon


@pytest.mark.parametrize("shape", [(16, 8, 3, 3), (64, 3, 3, 3), (10, 32), (32, 10)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_moves_convolutions_along_an_orthogonal_matrix(shape, nesterov):
    weight = nn.Parameter(torch.zeros(shape))
    optimizer = Muon([weight], lr=1.0, weight_decay=0.0, nesterov=nesterov)
    (weight.grad,) = gradients(shape, 1)
    optimizer.step()
    move = -weight.detach().flatten(1)
    rows, columns = move.shape
    values = torch.linalg.svdvals(move / max(1, rows / columns) ** 0.5)
    assert values.min() > 0.6
    assert values.max() < 1.25
    # The factor itself: the same singular vectors as the gradient's.
    u, _, vh = torch.linalg.svd(weight.grad.flatten(1), full_matrices=False)
    diagonal = (u.T @ move @ vh.T).diagonal() / max(1, rows / columns) ** 0.5
    torch.testing.assert_close(diagonal, torch.ones_like(diagonal), atol=0.4, rtol=0)


def test_muon_matches_torchs_for_matrices():
    start = torch.randn(12, 20, generator=torch.Generator().manual_seed(1))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    first = Muon([ours], lr=0.1, weight_decay=0.1)
    second = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1)
    for g in gradients((12, 20), 4):
        ours.grad, theirs.grad = g.clone(), g.clone()
        first.step()
        second.step()
    # Both iterate in bfloat16 where the machine computes it; elsewhere we do in float32.
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0)


def test_muon_on_normalized_weights_moves_along_a_sphere():
    """After a step of rate r from the sphere of norm √rows, the weight is that far from its projection, no more."""
    weight = nn.Parameter(3 * torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(1)))
    optimizer = Muon([weight], lr=0.1, weight_decay=0.5, normalize_weights=True)
    for g in gradients(weight.shape, 3):
        before = weight.detach() * (4 / weight.detach().norm())
        weight.grad = g.clone()
        optimizer.step()
        values = torch.linalg.svdvals((weight.detach() - before).flatten(1))
        assert 0.06 < values.min() <= values.max() < 0.125


def test_muon_can_leave_linear_layers_to_adamw():
    start = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    first = Muon([ours], lr=0.1, adamw_ratio=0.5, weight_decay=0.1, convolutions_only=True)
    second = torch.optim.AdamW([theirs], lr=0.05, betas=(0.9, 0.95), weight_decay=0.1)
    for g in gradients((6, 5)):
        ours.grad, theirs.grad = g.clone(), g.clone()
        first.step()
        second.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(7,), (6, 5), ()])
def test_muon_gives_vectors_and_huge_matrices_adamw_steps(shape):
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    first = Muon([ours], lr=0.1, adamw_ratio=0.5, weight_decay=0.1, max_dim=4)
    second = torch.optim.AdamW([theirs], lr=0.05, betas=(0.9, 0.95), weight_decay=0.1)
    for g in gradients(shape):
        ours.grad, theirs.grad = g.clone(), g.clone()
        first.step()
        second.step()
        torch.testing.assert_close(ours, theirs)


def test_muon_is_the_same_for_stacked_weights_and_any_memory_layout():
    start = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    alone = nn.Parameter(start.clone())
    twins = [nn.Parameter(start.clone()), nn.Parameter(start.to(memory_format=torch.channels_last))]
    first, second = Muon([alone]), Muon(twins)
    for g in gradients(start.shape, 3):
        for weight in (alone, *twins):
            weight.grad = g.clone(memory_format=torch.preserve_format)
        first.step()
        second.step()
    for twin in twins:
        torch.testing.assert_close(twin.detach().contiguous(), alone.detach(), rtol=1e-4, atol=1e-6)


def test_a_zero_gradient_moves_nothing_in_muon():
    weight = nn.Parameter(torch.ones(3, 4))
    weight.grad = torch.zeros(3, 4)
    Muon([weight], weight_decay=0.0).step()
    assert torch.all(weight == 1)
    assert torch.all(orthogonalize(torch.zeros(1, 3, 4)) == 0)


def test_match_rms_has_the_length_of_an_adam_step():
    weight = nn.Parameter(torch.zeros(64, 256))
    (weight.grad,) = gradients((64, 256), 1)
    Muon([weight], lr=1.0, weight_decay=0.0, scale="match_rms").step()
    assert float(weight.detach().square().mean().sqrt()) == pytest.approx(0.2, rel=0.2)


# --- Newton-CG


def quadratic(size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return factor @ factor.T + torch.eye(size), torch.randn(size, generator=generator, dtype=torch.float64)


def test_newton_cg_solves_a_quadratic_in_one_step():
    hessian, slope = quadratic()
    parts = [
        nn.Parameter(torch.zeros(3, dtype=torch.float64)),
        nn.Parameter(torch.zeros(5, dtype=torch.float64)),
    ]
    optimizer = NewtonCG(parts, max_iter=40, tolerance=1e-9, radius=1e3, max_radius=1e3)

    def closure():
        x = torch.cat(list(parts))
        return x @ hessian @ x / 2 - slope @ x

    assert float(optimizer.step(closure)) == 0
    torch.testing.assert_close(torch.cat(parts).detach(), torch.linalg.solve(hessian, slope))
    torch.testing.assert_close(torch.cat([part.grad for part in parts]), -slope)


def test_newton_cg_with_damping_solves_the_damped_system():
    hessian, slope = quadratic()
    x = nn.Parameter(torch.zeros(8, dtype=torch.float64))
    optimizer = NewtonCG([x], max_iter=40, tolerance=1e-9, radius=1e3, max_radius=1e3, damping=2.0)
    optimizer.step(lambda: x @ hessian @ x / 2 - slope @ x)
    torch.testing.assert_close(x.detach(), torch.linalg.solve(hessian + 2 * torch.eye(8), slope))


@pytest.mark.parametrize("radius", [0.01, 0.1])
def test_newton_cg_stays_inside_its_radius(radius):
    hessian, slope = quadratic()
    x = nn.Parameter(torch.zeros(8, dtype=torch.float64))
    NewtonCG([x], max_iter=40, radius=radius).step(lambda: x @ hessian @ x / 2 - slope @ x)
    assert float(x.detach().norm()) == pytest.approx(radius, rel=1e-6)


def test_newton_cg_leaves_a_saddle_along_negative_curvature():
    x = nn.Parameter(torch.tensor([0.5, 1e-3], dtype=torch.float64))
    optimizer = NewtonCG([x])
    for _ in range(15):
        optimizer.step(lambda: x[0] ** 2 - x[1] ** 2 + x[1] ** 4 / 4)
    torch.testing.assert_close(x.detach().abs(), torch.tensor([0, 2**0.5], dtype=torch.float64), atol=1e-6, rtol=0)


def test_newton_cg_undoes_a_step_that_does_not_lower_the_loss_and_shrinks_the_radius():
    x = nn.Parameter(torch.tensor([3.0]))
    optimizer = NewtonCG([x], radius=5.0)
    # Almost no curvature where it stands and a wall two units on: the quadratic model is wrong.
    optimizer.step(lambda: (0.01 * (x - 1000) ** 2 + torch.relu(x - 3.5) * 1e4).sum())
    assert float(x.detach()) == 3.0
    assert float(optimizer.state[x]["radius"]) == 1.25


def test_newton_cg_takes_groups_with_rates_of_their_own():
    a, b = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([1.0]))
    optimizer = NewtonCG([{"params": [a]}, {"params": [b], "lr": 0.5}], tolerance=1e-6, radius=9.0)
    optimizer.step(lambda: (a**2 + b**2).sum())
    torch.testing.assert_close(torch.cat([a, b]).detach(), torch.tensor([0.0, 0.5]))


def test_newton_cg_refuses_a_radius_beyond_its_bound():
    with pytest.raises(ValueError, match="radius <= max_radius"):
        NewtonCG([nn.Parameter(torch.ones(1))], radius=2.0, max_radius=1.0)


def test_newton_cg_takes_a_loss_that_is_linear_in_a_parameter():
    curved, linear = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([1.0]))
    optimizer = NewtonCG([curved, linear], radius=5.0, tolerance=1e-6)
    optimizer.step(lambda: (curved.square() + linear).sum())
    assert (curved.square() + linear).item() < 5
    straight = nn.Parameter(torch.tensor([1.0]))
    NewtonCG([straight], radius=0.5).step(lambda: straight.sum())  # no curvature at all: to the boundary
    assert straight.item() == pytest.approx(0.5)


def test_newton_cg_leaves_unused_parameters_where_they_are():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    NewtonCG([used, unused], radius=5.0).step(lambda: used.square().sum())
    assert torch.all(unused == 1)
    torch.testing.assert_close(used.detach(), torch.zeros(2))


# --- traits


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (torch.optim.SGD, Traits(closure=False, create_graph=False, single_group=False, weight_decay=True)),
        (torch.optim.LBFGS, Traits(closure=True, create_graph=False, single_group=True, weight_decay=False)),
        (NewtonCG, Traits(closure=True, create_graph=True, single_group=False, weight_decay=False)),
        (Muon, Traits(closure=False, create_graph=False, single_group=False, weight_decay=True)),
    ],
)
def test_traits_are_read_from_the_class(optimizer, expected):
    assert Traits.of(optimizer) == expected
    assert Traits.of(copy.copy(optimizer)) == expected
