"""The landscape against closed forms, torch.func, differences and invariances; nothing of the run is changed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from lab_runs import all_state, differences, make_run
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev

from cnnlab import measure, rng
from cnnlab.diagnose import noise
from cnnlab.diagnose.landscape import (
    Settings,
    ahead_of,
    angle,
    eigenpairs,
    landscape,
    objective_for,
    sharpness,
)
from cnnlab.diagnose.landscape_verdicts import verdicts
from cnnlab.diagnose.layers import blocks
from cnnlab.diagnose.noise import ratio_interval, variances
from cnnlab.diagnose.spectrum import density, extremes, flat, hessian_of, quiet, unflat
from cnnlab.diagnose.surface import Path, filter_normalized, line, path, surface
from cnnlab.losses import CrossEntropy
from cnnlab.protocols import Batch, DataSpec, Listener, Outputs
from cnnlab.tasks import Task
from cnnlab.train import fit
from cnnlab.train.forward import Forward
from cnnlab.train.objective import Mode, Objective

CPU = torch.device("cpu")
CLASSES = 3
EXACT = {"tolerance": 1e-9, "most": 2000}


class Plain(Task):
    """The criterion of the logits."""

    def losses(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"main": self.criterion(outputs["logits"], batch["label"])}


def objective_of(model: nn.Module, batch: Batch, loss=None, **stated) -> Objective:
    task = Plain(loss or CrossEntropy(CLASSES), DataSpec(1, (4, 4), tuple("abc")))
    return Objective(Forward(model, task, CPU, torch.float64), batch, dtype=torch.float64, **stated)


def batch_of(count: int, *shape: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(CLASSES, (count,), generator=generator)
    return {"image": torch.randn(count, *shape, generator=generator), "label": label, "index": torch.arange(count)}


def agree(objective: Objective, matrix: Tensor) -> float:
    """The largest relative difference of λmax, λmin and the trace from those of a matrix."""
    values = torch.linalg.eigvalsh(matrix)
    operator = hessian_of(objective)
    found = extremes(operator, **EXACT)
    spectrum = density(operator, probes=2, steps=40)
    scale = float(values.abs().max())
    trace = sum(float(operator(e) @ e) for e in torch.eye(len(values), dtype=torch.float64))
    ends = [found.largest - float(values[-1]), found.smallest - float(values[0])]
    assert abs(trace - float(values.sum())) < 1e-10 * float(values.abs().sum())
    assert abs(spectrum.trace[0] - trace) <= spectrum.trace[1] + 1e-9 * scale
    return max(map(abs, ends)) / scale


# ---- oracles ----


def test_linear_regression():
    """The Hessian of mean ½‖Wx - y‖² is XᵀX/n for each output."""
    model = nn.Linear(6, 2, bias=False)
    batch = batch_of(30, 6)
    batch["label"] = torch.randn(30, 2, generator=torch.Generator().manual_seed(3))
    f = objective_of(model, batch, lambda logits, y: (logits - y).square().sum(1) / 2)
    x = batch["image"].double()
    assert agree(f, torch.kron(torch.eye(2, dtype=torch.float64), x.T @ x / 30)) < 1e-12


def test_logistic_regression():
    """Xᵀdiag(σ(1 - σ))X/n."""
    model = nn.Linear(6, 1, bias=False)
    batch = batch_of(30, 6)
    batch["label"] = (batch["label"] > 0).double()

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(logits[:, 0], y, reduction="none")

    x = batch["image"].double()
    p = torch.sigmoid(x @ model.weight.detach().double().T)
    assert agree(objective_of(model, batch, loss), x.T @ (p * (1 - p) * x) / 30) < 1e-12


def test_softmax_regression():
    """mean (diag p - ppᵀ) ⊗ xxᵀ."""
    model = nn.Linear(6, CLASSES, bias=False)
    batch = batch_of(30, 6)
    x = batch["image"].double()
    p = (x @ model.weight.detach().double().T).softmax(1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    matrix = torch.einsum("nab,ni,nj->aibj", inner, x, x).reshape(18, 18) / 30
    assert agree(objective_of(model, batch), matrix) < 1e-12


class Product(nn.Module):
    """x -> a·b·x."""

    def __init__(self, a: float, b: float):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (a, b))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * self.b * x


def products_net(a: float, b: float) -> Objective:
    """mean (a·b·x - t)²: at 0 a saddle with λ = ±2·mean(x·t), and a valley of minima at a·b = mean(x·t)/mean(x²)."""
    x = torch.tensor([[1.0], [2.0], [-1.0]], dtype=torch.float64)
    t = torch.tensor([[2.0], [3.0], [1.0]], dtype=torch.float64)
    batch: Batch = {"image": x, "label": t, "index": torch.arange(3)}
    return objective_of(Product(a, b), batch, lambda out, t: (out - t).square()[:, 0])


def verdict_of(f: Objective, **stated: object) -> str:
    eigen = extremes(hessian_of(f), **EXACT)
    value, gradient = f.value_and_gradient()
    down = line(f, unflat(eigen.smallest_vector, gradient), 1.0)
    found = verdicts(
        float(value), float(measure.total_norm(gradient)), eigen, down, {"number": None, "mass": None}, None, None, 1
    )
    return found[0].name


def test_the_product_net_is_a_saddle_at_zero_a_minimum_in_its_valley_and_a_slope_elsewhere():
    f = products_net(0.0, 0.0)
    found = extremes(hessian_of(f), **EXACT)
    assert found.values == pytest.approx([14 / 3, -14 / 3], rel=1e-14)
    assert verdict_of(f) == "saddle"
    best = math.sqrt(7 / 6)
    assert verdict_of(products_net(best, best)) == "minimum"
    assert verdict_of(products_net(0.3, 0.2)) == "slope"


def test_the_drop_along_the_negative_direction_is_the_one_that_is_measured():
    f = products_net(0.0, 0.0)
    vector = unflat(extremes(hessian_of(f), **EXACT).smallest_vector, f.parameters)
    along = line(f, vector, 1.0)
    a, b = 0.5, 0.5  # t = √½ along (1, 1)/√2 is ab = ½; the longest is ab = ½ for t = 1, too
    expected = float(f.value()) - float(products_net(a * math.sqrt(2), b * math.sqrt(2)).value())
    assert along.drop == pytest.approx((expected, along.drop[1]), rel=1e-12) and abs(along.drop[1]) == 1.0
    assert along.even_drop[0] == pytest.approx(expected, rel=1e-12)


def network(norm: bool) -> nn.Module:
    with rng.seeded(0, "test"):
        layers = [nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3) if norm else nn.Identity(), nn.Tanh(), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(12, CLASSES)).double()


@pytest.mark.parametrize("mode", list(Mode))
def test_a_small_network_has_the_spectrum_that_torch_func_finds(mode: Mode):
    model, batch = network(norm=True), batch_of(16, 1, 4, 4)
    with torch.no_grad():
        model(batch_of(64, 1, 4, 4, seed=5)["image"].double())  # running moments that are some
    buffers = {name: t.clone() for name, t in model.named_buffers()}
    names = [name for name, _ in model.named_parameters()]
    theta = flat([p for _, p in model.named_parameters()])
    model.train(mode is Mode.train)

    def plain(vector: Tensor) -> Tensor:
        named = dict(zip(names, unflat(vector, list(model.parameters())), strict=True))
        out = functional_call(
            model, {**named, **{k: b.clone() for k, b in buffers.items()}}, (batch["image"].double(),)
        )
        return nn.functional.cross_entropy(out, batch["label"])

    assert agree(objective_of(model, batch, mode=mode), jacrev(grad(plain))(theta).detach()) < 1e-11


def test_weights_before_a_batch_norm_feel_no_slope_and_no_curvature_along_themselves():
    """The loss does not depend on their length: gᵀw = 0 and wᵀHw = 0 (van Laarhoven 2017). With running moments it
    does."""
    model, batch = network(norm=True), batch_of(16, 1, 4, 4)
    model[1].eps = 1e-14
    f = objective_of(model, batch, mode=Mode.train)
    along = [p.detach() if i == 0 else torch.zeros_like(p) for i, p in enumerate(f.parameters)]
    scale = float(measure.total_norm(f.gradient()) * measure.total_norm(along))
    assert abs(float(measure.dot(f.gradient(), along))) < 1e-7 * scale  # in float32's norms, of sums in float64
    curvature = extremes(hessian_of(f), **EXACT).largest * float(measure.dot(along, along))
    assert abs(float(measure.dot(f.hessian_vector(along), along))) < 1e-10 * curvature
    frozen = replace(f, mode=Mode.frozen)
    assert abs(float(measure.dot(frozen.gradient(), along))) > 1e-3 * scale


def test_an_eigenvector_is_one_of_the_gradient_s_differences():
    f = objective_of(network(norm=False), batch_of(16, 1, 4, 4))
    found = extremes(hessian_of(f), **EXACT)
    for value, vector in ((found.largest, found.vectors[0]), (found.smallest, found.smallest_vector)):
        v, h = unflat(vector, f.parameters), 1e-4
        difference = (flat(f.moved(v, h).gradient()) - flat(f.moved(v, -h).gradient())) / (2 * h)
        assert float((difference - value * vector).norm()) < 1e-6 * abs(found.largest)


# ---- noise ----


def test_the_noise_scale_of_linear_regression_is_that_of_its_samples_gradients():
    """tr Σ and ‖G‖² from every sample's gradient, of which 2,000 batches of 4 are an estimate."""
    model = nn.Linear(5, 1, bias=False)
    batch = batch_of(2000, 5)
    batch["label"] = torch.randn(2000, 1, generator=torch.Generator().manual_seed(3)) + 2 * batch["image"][:, :1]
    f = objective_of(model, batch, lambda logits, y: (logits - y).square().sum(1) / 2)
    x, y, w = batch["image"].double(), batch["label"].double(), model.weight.detach().double()
    each = (x @ w.T - y) * x
    trace, square = float(each.var(0).sum()), float(each.mean(0).square().sum() - each.var(0).sum() / 2000)
    found, scale = variances(f, [1, 4, 16, 64], own=1)
    assert scale is not None and scale.batch == 1
    assert scale.trace == pytest.approx(trace, rel=1e-6)
    assert scale.squared_gradient == pytest.approx(square, rel=1e-6)
    assert scale.low < trace / square < scale.high
    for row in found:
        assert abs(row.variance - trace / row.batch) < 2 * row.error
    assert noise.exponent(found) == pytest.approx(-1, abs=0.05)


