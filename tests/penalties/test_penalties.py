"""Penalties against their sums written out, and as parts of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lab_runs import SMALL, differences, make_run, watched
from torch import nn

from cnnlab import penalties
from cnnlab.building.trial import checked
from cnnlab.composing.composer import composer
from cnnlab.errors import ConfigError
from cnnlab.penalties import norms
from cnnlab.runs.folder import RunDir, config_hash
from cnnlab.sinks.jsonl import read_records
from cnnlab.verbs.eval import evaluate_run


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))


def test_penalties_sum_over_weights_only(model):
    weights = torch.cat([model[0].weight.flatten(), model[3].weight.flatten()])
    torch.testing.assert_close(norms.l1(model.parameters()), weights.abs().sum())
    torch.testing.assert_close(norms.l2(model.parameters()), 0.5 * weights.square().sum())


def test_gradient_of_the_penalties(model):
    (3 * norms.l2(model.parameters()) + 5 * norms.l1(model.parameters())).backward()
    weight = model[0].weight
    torch.testing.assert_close(weight.grad, 3 * weight.detach() + 5 * weight.detach().sign())
    assert model[0].bias.grad is None
    assert model[1].weight.grad is None


def test_frozen_weights_are_not_penalized(model):
    model[3].weight.requires_grad_(False)
    torch.testing.assert_close(norms.l1(model.parameters()), model[0].weight.abs().sum())


def test_without_weights_the_penalties_are_zero():
    assert norms.l1([]) == 0
    assert norms.l2([nn.Parameter(torch.ones(3))]) == 0


def test_l2_has_a_second_derivative_at_zero():
    weight = torch.zeros(2, 2, requires_grad=True)
    (slope,) = torch.autograd.grad(norms.l2([weight]), weight, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), weight)
    torch.testing.assert_close(curvature, torch.ones(2, 2))


def named(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def test_the_parts_are_the_sums_times_their_strength(model):
    weights = list(model.parameters())
    assert penalties.L1(0.3)(named(model)) == 0.3 * norms.l1(weights)
    assert penalties.L2(0.3)(named(model)) == 0.3 * norms.l2(weights)


def test_group_lasso_is_the_norms_of_the_units(model):
    expected = sum(18**0.5 * unit.norm() for unit in model[0].weight) + sum(2 * unit.norm() for unit in model[3].weight)
    torch.testing.assert_close(penalties.GroupLasso(0.1)(named(model)), 0.1 * expected)


def test_group_lasso_has_slope_and_curvature_at_zero():
    weight = torch.zeros(2, 3, requires_grad=True)
    (slope,) = torch.autograd.grad(penalties.GroupLasso(1.0)({"w": weight}), weight, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), weight)
    assert not slope.any()
    assert curvature.isfinite().all()


def test_orthogonality_is_zero_for_orthonormal_units_wide_or_tall():
    tall = torch.linalg.qr(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))[0]
    part = penalties.Orthogonality(2.0)
    for weight in (tall, tall.T, tall.T.reshape(4, 6, 1, 1)):
        assert 0 <= part({"w": nn.Parameter(weight)}).item() < 1e-10
    assert part({"w": nn.Parameter(2 * torch.eye(3))}).item() == 2 * 3 * 9
    assert part({"bias": nn.Parameter(torch.ones(3))}) == 0


# ---- in a run ----


def test_several_are_recorded_apart_and_sum_up(tmp_path: Path):
    overrides = ("regularization=[l1,l2]", "penalty=[group_lasso,orthogonality]", "trainer.log_every=1")
    run, said = watched(*overrides, "trainer.epochs=1", "trainer.checkpoint=false", folder=tmp_path)
    names = [f"penalty/{name}" for name in ("l1", "l2", "group_lasso", "orthogonality")]
    assert {r["split"] for r in said.records} == {"train", "val", "test"}
    for record in said.records:
        assert [key for key in record if key.startswith("penalty")] == ["penalty", *names]
        assert all(record[name] > 0 for name in names)
        assert record["penalty"] == pytest.approx(sum(record[name] for name in names), rel=1e-6)
        assert record["loss"] == pytest.approx(record["data_loss"] + record["penalty"])
    by_part = [penalty(named(run.model)).item() for penalty in run.step.penalties.named.values()]
    assert [said.records[-1][name] for name in names] == pytest.approx(by_part, rel=1e-6)
    assert RunDir(tmp_path).read()["metrics"]["test/penalty/l1"] == said.records[-1]["penalty/l1"]


@pytest.mark.parametrize("overrides", [("penalty=orthogonality",), ("regularization=l2",)])
def test_one_alone_is_the_penalty(overrides: tuple[str, ...]):
    run, said = watched(*overrides, "trainer.epochs=1", "trainer.max_steps=1")
    for record in said.records:
        assert [key for key in record if key.startswith("penalty")] == ["penalty"]
        assert record["penalty"] > 0


@pytest.mark.parametrize("how", [("optim=newton_cg",), ("optim=lbfgs",), ("trainer.accumulate=2", "norm=group")])
def test_every_step_minimizes_it(how: tuple[str, ...]):
    """A strong penalty shrinks what it is about, whichever way the step runs."""
    lasso = ("penalty=group_lasso", "penalty.group_lasso.strength=0.3", "trainer.max_steps=4", "schedule=constant")
    run, said = watched(*how, *lasso, "trainer.log_every=1", "stats=off")
    told = [r["penalty"] for r in said.records if r["split"] == "train"]
    assert told[-1] < told[0]


def test_a_users_own_is_a_file_and_a_yaml(tmp_path: Path, outside_composer):
    run = checked(outside_composer, [*SMALL, "penalty=outside", "penalty.sparsity.strength=0.5"])
    assert run.config["penalty"] == {"sparsity": {"_target_": "outside_penalty.Sparsity", "strength": 0.5}}
    with pytest.raises(ConfigError, match=r"expected a number >= 0, received -1"):
        checked(outside_composer, [*SMALL, "penalty=outside", "penalty.sparsity.strength=-1"])
    with pytest.raises(ConfigError, match=r"did you mean `strength`"):
        checked(outside_composer, [*SMALL, "penalty=outside", "penalty.sparsity.strenght=1"])


BAD = """
from collections.abc import Mapping
import torch
from torch import Tensor

