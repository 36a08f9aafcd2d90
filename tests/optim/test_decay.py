"""Decoupled weight decay: AdamW out of Adam, and Loshchilov & Hutter's step for the others."""

from __future__ import annotations

import copy

import pytest
import torch
from lab_runs import composed, fitted, make_run
from torch import nn

from cnnlab.building.assemble import make_optimizer
from cnnlab.building.trial import check
from cnnlab.errors import ConfigError
from cnnlab.optim.decay import decouple_decay


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)).double()


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 20) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        x = torch.randn(8, 1, 4, 4, generator=generator, dtype=torch.float64)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + step)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def test_adam_with_decoupled_decay_is_torchs_adamw():
    """All parameters decay here, as torch's do; in double precision, to the last digits."""
    ours = make_optimizer(
        composed("optim=adam", "regularization.decoupled_decay=0.3", "groups.decay_norm_and_bias=true"),
        first := network(),
    )
    second = network()
    theirs = torch.optim.AdamW(second.parameters(), lr=0.001, weight_decay=0.3)
    for a, b in zip(trained(first, ours), trained(second, theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_run_of_adam_with_it_is_the_run_of_adamw():
    """The laboratory's own groups: norms and biases are spared by both."""
    common = ("trainer.max_steps=6", "stats=off", "optim.lr=0.01")
    decayed = fitted("optim=adam", "regularization.decoupled_decay=0.2", *common)
    adamw = fitted("optim=adamw", "optim.weight_decay=0.2", *common)
    for a, b in zip(decayed.model.parameters(), adamw.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["sgd", "nesterov", "rmsprop", "adagrad", "radam"])
def test_a_step_is_the_gradients_step_and_the_decay_of_the_old_weights(name: str):
    """w' = w - lr·λ·w + (step of the optimizer without it), on weights; norms and biases get the step alone."""
    plain, decayed = network(), network()
    overrides = [f"optim={name}"] + (["optim.weight_decay=0"] if name == "nesterov" else [])
    first = make_optimizer(composed(*overrides), plain)
    second = make_optimizer(composed(*overrides, "regularization.decoupled_decay=0.5"), decayed)
    before = copy.deepcopy(plain.state_dict())
    for model, optimizer in ((plain, first), (decayed, second)):
        model(torch.ones(4, 1, 4, 4, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    lr = first.param_groups[0]["lr"]
    for (key, a), b in zip(plain.named_parameters(), decayed.parameters(), strict=True):
        expected = a - (lr * 0.5 * before[key] if a.ndim >= 2 else 0)
        torch.testing.assert_close(b.detach(), expected.detach(), rtol=1e-10, atol=1e-12)


def test_the_groups_say_what_decays_at_which_rate():
    run = make_run("optim=sgd", "regularization.decoupled_decay=0.1", "groups.head_lr=2")
    listed = {group["name"]: group["decoupled_decay"] for group in run.optimizer.param_groups}
    assert listed == {"backbone": 0.1, "backbone, no decay": 0.0, "head": 0.1, "head, no decay": 0.0}
    overrides = ("optim=sgd", "regularization.decoupled_decay=0.1", "groups.decay_norm_and_bias=true")
    everything = make_optimizer(composed(*overrides), run.model)
    assert [group["decoupled_decay"] for group in everything.param_groups] == [0.1]


def test_frozen_weights_do_not_decay():
    run = make_run("optim=sgd", "regularization.decoupled_decay=0.5", "groups.freeze=[conv1]", "optim.lr=0.1")
    frozen, free = run.model.conv1.weight.detach().clone(), run.model.fc.weight.detach().clone()
    for p in run.model.parameters():
        p.grad = torch.zeros_like(p)
    run.optimizer.step()
    assert torch.equal(run.model.conv1.weight, frozen)
    torch.testing.assert_close(run.model.fc.weight.detach(), free * (1 - 0.1 * 0.5))


@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_an_update_that_loss_scaling_skips_decays_nothing(fused: bool, overflow: bool):
    """A fused optimizer is called all the same, and told by `found_inf`."""
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.SGD([{"params": [weight], "decoupled_decay": 0.5}], lr=0.1, fused=fused)
    decouple_decay(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale((weight * (float("inf") if overflow else 0.0)).sum()).backward()
    scaler.step(optimizer)
    assert weight[0, 0].item() == pytest.approx(1.0 if overflow else 0.95)


def test_an_interrupted_run_goes_on_with_its_decay():
    whole = make_run("optim=sgd", "regularization.decoupled_decay=0.1")
    again = make_run("optim=sgd", "regularization.decoupled_decay=0.1")
    again.optimizer.load_state_dict(whole.optimizer.state_dict())
    before = again.model.fc.weight.detach().clone()
    for p in again.model.parameters():
        p.grad = torch.zeros_like(p)
    again.optimizer.step()
    assert torch.all(again.model.fc.weight.abs() <= before.abs()) and not torch.equal(again.model.fc.weight, before)


REFUSED = {
    ("optim=adamw",): "decays by itself .optim.weight_decay=0.01.; type optim.weight_decay=0",
    ("optim=momentum",): "decays by itself",
    ("optim=lbfgs",): "type groups.decay_norm_and_bias=true",
}


@pytest.mark.parametrize("overrides", REFUSED, ids=" ".join)
def test_an_optimizer_does_not_decay_twice(overrides: tuple[str, ...]):
    with pytest.raises(ConfigError, match=REFUSED[overrides]):
        check(composed(*overrides, "regularization=decoupled_decay"))


@pytest.mark.parametrize("name", ["lbfgs", "newton_cg"])
def test_optimizers_that_evaluate_the_loss_themselves_decay_too(name: str):
    overrides = (
        f"optim={name}",
        "optim.max_iter=1",
        "groups.decay_norm_and_bias=true",
        "trainer.max_steps=1",
        "stats=off",
    )
    plain, decayed = fitted(*overrides), fitted(*overrides, "regularization.decoupled_decay=0.9")
    assert any(not torch.equal(a, b) for a, b in zip(plain.model.parameters(), decayed.model.parameters(), strict=True))