def test_the_interval_of_the_noise_scale_covers_as_often_as_it_says():
    """Gradients drawn from a known distribution, 200 times: about 95 % of the intervals hold the true ratio."""
    generator, held = torch.Generator().manual_seed(0), 0
    mean = torch.full((50,), 0.1, dtype=torch.float64)
    for _ in range(200):
        gathered = noise._Gathered(4)
        for row in mean + torch.randn(64, 50, generator=generator, dtype=torch.float64) / 2:
            gathered.add([row])
        found = gathered.noise_scale()
        held += found.low <= 50 / 0.5 <= found.high
    assert 180 <= held <= 198


def test_a_gradient_that_is_noise_alone_has_no_upper_bound():
    generator = torch.Generator().manual_seed(1)
    gathered = noise._Gathered(4)
    for row in torch.randn(64, 50, generator=generator, dtype=torch.float64):
        gathered.add([row])
    assert gathered.noise_scale().high == math.inf


def test_fieller_s_interval_is_symmetric_where_the_denominator_is_certain():
    assert ratio_interval(10.0, 2.0, 1.0, 0.0, 0.0, 2.0) == pytest.approx((4.0, 6.0))
    assert ratio_interval(10.0, -1.0, 1.0, 1.0, 0.0, 2.0)[1] == math.inf