class Vector:
    def __call__(self, weights: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([w.square().sum() for w in weights.values()])

class Number:
    def __call__(self, weights):
        return 1.0

class Lost:
    def __call__(self, weights):
        return weights["nowhere"].sum()

class Positional:
    def __call__(self, logits, target):
        return logits.sum()

class Reads:
    def __call__(self, weights):
        return sum(w.square().sum() for w in weights.values()) * (0.0 if next(iter(weights.values())).isnan().any().item() else 1.0)

class NoCall:
    pass
"""  # noqa: E501


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Vector", r"`penalty\.l2`: expected it to give a scalar tensor, received \(\d+,\)"),
        ("Number", "`penalty.l2`: expected it to give a scalar tensor, received a float"),
        ("Lost", "`penalty.l2`: 'nowhere'"),
        ("Positional", "`penalty.l2`: .*missing 1 required positional argument: 'target'"),
        ("NoCall", "has no `__call__`; see cnnlab.protocols.Penalty"),
    ],
)
def test_what_is_no_penalty_is_refused_before_the_run(user_folder: Callable[..., Path], name: str, words: str):
    module = f"bad_{name.lower()}"
    folder = user_folder({f"{module}.py": BAD, "penalty/bad.yaml": f"l2: {{_target_: {module}.{name}}}"})
    with composer([folder]) as open_composer, pytest.raises(ConfigError, match=words):
        checked(open_composer, [*SMALL, "penalty=bad"])


def test_one_that_reads_values_is_left_to_the_first_batch(user_folder: Callable[..., Path]):
    folder = user_folder({"reading.py": BAD, "penalty/bad.yaml": "own: {_target_: reading.Reads}"})
    with composer([folder]) as open_composer:
        assert checked(open_composer, [*SMALL, "penalty=bad"])


def test_two_of_one_name_are_refused(user_folder: Callable[..., Path]):
    folder = user_folder({"penalty/mine.yaml": "l2: {_target_: cnnlab.penalties.L1, strength: 0.1}"})
    with composer([folder]) as open_composer:
        assert checked(open_composer, [*SMALL, "penalty=mine"])
        with pytest.raises(ConfigError, match=r"`penalty\.l2`: regularization\.l2 has this name"):
            checked(open_composer, [*SMALL, "penalty=mine", "regularization=l2"])


def test_a_run_older_than_the_group_is_what_it_was(tmp_path: Path):
    run, said = watched("regularization=l2", "trainer.epochs=1", folder=tmp_path)
    config = {key: value for key, value in run.config.items() if key != "penalty"}
    assert config_hash(config) == config_hash(run.config)
    assert config_hash({**config, "penalty": {"own": {"_target_": "x.Y"}}}) != config_hash(config)
    RunDir(tmp_path).write_config(config, ())
    assert evaluate_run(RunDir(tmp_path), "test") == pytest.approx(run.metrics)
    assert list(read_records(tmp_path / "metrics.jsonl")) == said.records


def test_the_knobs_are_parts_of_their_own_name():
    run = make_run("regularization=[l1,l2]", "regularization.l1=0.5", "penalty=orthogonality")
    assert list(run.step.penalties.named) == ["l1", "l2", "orthogonality"]
    assert (run.step.penalties.named["l1"].strength, run.step.penalties.named["l2"].strength) == (0.5, 5e-4)
    assert differences(run.step.weights, named(run.model)) == []
