"""The objective against closed forms, torch.func, differences and the step itself; it leaves nothing behind."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from lab_runs import bits, make_run
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp
from torch.nn import functional

from cnnlab import measure, rng
from cnnlab.losses import CrossEntropy
from cnnlab.machine.ranks import Ranks
from cnnlab.observe.observer import Look
from cnnlab.protocols import Batch, DataSpec, Outputs
from cnnlab.tasks import Task
from cnnlab.train.forward import Forward, Penalties
from cnnlab.train.objective import Mode, Objective

CPU = torch.device("cpu")
CLASSES = 3


class Plain(Task):
    """The criterion of the logits."""

    def losses(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"main": self.criterion(outputs["logits"], batch["label"])}


class Two(Plain):
    """Beside it, with a weight, the squared size of the logits."""

    def losses(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {**super().losses(outputs, batch), "size": outputs["logits"].square().sum(1)}


def squared(logits: Tensor, target: Tensor) -> Tensor:
    return (logits - target).square().sum(1) / 2


def objective_of(model: nn.Module, batch: Batch, loss=None, task=Plain, weights=None, **stated) -> Objective:
    spec = DataSpec(1, (4, 4), tuple("abc"))
    made = task(loss or CrossEntropy(CLASSES), spec, weights)
    return Objective(Forward(model, made, CPU, torch.float32), batch, **stated)


def batch_of(count: int, *shape: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(CLASSES, (count,), generator=generator)
    return {"image": torch.randn(count, *shape, generator=generator), "label": label, "index": torch.arange(count)}


def network(*, norm: bool = True, dropout: float = 0.3) -> nn.Module:
    """Smooth, so that differences converge."""
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.Tanh(), nn.Flatten()]
    with rng.seeded(0, "test"):
        return nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(16, CLASSES))


def direction_of(objective: Objective, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in objective.parameters]


def close(first, second, tolerance: float = 1e-10) -> bool:
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(first, second, strict=True))


def decay(strength: float) -> Penalties:
    """λ/2·Σw² of all parameters."""
    return Penalties(
        {"decay": lambda weights: strength / 2 * torch.stack([w.square().sum() for w in weights.values()]).sum()}
    )


# ---- what it is ----


def test_linear_regression_has_its_closed_form():
    """f = mean ½‖Wx - y‖² + λ/2·‖W‖²: ∇f = (WXᵀ - Yᵀ)X/n + λW, and H·V = V·XᵀX/n + λV."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, CLASSES, bias=False))
    batch = batch_of(20, 6)
    batch["label"] = torch.randn(20, CLASSES, generator=torch.Generator().manual_seed(3))
    f = objective_of(model, batch, squared, penalties=decay(0.1), dtype=torch.float64)
    x, y, w = batch["image"].double(), batch["label"].double(), model[1].weight.detach().double()
    (v,) = direction_of(f)
    assert f.value().item() == pytest.approx(
        ((x @ w.T - y).square().sum() / 40 + 0.05 * w.square().sum()).item(), rel=1e-14
    )
    assert close(f.gradient(), [(w @ x.T - y.T) @ x / 20 + 0.1 * w], 1e-13)
    assert close(f.hessian_vector([v]), [v @ (x.T @ x) / 20 + 0.1 * v], 1e-13)


def test_softmax_regression_has_its_closed_form():
    """∇f = (P - Y)ᵀX/n; H·V = Σ (diag p - ppᵀ)·V·x·xᵀ/n."""
    model = nn.Linear(6, CLASSES, bias=False)
    batch = batch_of(20, 6)
    f = objective_of(model, batch, dtype=torch.float64)
    x, w = batch["image"].double(), model.weight.detach().double()
    p, y = (x @ w.T).softmax(1), functional.one_hot(batch["label"], CLASSES).double()
    (v,) = direction_of(f)
    s = x @ v.T
    assert close(f.gradient(), [(p - y).T @ x / 20], 1e-13)
    assert close(f.hessian_vector([v]), [(p * s - p * (p * s).sum(1, keepdim=True)).T @ x / 20], 1e-13)