# ---- lines and planes ----


def test_a_plane_through_a_quadratic_is_that_quadratic():
    f = products_net(0.0, 0.0)
    one, other = ([torch.tensor(x, dtype=torch.float64) for x in pair] for pair in ((1.0, 0.0), (0.0, 1.0)))
    grid = surface(f, one, other, ((-1.0, 1.0), (-2.0, 2.0)), 3)
    assert grid["x"] == [-1, 0, 1] and grid["y"] == [-2, 0, 2]
    assert grid["loss"][2][0] == pytest.approx(float(products_net(-1.0, 2.0).value()))
    assert grid["loss"][1] == pytest.approx([14 / 3] * 3)


def test_filter_normalized_directions_have_the_filters_lengths():
    f = objective_of(network(norm=True), batch_of(4, 1, 4, 4))
    for direction, p in zip(filter_normalized(f, 0, 0), f.parameters):
        if p.ndim > 1:
            assert direction.flatten(1).norm(dim=1).tolist() == pytest.approx(p.flatten(1).norm(dim=1).tolist())
        else:
            assert not direction.any()


def test_angles():
    one = [torch.tensor([1.0, 0.0]), torch.tensor([0.0])]
    assert angle(one, [torch.tensor([-2.0, 0.0]), torch.tensor([0.0])]) == pytest.approx(0)
    assert angle(one, [torch.tensor([1.0, 1.0]), torch.tensor([0.0])]) == pytest.approx(45, rel=1e-5)
    assert angle(one, [torch.zeros(2), torch.zeros(1)]) == 90


