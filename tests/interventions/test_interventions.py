"""Interventions: each against its definition, and all of them in runs that go on, resume and are refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from lab_runs import all_state, composed, differences, fitted, make_run, resume_run
from torch import nn

from cnnlab import rng
from cnnlab.building.trial import check
from cnnlab.errors import ConfigError
from cnnlab.interventions import Freeze, GradientCentralization, GradientNoise
from cnnlab.interventions.projections import max_norm_
from cnnlab.protocols import Batch, Intervention
from cnnlab.train import fit
from cnnlab.train.interventions import Interventions


@pytest.mark.parametrize("limit", [0.1, 0.3, 1.0])
def test_max_norm_projects_each_unit_and_keeps_the_others_bits(limit):
    weight = nn.Parameter(torch.randn(64, 3, 3, 3, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        weight[::2] *= 0.001
    before = weight.detach().clone()
    bias = nn.Parameter(torch.full((4,), 100.0))
    max_norm_([weight, bias], limit)
    norms, old = weight.detach().flatten(1).norm(dim=1), before.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms[1::2], torch.full((32,), limit))
    assert torch.equal(weight[old <= limit], before[old <= limit])
    direction = torch.nn.functional.cosine_similarity(weight.flatten(1), before.flatten(1))
    torch.testing.assert_close(direction, torch.ones(64))
    assert torch.all(bias == 100)


def test_max_norm_refuses_a_limit_that_is_not_positive():
    with pytest.raises(ValueError, match="expected a limit > 0"):
        max_norm_([torch.ones(2, 2)], 0.0)


# ---- gradients ----


def parameters_with_gradients() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 3, 3, 3), (5, 7), (4,))
    found = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for p in found:
        p.grad = torch.randn(p.shape, generator=generator)
    return found


def test_gradient_noise_is_of_the_papers_variance_and_the_same_when_drawn_again():
    p = nn.Parameter(torch.zeros(200, 200))
    noise = GradientNoise(eta=0.3, gamma=0.55)
    noise.attach(nn.Linear(1, 1), seed=3)
    drawn = []
    for step in (0, 9, 9):
        p.grad = torch.zeros_like(p)
        noise.gradients([p], step)
        drawn.append(p.grad.clone())
    assert drawn[0].var().item() == pytest.approx(0.3, rel=0.02)
    assert drawn[1].var().item() == pytest.approx(0.3 / 10**0.55, rel=0.02)
    assert torch.equal(drawn[1], drawn[2])
    assert abs(drawn[0].mean().item()) < 0.01


def test_centralized_gradients_have_no_mean_by_unit():
    convolution, linear, bias = parameters_with_gradients()
    before = convolution.grad.clone(), bias.grad.clone()
    GradientCentralization().gradients([convolution, linear, bias], 0)
    for p in (convolution, linear):
        torch.testing.assert_close(p.grad.flatten(1).mean(1), torch.zeros(len(p)), atol=1e-6, rtol=0)
    expected = before[0] - before[0].flatten(1).mean(1).view(-1, 1, 1, 1)
    torch.testing.assert_close(convolution.grad, expected)
    assert torch.equal(bias.grad, before[1])


def test_they_act_before_the_clipping_and_after_what_is_recorded(tmp_path: Path):
    overrides = ("intervention=gradient_noise", "intervention.gradient_noise.eta=1000", "trainer.max_steps=1")
    run = make_run(*overrides, "trainer.clip_norm=0.5", "stats.every=1")
    seen = []
    run.observer.receive = seen.append
    fit(run)
    total = torch.cat([p.grad.flatten() for p in run.step.parameters]).norm().item()
    assert total == pytest.approx(0.5, rel=1e-4), "clipped last"
    assert seen[0]["gradient/global_norm"] < 100, "statistics are of the loss's own gradients"


# ---- runs ----


@pytest.mark.parametrize(
    "overrides",
    [("intervention=gradient_noise",), ("intervention=[gradient_noise,gradient_centralization]", "optim=adam")],
)
def test_a_run_with_interventions_resumes_bit_for_bit(tmp_path: Path, overrides: Sequence[str]):
    overrides = (*overrides, "schedule=constant")
    whole = fitted(*overrides, folder=tmp_path / "whole")
    fitted(*overrides, "trainer.max_steps=5", folder=tmp_path / "parts")
    resumed = resume_run(tmp_path / "parts", max_steps=None)
    fit(resumed)
    # What the listeners keep counts the files' bytes, which a shorter run's test record changes.
    for name in ("model", "optimizer", "clock", "selection"):
        assert not differences(all_state(whole)[name], all_state(resumed)[name]), name


def test_none_is_bit_for_bit_the_run_without():
    with_none, without = fitted("intervention=none"), fitted()
    assert not differences(with_none.model.state_dict(), without.model.state_dict())
    noisy = fitted("intervention=gradient_noise")
    assert differences(noisy.model.state_dict(), without.model.state_dict())


@pytest.mark.parametrize("optimizer", ["lbfgs", "newton_cg"])
def test_changed_gradients_are_refused_where_the_optimizer_searches(optimizer: str):
    with pytest.raises(ConfigError, match="takes no changed gradients; type another optim"):
        check(composed(f"optim={optimizer}", "model=cnn", "intervention=gradient_noise"))


def test_each_phase_is_called_in_its_place():
    calls: list[str] = []

    class Told(Intervention):
        def batch(self, batch: Batch, step: int) -> Batch:
            calls.append(f"batch {step}")
            return {**batch, "image": torch.zeros_like(batch["image"])}

        def gradients(self, parameters: Sequence[nn.Parameter], step: int) -> None:
            assert all(p.grad is not None for p in parameters)
            calls.append(f"gradients {step}")

        def weights(self, step: int) -> None:
            calls.append(f"weights {step}")

        def mode(self, model: nn.Module, epoch: int) -> None:
            assert model.training
            calls.append(f"mode {epoch}")

    run = make_run("trainer.epochs=1", "trainer.max_steps=2", "optim.lr=0")
    run.interventions = run.step.interventions = Interventions({"told": Told()})
    seen = []
    run.model.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[0].abs().max().item()))
    fit(run)
    assert calls[:7] == ["mode 0", "batch 0", "gradients 0", "weights 0", "batch 1", "gradients 1", "weights 1"]
    assert seen[:2] == [0.0, 0.0], "the network gets the batch that the intervention made"


# ---- frozen ----


def buffers(model: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    return {n: b.clone() for n, b in model.named_buffers() if n.startswith(prefix)}


def test_frozen_norm_layers_keep_their_buffers_too():
    run = make_run("groups.freeze=[bn1,layer1]", "trainer.epochs=2")
    before = {**run.model.state_dict()}
    before = {name: value.clone() for name, value in before.items()}
    fit(run)
    after = run.model.state_dict()
    frozen = [name for name in before if name.startswith(("bn1.", "layer1."))]
    assert any("running_mean" in name for name in frozen)
    for name in frozen:
        assert torch.equal(before[name], after[name]), name
    moved = [name for name in before if name.startswith("layer2.") and "running_mean" in name]
    assert moved and all(not torch.equal(before[name], after[name]) for name in moved)


def test_frozen_norm_layers_use_what_they_remember_in_training():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, affine=False))
    for p in model[1].parameters():
        p.requires_grad_(False)
    interventions = Interventions({"freeze": Freeze(["1"])})
    interventions.train(model, 0)
    assert [model[i].training for i in range(4)] == [True, False, True, True]
    Interventions({"freeze": Freeze(["1", "3"])}).train(model, 0)
    assert not model[3].training, "no parameters, but named"


def test_a_norm_layer_of_which_a_part_trains_is_not_frozen():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    model[1].bias.requires_grad_(False)
    Interventions({"freeze": Freeze(["1.bias"])}).train(model, 0)
    assert model[1].training


def test_streams_of_interventions_are_their_own():
    assert rng.derive(0, "gradient_noise", 3) != rng.derive(0, "dropout", 3)