def test_gradients_and_products_are_those_of_torch_func():
    model = network(norm=False, dropout=0.0).double()
    batch = batch_of(8, 1, 4, 4)
    batch["image"] = batch["image"].double()
    f = objective_of(model, batch, task=Two, weights={"size": 0.2}, accumulate=3, penalties=decay(0.01))
    theta = {name: p.detach() for name, p in model.named_parameters()}

    def plain(theta):
        logits = functional_call(model, theta, (batch["image"],))
        data = functional.cross_entropy(logits, batch["label"]) + 0.2 * logits.square().sum(1).mean()
        return data + 0.005 * sum(p.square().sum() for p in theta.values())

    first, second = direction_of(f, 1), direction_of(f, 2)
    _, times = vjp(grad(plain), theta)  # the Hessian is symmetric
    products = [list(times(dict(zip(theta, v, strict=True)))[0].values()) for v in (first, second)]
    assert f.value().item() == pytest.approx(plain(theta).item(), rel=1e-14)
    assert close(f.gradient(), grad(plain)(theta).values(), 1e-12)
    assert close(f.hessian_vector(first), products[0], 1e-12)
    assert all(close(a, b, 1e-12) for a, b in zip(f.products([first, second]), products, strict=True))
    hessian = f.hessian()
    assert close(hessian.gradient, f.gradient(), 1e-14)
    assert all(close(hessian(v), product, 1e-12) for v, product in zip((first, second), products, strict=True))


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("accumulate", [1, 2])
def test_differences_of_the_value_converge_to_the_gradient_and_those_of_the_gradient_to_the_product(
    mode: Mode, accumulate: int
):
    """With dropout and batch norm in whichever mode: the second order's error falls with h², by 100 for a tenth."""
    f = objective_of(network(), batch_of(9, 1, 4, 4), mode=mode, dtype=torch.float64, accumulate=accumulate, number=4)
    v = measure.normalized(direction_of(f))
    slope, product = measure.dot(f.gradient(), v), f.hessian_vector(v)
    errors = []
    for h in (1e-2, 1e-3):
        ahead, behind = f.moved(v, h), f.moved(v, -h)
        slopes = (ahead.value() - behind.value()) / (2 * h)
        change = [(a - b) / (2 * h) for a, b in zip(ahead.gradient(), behind.gradient(), strict=True)]
        errors.append(((slopes - slope).abs().item(), measure.total_norm(measure.moved(change, product, -1)).item()))
    assert errors[1][0] < 1e-5 and errors[1][1] < 1e-4
    assert errors[0][0] / errors[1][0] == pytest.approx(100, rel=0.3)
    assert errors[0][1] / errors[1][1] == pytest.approx(100, rel=0.3)


@pytest.mark.parametrize(
    "overrides",
    [
        ("model=cnn", "regularization.dropout=0.5", "trainer.accumulate=2", "regularization=[l1,l2]"),
        ("model=inception", "model.aux=true", "data=shapes", "loss=focal"),
        ("model.checkpoint=true", "augment=mixup"),
        ("groups.freeze=[layer1]",),
        ("trainer.precision=bf16",),
    ],
)
def test_it_is_what_the_step_minimizes(overrides: tuple[str, ...]):
    """Bit for bit the gradients that the run's own backward pass leaves, with the same dropout and batch moments."""
    run = make_run("stats=off", *overrides)
    run.train_mode()
    batch, count = next(run.batches())
    f = run.objective(batch, count)
    value, gradient = f.value_and_gradient()
    again = run.objective(batch, count, mode="train").gradient()
    run.step.zero_grad()
    result = run.step.backward(batch, count, run.clock.step, Look())
    assert len(gradient) == len(run.step.parameters)
    for ours, parameter in zip(gradient, run.step.parameters, strict=True):
        assert torch.equal(ours, torch.zeros_like(ours) if parameter.grad is None else parameter.grad)
    assert close(again, gradient, 0)
    summed = result.sums["data_loss"] + result.sums.get("penalty", 0)
    assert value.item() == pytest.approx((summed / count).item(), rel=1e-6)
    assert f.value().item() == pytest.approx(value.item(), rel=1e-6)


def test_recomputed_blocks_are_those_of_the_weights_that_are_asked_about():
    """Activation checkpointing runs blocks again in the backward pass, when other weights could be back in place."""
    pair = []
    for recompute in ("true", "false"):
        run = make_run(f"model.checkpoint={recompute}", "stats=off")
        batch, count = next(run.batches())
        f = run.objective(batch, count, dtype=torch.float64)
        v = measure.normalized(direction_of(f))
        pair.append((f.moved(v, 0.5).gradient(), f.moved(v, 0.5).hessian()(v), f.gradient()))
    for ours, plain in zip(*pair, strict=True):
        assert close(ours, plain, 1e-9)
    assert not close(pair[0][0], pair[0][2], 1e-3)


# ---- how the network stands ----


def test_the_modes_differ_in_dropout_and_moments():
    model, batch = network(), batch_of(9, 1, 4, 4)
    model.train()(batch["image"])  # moments that are not the initial ones
    values = {mode: objective_of(model, batch, mode=mode).value().item() for mode in Mode}
    with torch.no_grad():
        expected = functional.cross_entropy(model.eval()(batch["image"]), batch["label"]).item()
        model[4].train()
        torch.manual_seed(rng.derive(0, "dropout", 0, 0, 0))
        frozen = functional.cross_entropy(model(batch["image"]), batch["label"]).item()
        model.train()
        torch.manual_seed(rng.derive(0, "dropout", 0, 0, 0))
        train = functional.cross_entropy(model(batch["image"]), batch["label"]).item()
    assert values == pytest.approx({Mode.train: train, Mode.frozen: frozen, Mode.eval: expected}, rel=1e-6)
    assert len({round(v, 4) for v in values.values()}) == 3


