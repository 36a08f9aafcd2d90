"""What the observer records, against a second implementation: slow, with hooks, NumPy and true differences."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from lab_runs import make_run, watched
from torch import nn
from torch.nn import functional

from cnnlab.observe.taps import DEAD_AFTER, Taps, bounds_of, tapped_layers
from cnnlab.train import fit, train_epoch


def slow_statistics(model: nn.Module, names: list[str], batch, count: int, samples: int) -> dict[str, list[float]]:
    """Forward and backward of a plain copy, every figure by hand."""
    outputs, inputs = {}, {}

    def keep(name):
        def hook(module, given, output):
            inputs[name] = given[0].detach().numpy()[:samples]
            output.retain_grad()
            outputs[name] = output

        return hook

    for name in names:
        model.get_submodule(name).register_forward_hook(keep(name))
    losses = functional.cross_entropy(model(batch["image"])["logits"], batch["label"], reduction="none")
    losses.sum().div(count).backward()
    after = [outputs[name].detach().numpy()[:samples].astype(np.float64) for name in names]
    gradients = [outputs[name].grad.numpy()[:samples].astype(np.float64) * count for name in names]
    norms = [np.linalg.norm(p.grad.numpy().ravel()) for p in model.parameters()]
    return {
        "activation/mean": [a.mean() for a in after],
        "activation/std": [a.std() for a in after],
        "activation/zeros": [(a == 0).mean() for a in after],
        "activation/pre_std": [inputs[name].astype(np.float64).std() for name in names],
        "activation_gradient/std": [g.std() for g in gradients],
        "gradient/norm": norms,
        "gradient/global_norm": np.linalg.norm(norms),
    }


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("activation=tanh", "model=cnn", "trainer.clip_norm=0.1", "optim=adam"),
        ("model=mlp", "regularization.l2=0", "stats.samples=3"),
    ],
)
def test_a_records_figures_are_those_of_the_slow_way(overrides: tuple[str, ...]):
    run = make_run(*overrides, "trainer.epochs=1", "stats.every=1")
    model = copy.deepcopy(run.model)
    run.observer.taps.remove()
    plain = make_run(*overrides, "stats=off")
    plain.model.load_state_dict(model.state_dict())
    batch, count = next(run.loaders["train"].batches(0))
    names = list(run.observer.taps.names)
    plain.model.train()
    expected = slow_statistics(plain.model, names, batch, count, run.observer.taps.samples)
    _, said = watched(*overrides, "trainer.epochs=1", "stats.every=1", "trainer.max_steps=1")
    record = said.stats[0]
    assert record["layers"] == names
    assert record["tensors"] == [name for name, _ in plain.model.named_parameters()]
    for tag, values in expected.items():
        assert record[tag] == pytest.approx(values, rel=1e-4, abs=1e-7), tag


@pytest.mark.parametrize("optim", ["momentum", "adam", "rmsprop", "lbfgs", "newton_cg"])
def test_updates_are_the_true_change_of_the_weights(optim: str):
    run = make_run(f"optim={optim}", "stats.every=1", "trainer.epochs=1")
    ratios, norms = [], []
    batches = run.batches()
    records: list[dict] = []
    run.observer.receive = records.append
    for number in range(3):
        batch, count = next(batches)
        before = [p.detach().double().numpy().copy() for p in run.model.parameters()]
        with run.observer(number) as look:
            run.step(batch, count, number, look)
        run.clock.advance(count)
        norm = [np.linalg.norm(b) for b in before]
        change = [np.linalg.norm(p.detach().double().numpy() - b) for p, b in zip(run.model.parameters(), before)]
        ratios.append([c / n if n > 0 else math.nan for c, n in zip(change, norm, strict=True)])
        norms.append(norm)
    run.observer.drain()
    for record, ratio, norm in zip(records, ratios, norms, strict=True):
        assert record["update/ratio"] == pytest.approx(ratio, rel=1e-3, abs=1e-9, nan_ok=True)
        assert record["weight/norm"] == pytest.approx(norm, rel=1e-5)
    assert any(math.isnan(value) for value in ratios[0]), "fresh norm biases have norm 0"
    assert not any(math.isinf(value) for record in records for value in record["update/ratio"])


@pytest.mark.parametrize(
    "overrides",
    [("trainer.accumulate=2",), ("trainer.precision=fp16",), ("trainer.accumulate=4", "trainer.precision=fp16")],
)
def test_figures_depend_on_neither_micro_batches_nor_loss_scaling(overrides: tuple[str, ...]):
    common = ("norm=group", "stats.every=1", "stats.samples=8", "trainer.max_steps=1")
    _, plain = watched(*common)
    _, other = watched(*common, *overrides)
    tolerance = 0.1 if "trainer.precision=fp16" in overrides else 1e-3
    for tag in ("activation/std", "activation_gradient/std", "gradient/norm", "gradient/global_norm", "update/ratio"):
        assert other.stats[0][tag] == pytest.approx(plain.stats[0][tag], rel=tolerance, abs=1e-4, nan_ok=True), tag


def test_histograms_are_numpys():
    _, said = watched("stats=full", "probe.histograms.every=1", "probe.histograms.bins=16", "trainer.max_steps=1")
    run = make_run()
    rows = np.array(said.stats[0]["histogram/weight"])
    sizes = [p.numel() for p in run.model.parameters()]
    assert rows[:, 2:].sum(1).tolist() == sizes
    position = said.stats[0]["tensors"].index("fc.weight")
    low, high, *counts = rows[position]
    weights = run.observer.parameters[position].detach().numpy().ravel()  # its first update has a rate of nearly 0
    expected, edges = np.histogram(weights, 16, (low, high))
    assert np.abs(np.array(counts) - expected).sum() <= 0.05 * len(weights)
    assert edges[-1] == pytest.approx(weights.max(), rel=0.02)


# ---- the taps by themselves ----


class Chain(nn.Module):
    """Linear layers with an activation after each."""

    def __init__(self, activation: nn.Module, width: int = 6, depth: int = 2):
        super().__init__()
        self.layers = nn.Sequential(
            *(m for _ in range(depth) for m in (nn.Linear(width, width), copy.deepcopy(activation)))
        )

    def forward(self, x):
        return self.layers(x)


def tap(model: nn.Module, x: torch.Tensor, samples: int = 100, **options) -> Taps:
    taps = Taps(model, samples, torch.device("cpu"), gradients=True, always=False, **options)
    look(taps, model, x)
    return taps


def look(taps: Taps, model: nn.Module, x: torch.Tensor) -> None:
    taps.start()
    model(x).sum().backward()
    taps.stop()


def test_the_counts_stay_where_a_graph_found_them():
    """An uneven batch runs without the graph, which goes on with its own tensors after."""
    model, x = Chain(nn.ReLU()), torch.randn(8, 6)
    taps = tap(model, x)
    places = [counts.data_ptr() for counts in taps.active if counts is not None]
    look(taps, model, x[:3])
    assert len(places) == 2
    assert [counts.data_ptr() for counts in taps.active if counts is not None] == places


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (nn.Tanh(), (-1, 1)),
        (nn.Sigmoid(), (0, 1)),
        (nn.Softsign(), (-1, 1)),
        (nn.Hardtanh(), (-1, 1)),
        (nn.ReLU6(), (-math.inf, 6)),
        (nn.Hardsigmoid(), (-math.inf, 1)),
        *((module, None) for module in (nn.ReLU(), nn.LeakyReLU(), nn.PReLU(8), nn.ELU(), nn.GELU(), nn.SiLU())),
    ],
)
def test_an_activation_is_asked_for_its_own_bounds(activation: nn.Module, expected: tuple[float, float] | None):
    assert bounds_of(activation) == (None if expected is None else pytest.approx(expected, abs=1e-3))


@pytest.mark.parametrize(
    ("activation", "values", "share"),
    [
        (nn.Tanh(), [-9.0, 0.0, 1.0, 9.0], 0.5),  # tanh(1) = .76
        (nn.Tanh(), [-2.2, -2.0, 2.0, 2.2], 0.5),  # |y| > .97 is |x| > 2.09
        (nn.Sigmoid(), [-5.0, -4.0, 0.0, 5.0], 0.5),
        (nn.ReLU6(), [-3.0, 0.0, 3.0, 7.0], 0.25),  # its zeros are inactivity
        (nn.ReLU(), [-3.0, 0.0, 3.0, 7.0], math.nan),
    ],
)
def test_saturation_is_by_the_activations_own_range(activation: nn.Module, values: list[float], share: float):
    model = nn.Sequential(activation, copy.deepcopy(activation))
    activity = tap(model, torch.tensor([values], requires_grad=True)).read()
    assert activity.saturated[0].item() == pytest.approx(share, nan_ok=True)


def test_a_channel_is_dead_after_four_silent_samples_and_alive_after_one_sound():
    model = Chain(nn.ReLU(), width=4)
    with torch.no_grad():
        for layer in (model.layers[0], model.layers[2]):
            layer.weight.copy_(torch.eye(4))
            layer.bias.zero_()
    silent = torch.tensor([[1.0, 2.0, -1.0, -1.0], [1.0, 2.0, -3.0, -1.0]])
    taps = tap(model, silent)
    shares = []
    for _ in range(DEAD_AFTER):
        look(taps, model, silent)
        shares.append(taps.read().dead.tolist())
    assert shares[-2:] == [[0, 0], [0.5, 0.5]]
    look(taps, model, silent.abs())
    assert taps.read().dead.tolist() == [0, 0]


def test_one_sound_of_any_sample_of_the_micro_batch_is_life():
    """Also of one that the other statistics do not look at."""
    model = nn.Sequential(nn.ReLU(), nn.ReLU())
    x = torch.full((64, 6), -1.0)
    x[40, 2] = 1e-20
    taps = tap(model, x.requires_grad_(), samples=8)
    for _ in range(DEAD_AFTER):
        look(taps, model, x)
        activity = taps.read()
    assert activity.dead.tolist() == pytest.approx([5 / 6, 5 / 6])
    assert activity.zeros.tolist() == [1, 1], "of the first eight"


def test_negative_values_are_no_death():
    """As a count of small or negative outputs has it, which calls half of tanh dead."""
    model = Chain(nn.Tanh())
    taps = tap(model, -torch.ones(3, 6))
    for _ in range(DEAD_AFTER + 1):
        look(taps, model, -torch.ones(3, 6))
        assert taps.read().dead.tolist() == [0, 0]


def test_vanishing_gradients_are_measured_below_the_root_of_float32():
    model = Chain(nn.Tanh(), depth=3)
    with torch.no_grad():
        for layer in model.layers[::2]:
            layer.weight.copy_(1e-13 * torch.eye(6))
    x, weights = torch.linspace(0.1, 1, 48).view(8, 6), torch.linspace(-1, 1, 48).view(8, 6)
    taps = tap(model, x)
    taps.start()
    (model(x) * weights).sum().backward()
    taps.stop()
    std = taps.read().gradient_std
    assert std[2].item() == pytest.approx(weights.std(correction=0).item(), rel=1e-5)
    assert std[0].item() == pytest.approx(1e-26 * weights.std(correction=0).item(), rel=1e-3)


def test_a_small_deviation_about_a_large_mean_is_not_cancelled():
    x = 1000 + torch.randn(64, 6, generator=torch.Generator().manual_seed(0)) * 1e-2
    activity = tap(nn.Sequential(nn.ReLU(), nn.ReLU()), x.requires_grad_()).read()
    assert activity.std[0].item() == pytest.approx(x.double().std(correction=0).item(), rel=0.02)


def test_layers_in_place_tell_no_input():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.ReLU())
    activity = tap(model, torch.randn(4, 3)).read()
    assert activity.pre_std.isnan().tolist() == [True, False]


def test_a_layer_that_does_not_run_is_nan():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.ReLU(), nn.ReLU()

        def forward(self, x):
            return self.a(x)

    activity = tap(Skips(), torch.randn(4, 3, requires_grad=True)).read()
    for column in (activity.mean, activity.std, activity.zeros, activity.dead, activity.gradient_std):
        assert column.isnan().tolist() == [False, True]


def test_taps_watch_activations_or_else_linear_layers():
    assert [name for name, _ in tapped_layers(Chain(nn.GELU()))] == ["layers.1", "layers.3"]
    functional_net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    assert [name for name, _ in tapped_layers(functional_net)] == ["0", "2"]


def test_a_users_activation_is_watched_when_it_says_that_it_is_one():
    class Swish(nn.Module):
        is_activation = True

        def forward(self, x):
            return x * torch.sigmoid(x)

    assert [name for name, _ in tapped_layers(Chain(Swish()))] == ["layers.1", "layers.3"]


def test_taps_rename_nothing_and_can_be_removed():
    model = Chain(nn.ReLU())
    keys, parameters = list(model.state_dict()), len(list(model.parameters()))
    taps = tap(model, torch.randn(2, 6))
    assert list(model.state_dict()) == keys
    assert len(list(model.parameters())) == parameters
    taps.remove()
    assert not any(module._forward_hooks for module in model.modules())


def test_taps_are_closed_in_evaluation_and_between_samples():
    model = Chain(nn.ReLU())
    taps = tap(model, torch.randn(2, 6))
    seen = taps.bank.clone()
    model(torch.randn(2, 6))
    taps.start()
    model.eval()
    model(torch.randn(2, 6))
    assert taps.bank.count_nonzero() == 0
    assert seen.count_nonzero() > 0


def test_canonical_vanishing_shows_in_activation_gradients_and_not_in_weight_gradients():
    """He et al. 2015, with 30 layers: under Xavier the activation gradients of a ReLU net fade, and the ratio of
    the weight gradients is the same as under He."""
    ratios = {}
    for init in ("he", "xavier"):
        _, said = watched(
            "model=cnn", "model.widths=[16]", "model.depth=30", "norm=none", f"init={init}", "stats.every=1",
            "trainer.max_steps=1", "stats.samples=32",
        )  # fmt: skip
        record = said.stats[0]
        std, norm = record["activation_gradient/std"], record["gradient/norm"]
        kernels = [n for n, name in zip(norm, record["tensors"], strict=True) if name.endswith("weight")]
        ratios[init] = std[0] / std[-1], kernels[1] / kernels[-2]
    assert 0.1 < ratios["he"][0] < 10
    assert ratios["xavier"][0] < 1e-3
    assert 0.1 < ratios["he"][1] / ratios["xavier"][1] < 10


def test_dead_channels_are_remembered_over_a_resume():
    run = make_run("stats.every=1")
    train_epoch(run)
    other = make_run("stats.every=1")
    other.observer.taps.load_state_dict(run.observer.taps.state_dict())
    assert other.observer.taps.state_dict()["idle"][0].tolist() == run.observer.taps.state_dict()["idle"][0].tolist()
    with pytest.raises(ValueError, match="tapped layers"):
        other.observer.taps.load_state_dict({"idle": []})


def test_a_failing_step_leaves_the_taps_closed():
    run = make_run("stats.every=1")
    batch, _ = next(run.batches())
    with pytest.raises(RuntimeError, match="broken"), run.observer(0):
        assert run.observer.taps.open
        raise RuntimeError("broken")
    assert not run.observer.taps.open
    run.observer.drain()
    fit(run)