# ---- runs ----

QUICK = Settings(samples=48, products=12, probes=2, steps=4, points=3, top=1)


@pytest.mark.parametrize(
    ("settings", "overrides"),
    [
        (QUICK, ("regularization.dropout=0.2", "regularization.ema=0.9", "augment=standard")),
        (replace(QUICK, mode=Mode.frozen, dtype=torch.float64, directions="random"), ("optim=adam",)),
        (replace(QUICK, mode=Mode.eval), ("regularization.l2=0.01", "trainer.accumulate=2")),
    ],
    ids=["train", "frozen", "eval"],
)
def test_a_run_after_it_is_the_run_without_it(settings: Settings, overrides: tuple[str, ...]):
    run, control = make_run(*overrides), make_run(*overrides)
    before, random = all_state(run), torch.get_rng_state()
    modes = [module.training for module in run.model.modules()]
    found = landscape(run, settings)
    assert math.isfinite(found.loss) and found.grid is not None and found.spectrum is not None
    assert differences(before, all_state(run)) == []
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [module.training for module in run.model.modules()]
    assert all(p.grad is None for p in run.model.parameters())
    assert fit(run) == fit(control)
    assert differences(all_state(control), all_state(run)) == []


def test_the_objective_is_the_mean_of_the_coming_batches():
    run = make_run("trainer.batch_size=16")
    f = objective_for(run, Settings(samples=48))
    coming = [float(run.objective(b, c).value()) for (b, c), _ in zip(run.loaders["train"].batches(0), range(3))]
    assert f.accumulate == 3
    assert float(f.value()) == pytest.approx(sum(coming) / 3, rel=1e-6)


@pytest.mark.parametrize(
    ("optim", "limit"),
    [
        (("optim=sgd", "optim.lr=0.1"), 20),
        (("optim=momentum", "optim.lr=0.1", "optim.momentum=0.9"), 38),
        (("optim=nesterov", "optim.lr=0.1", "optim.momentum=0.9"), 38 / 2.8),
        (("optim=adam",), None),
    ],
    ids=["sgd", "momentum", "nesterov", "adam"],
)
def test_what_the_rate_allows(optim: tuple[str, ...], limit: float | None):
    run = make_run(*optim, "schedule=constant")
    eigen = extremes(hessian_of(objective_for(run, Settings(samples=16))), most=8)
    found = sharpness(run, eigen)
    assert found is not None and found["limit"] == (None if limit is None else pytest.approx(limit))


@pytest.mark.parametrize(("rate", "stays"), [(0.99, True), (1.01, False)])
def test_gradient_descent_stays_below_the_limit_and_leaves_above_it(rate: float, stays: bool):
    """On linear regression, at a rate just below and just above 2/λmax."""
    model = nn.Linear(4, 1, bias=False)
    batch = batch_of(20, 4)
    batch["label"] = torch.zeros(20, 1)
    f = objective_of(model, batch, lambda logits, y: (logits - y).square().sum(1) / 2)
    step, start = rate * 2 / extremes(hessian_of(f), **EXACT).largest, float(f.value())
    for _ in range(2000):
        f = f.moved(f.gradient(), -step)
    assert (float(f.value()) < start) is stays


# ---- by layer ----


def whole_hessian(objective: Objective) -> Tensor:
    operator = hessian_of(objective)
    return torch.stack([operator(e) for e in torch.eye(operator.size, dtype=torch.float64)])


def test_a_layers_block_is_that_of_the_whole_hessian():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, CLASSES))
    objective = objective_of(model, batch_of(20, 6))
    matrix, found = whole_hessian(objective), blocks(objective, products=500, probes=400, tolerance=1e-9)
    assert [(block.layer, block.parameters) for block in found] == [("1", 28), ("3", 15)]
    for block, (begin, end) in zip(found, [(0, 28), (28, 43)], strict=True):
        own = matrix[begin:end, begin:end]
        values = torch.linalg.eigvalsh(own)
        assert (block.largest, block.smallest) == pytest.approx((float(values[-1]), float(values[0])), abs=1e-10)
        assert abs(block.trace - float(own.trace())) <= block.trace_error < 0.7 * abs(block.trace)