def test_what_is_frozen_in_the_run_is_frozen_in_its_objective():
    run = make_run("groups.freeze=[layer1]")
    batch, count = next(run.batches())
    names = run.objective(batch, count).names
    assert names and not any(name.startswith("layer1") for name in names)
    norms = [m for n, m in run.model.named_modules() if n.startswith("layer1") and isinstance(m, nn.BatchNorm2d)]
    before = run.objective(batch, count).value().item()
    for norm in norms:
        norm.running_mean.add_(1.0)
    assert run.objective(batch, count).value().item() != before, "their running moments are what they use"


def test_the_dropout_is_that_of_the_stated_update():
    model, batch = network(norm=False, dropout=0.5), batch_of(9, 1, 4, 4)
    first, again, other = (objective_of(model, batch, number=n).value().item() for n in (3, 3, 4))
    assert first == again != other


@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("mode", [None, *Mode])
def test_nothing_is_left_behind(mode: Mode | None, dtype: torch.dtype | None):
    model, batch = network(), batch_of(9, 1, 4, 4)
    model[1].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    kept = copy.deepcopy(model)
    addresses = [t.data_ptr() for t in (*model.parameters(), *model.buffers())]
    generator, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    f = objective_of(model, batch, mode=mode, dtype=dtype, accumulate=2)
    v = direction_of(f)
    f.value(), f.value_and_gradient(), f.products([v, v]), f.hessian()(v), f.moved(v, 0.3).gradient()
    assert [t.data_ptr() for t in (*model.parameters(), *model.buffers())] == addresses
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(model.state_dict().values(), kept.state_dict().values()))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)
    assert [p.grad is None for p in model.parameters()] == [False] + 5 * [True]
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))


def test_what_fails_inside_leaves_nothing_behind_either():
    model, batch = network(), batch_of(9, 1, 4, 4)
    modes, kept = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    f = objective_of(model, {**batch, "label": batch["label"] + 99}, mode=Mode.eval)
    with pytest.raises((IndexError, RuntimeError)):
        f.moved(direction_of(f), 1.0).value()
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), kept.values(), strict=True))


def test_moving_lets_the_running_moments_move_once():
    model, batch = network(), batch_of(9, 1, 4, 4)
    f = objective_of(model, batch)
    f.evaluate(moving=True)
    f.evaluate()
    assert model[1].num_batches_tracked.item() == 1


# ---- where ----


def test_other_weights_are_the_objectives_own():
    model, batch = network(norm=False), batch_of(9, 1, 4, 4)
    f = objective_of(model, batch)
    v = direction_of(f)
    there = f.moved(v, 0.25)
    expected = copy.deepcopy(model)
    for p, part in zip(expected.parameters(), v, strict=True):
        p.data.add_(0.25 * part)
    assert there.value().item() == objective_of(expected, batch).value().item()
    assert close(there.moved(v, -0.25).gradient(), f.gradient(), 1e-5)
    assert replace(there, dtype=torch.float64).value().dtype is torch.float64
    with pytest.raises(ValueError, match=r"0\.weight of \(4, 1, 3, 3\)"):
        f.at([part.flatten() for part in v])


def test_weights_that_two_modules_share_move_together():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(CLASSES, CLASSES, bias=False), nn.Linear(CLASSES, CLASSES, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model, batch = Tied(), batch_of(5, CLASSES)
    f = objective_of(model, batch)
    (v,) = direction_of(f)
    w = model.first.weight.detach() + v
    expected = functional.cross_entropy(batch["image"] @ w.T @ w.T, batch["label"])
    assert f.moved([v], 1).value().item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_hessian_follows_the_weights_where_it_was_taken():
    model, batch = network(norm=False), batch_of(9, 1, 4, 4)
    f = objective_of(model, batch)
    v = direction_of(f)
    expected = f.hessian_vector(v)
    apart, own = f.at(f.parameters).hessian(), f.hessian()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    assert close(apart(v), expected, 1e-6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        own(v)


def test_a_part_of_the_batch_on_each_rank_makes_the_whole():
    class Second(Ranks):
        """Rank 1 of two, whose sums are its own."""

        world, rank, is_main = 2, 1, False

        def __init__(self) -> None:
            pass

        def sum_(self, tensors) -> None:
            pass

    model, batch = network(norm=False, dropout=0.0), batch_of(8, 1, 4, 4)
    parts = [{name: t[i::2] for name, t in batch.items()} for i in (0, 1)]
    whole = objective_of(model, batch, penalties=decay(0.1))
    halves = [
        objective_of(model, part, count=8, penalties=decay(0.1), ranks=ranks)
        for part, ranks in zip(parts, (Ranks(), Second()), strict=True)
    ]
    assert sum(half.value().item() for half in halves) == pytest.approx(whole.value().item(), rel=1e-6)
    summed = [a + b for a, b in zip(*(half.gradient() for half in halves), strict=True)]
    assert close(summed, whole.gradient(), 1e-6)
    empty = objective_of(model, {name: t[:0] for name, t in batch.items()}, count=8, ranks=Second())
    assert empty.value().item() == 0
    assert all(not g.any() for g in empty.gradient())


def test_half_precision_is_no_dtype_of_it():
    with pytest.raises(ValueError, match="float32 or float64"):
        objective_of(network(), batch_of(9, 1, 4, 4), dtype=torch.float16)