# ---- from one checkpoint to another ----


def test_a_path_between_weights_of_a_quadratic_has_no_barrier_and_one_over_a_hill_has_its_height():
    model = nn.Linear(6, 2, bias=False)
    batch = batch_of(30, 6)
    batch["label"] = torch.randn(30, 2, generator=torch.Generator().manual_seed(3))
    f = objective_of(model, batch, lambda logits, y: (logits - y).square().sum(1) / 2)
    other = [p.detach() + 1.0 for p in f.parameters]
    way = path(f, other, 9)
    assert way.barrier == 0 and way.distance == pytest.approx(math.sqrt(12))
    ends = [float(f.value()), float(f.at(other).value())]
    assert [way.values[way.places.index(t)] for t in (0.0, 1.0)] == pytest.approx(ends, rel=1e-12)
    assert (min(way.places), max(way.places)) == (-0.5, 1.5)
    assert Path([0.0, 0.25, 0.5, 1.0], [1.0, 2.0, 4.0, 3.0], 1.0).barrier == pytest.approx(2.0)


def test_other_weights_have_to_be_the_networks_own():
    f = objective_of(nn.Linear(6, 3), batch_of(9, 6))
    with pytest.raises(ValueError, match=r"weight is \(3, 6\), there is one of \(2, 6\)"):
        ahead_of(f, {"weight": torch.zeros(2, 6), "bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="bias is .* there is none"):
        ahead_of(f, {"weight": torch.zeros(3, 6)})


# ---- from a part of the samples to all ----


def test_eigenvalues_begun_on_a_part_of_the_samples_are_those_of_all():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    f = objective_of(model, batch_of(160, 16), accumulate=16)
    operator = hessian_of(f)
    found = eigenpairs(f, operator, Settings(top=2, tolerance=1e-6, products=400), 0, quiet)
    values = torch.linalg.eigvalsh(whole_hessian(f))
    assert found.converged and operator.products > 0
    assert found.values == pytest.approx([float(values[i]) for i in (-1, -2, 0)], abs=1e-9)


# ---- while it trains ----


def test_the_probe_measures_the_hessian_and_leaves_the_run_as_it_is(tmp_path):
    common = ("optim=momentum", "regularization.dropout=0.1", "stats.max_overhead=null", "trainer.epochs=1")
    runs = []
    for name, probes in (("without", ()), ("with", ("probe=sharpness", "probe.sharpness.every=2"))):
        run = make_run(*common, *probes, folder=tmp_path / name)
        heard = Heard()
        run.listeners.append(heard)
        if probes:
            probe = run.observer.probes[0][0]
            probe.samples, probe.products, probe.tolerance = 40, 200, 1e-4
        fit(run)
        runs.append((run, heard))
    (plain, _), (watched, heard) = runs
    assert differences(plain.model.state_dict(), watched.model.state_dict()) == []
    assert differences(plain.optimizer.state_dict(), watched.optimizer.state_dict()) == []
    assert plain.metrics == watched.metrics
    assert [record["step"] for record in heard.stats] == [1, 2, 4]
    for record in heard.stats:
        assert record["landscape/residual"] < 0.02 * abs(record["landscape/largest"])
        assert record["landscape/largest"] > record["landscape/smallest"]
    probe = watched.observer.probes[0][0]
    last = watched.objective(probe._batch, mode="train", dtype=torch.float64)
    image = hessian_of(last)(probe._vectors[0].double())  # one update later: the vector is still nearly one
    assert float(image @ probe._vectors[0].double()) > 0
    limit, decay = (2 + 2 * 0.9) / heard.rates[-1], watched.optimizer.param_groups[0]["weight_decay"]
    own = heard.stats[-1]["landscape/largest"] + decay
    assert heard.stats[-1]["landscape/edge"] == pytest.approx(own / limit, rel=1e-4)


class Heard(Listener):
    """The statistics, and the rate of their update."""

    def __init__(self) -> None:
        self.stats: list[dict] = []
        self.rates: list[float] = []
        self._rates: dict[int, float] = {}

    def on_step(self, run, result) -> None:
        self._rates[run.clock.step] = run.last_lr

    def on_stats(self, run, record) -> None:
        self.stats.append(record)

    def on_end(self, run, error) -> None:
        self.rates = [self._rates[record["step"]] for record in self.stats]
