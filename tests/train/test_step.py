"""The step, in each of its forms, against loops written out by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from lab_runs import all_state, bits, differences, fitted, make_run, no_waiting, watched
from torch import nn
from torch.nn import functional

from cnnlab import rng
from cnnlab.errors import UsageError
from cnnlab.observe.observer import Look
from cnnlab.protocols import Listener
from cnnlab.train import fit, train_epoch

NORM_FREE = ("norm=group", "optim=momentum")
"""Each sample's gradient is its own: the batch may be cut anywhere."""


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(bits(a), bits(b)) for a, b in pairs)


def distance(first: nn.Module, second: nn.Module) -> float:
    """Largest difference of a weight."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def cosine(step: int, total: int, warmup: float = 0.05) -> float:
    """The default schedule, from its description."""
    first = min(round(warmup * total), total - 1)
    if step < first:
        return 0.01 + 0.99 * step / first
    return (1 + math.cos(math.pi * (step - first) / (total - first))) / 2


def by_hand(run, *, penalty: float = 0.0, clip: float | None = None, after=lambda model: None) -> nn.Module:
    """The run's training as a plain PyTorch loop, on a copy of its network."""
    model = copy.deepcopy(run.model)
    group = run.optimizer.param_groups[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=group["momentum"], fused=True)
    step = 0
    for epoch in range(run.epochs):
        model.train()
        for batch, _ in run.loaders["train"].batches(epoch):
            for settings in optimizer.param_groups:
                settings["lr"] = group["base_lr"] * cosine(step, run.total_steps)
            torch.manual_seed(rng.derive(0, "dropout", step, 0, 0))
            optimizer.zero_grad()
            logits = model(batch["image"])["logits"]
            losses = functional.cross_entropy(logits, batch["label"], reduction="none")
            loss = losses.sum() / len(losses)
            if penalty:
                squares = [w.square().sum() for w in model.parameters() if w.ndim > 1]
                loss = loss + penalty / 2 * torch.stack(squares).sum()
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            after(model)
            step += 1
    return model


@pytest.mark.parametrize(
    "overrides",
    [
        ("optim=momentum", "optim.weight_decay=0"),
        ("model=cnn", "regularization.dropout=0.4", "augment=standard"),
        ("trainer.clip_norm=0.5",),
    ],
)
def test_an_eager_run_is_the_plain_loop_bit_for_bit(overrides: tuple[str, ...]):
    run = make_run(*overrides)
    expected = by_hand(run, clip=run.trainer.clip_norm)
    for _ in range(run.epochs):
        train_epoch(run)
        run.clock.close(run.steps_per_epoch)
    assert run.step.name == "eager"
    assert same_weights(run.model, expected)


def test_a_penalty_is_minimized_with_the_loss_and_reported_apart():
    overrides = ("regularization.l2=0.01", "trainer.log_every=1", "trainer.epochs=1")
    fresh = make_run(*overrides)
    expected = by_hand(fresh, penalty=0.01)
    squares = sum(p.double().square().sum().item() for p in fresh.model.parameters() if p.ndim > 1)
    run, said = watched(*overrides, "trainer.checkpoint=false")
    first = said.records[0]
    assert first["penalty"] == pytest.approx(0.01 / 2 * squares, rel=1e-5)
    assert first["data_loss"] == pytest.approx(said.losses[0].mean().item())
    assert first["loss"] == pytest.approx(first["data_loss"] + first["penalty"])
    assert distance(run.model, expected) < 1e-6 < distance(run.model, by_hand(make_run(*overrides)))
    trained = sum(p.double().square().sum().item() for p in run.model.parameters() if p.ndim > 1)
    of_val = next(record for record in said.records if record["split"] == "val")
    assert of_val["penalty"] == pytest.approx(0.01 / 2 * trained, rel=1e-5), "that of the weights that are evaluated"


@pytest.mark.parametrize("optim", ["momentum", "rmsprop"])
def test_micro_batches_change_nothing_but_rounding(optim: str):
    whole, one = watched("norm=group", f"optim={optim}")
    cut, four = watched("norm=group", f"optim={optim}", "trainer.accumulate=4")
    assert distance(whole.model, cut.model) < 2e-5
    for a, b in zip(one.losses, four.losses, strict=True):
        assert torch.allclose(a, b, atol=2e-5)
    assert [r["accuracy"] for r in one.records] == [r["accuracy"] for r in four.records]


def test_micro_batches_in_double_precision_agree_to_the_last_digits():
    models = []
    for accumulate in (1, 4, 5):
        run = make_run("norm=group", f"trainer.accumulate={accumulate}", "regularization.l1=1e-3")
        run.model.double()
        loader = run.loaders["train"]
        transform = loader.transform
        loader.transform = lambda batch, epoch, t=transform: {
            **(b := t(batch, epoch)),
            "image": b["image"].double(),
        }
        train_epoch(run)
        models.append(run.model)
    assert distance(models[0], models[1]) < 1e-13
    assert distance(models[0], models[2]) < 1e-13


def test_each_micro_batch_has_its_own_dropout():
    run = make_run("model=cnn", "regularization.dropout=0.5", "trainer.accumulate=2")
    masks = []
    dropout = next(m for m in run.model.modules() if isinstance(m, nn.Dropout))
    dropout.register_forward_hook(lambda m, inputs, output: masks.append(output == 0))
    batch, count = next(run.batches())
    run.optimizer.param_groups[0]["lr"] = 0.0
    run.step(batch, count, 0, Look())
    run.step(batch, count, 0, Look())
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])
    assert torch.equal(masks[1], masks[3])


def test_clipping_sees_unscaled_gradients():
    """With fp16 scaling by 65,536, a bound on the scaled gradient would stop the training."""
    seen: list[float] = []

    class Norms(Listener):
        def on_step(self, run, result):
            seen.append(torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in run.step.parameters])).item())

    run = make_run("trainer.precision=fp16", "trainer.clip_norm=0.25", "trainer.max_steps=3")
    run.listeners.insert(0, Norms())
    fit(run)
    assert seen == pytest.approx([0.25] * 3, rel=1e-3)


def test_an_overflow_in_fp16_skips_the_update_and_halves_the_scale():
    run = make_run("trainer.precision=fp16", "trainer.max_steps=6")
    run.step.scaler.load_state_dict({**run.step.scaler.state_dict(), "scale": 2.0**40})
    before = copy.deepcopy(run.model)
    batch, count = next(run.batches())
    run.step(batch, count, 0, Look())
    assert distance(run.model, before) == 0
    assert run.step.scaler.get_scale() == 2.0**39
    fit(run)  # goes on; the scale comes down to where gradients fit
    assert math.isfinite(run.metrics["test/loss"])
    assert run.clock.step == 6


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_what_float32_does(precision: str):
    half = fitted(f"trainer.precision={precision}", "optim=momentum", "trainer.epochs=4")
    full = fitted("optim=momentum", "trainer.epochs=4")
    assert half.metrics["test/loss"] == pytest.approx(full.metrics["test/loss"], rel=0.1)
    assert all(p.dtype is torch.float32 for p in half.model.parameters())


def test_lbfgs_by_the_closure_step_is_torchs_on_the_same_function():
    run = make_run("model=mlp", "model.hidden=[8]", "optim=lbfgs", "trainer.max_steps=2", "schedule=constant")
    model = copy.deepcopy(run.model)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=10, history_size=10, line_search_fn="strong_wolfe")
    for batch, count in list(run.loaders["train"].batches(0))[:2]:

        def closure(batch=batch, count=count):
            optimizer.zero_grad()
            logits = model(batch["image"])["logits"]
            loss = functional.cross_entropy(logits, batch["label"], reduction="none").sum() / count
            loss.backward()
            return loss

        optimizer.step(closure)
    fit_one = make_run("model=mlp", "model.hidden=[8]", "optim=lbfgs", "trainer.max_steps=2", "schedule=constant")
    train_epoch(fit_one)
    assert fit_one.step.name == "closure"
    assert same_weights(fit_one.model, model)


@pytest.mark.parametrize("optim", ["lbfgs", "newton_cg"])
def test_closures_move_the_running_statistics_once_a_step(optim: str):
    run = fitted(f"optim={optim}", "trainer.max_steps=3")
    counters = [b for name, b in run.model.named_buffers() if name.endswith("num_batches_tracked")]
    assert counters
    assert {int(c) for c in counters} == {3}


@pytest.mark.parametrize("optim", ["lbfgs", "newton_cg"])
def test_closures_lower_the_loss_of_their_batch(optim: str):
    run = make_run(f"optim={optim}", "norm=group", "regularization.l2=1e-3", "trainer.batch_size=100")
    batch, count = next(run.batches())
    losses = []
    for number in range(4):
        result = run.step(batch, count, number, Look())
        losses.append(((result.sums["data_loss"] + result.sums["penalty"]) / count).item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.2


def test_lbfgs_accumulates():
    whole = fitted("model=mlp", "model.hidden=[8]", "optim=lbfgs", "trainer.max_steps=2", "regularization.l2=1e-3")
    cut = fitted(
        "model=mlp", "model.hidden=[8]", "optim=lbfgs", "trainer.max_steps=2", "regularization.l2=1e-3",
        "trainer.accumulate=4",
    )  # fmt: skip
    assert distance(whole.model, cut.model) < 1e-3


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (("optim=newton_cg", "trainer.accumulate=2"), "accumulate"),
        (("optim=newton_cg", "trainer.clip_norm=1"), "clip_norm"),
        (("optim=lbfgs", "trainer.clip_norm=1"), "clip_norm"),
        (("optim=lbfgs", "trainer.precision=bf16"), "precision"),
        (("optim=lbfgs", "trainer.step=compiled"), "step"),
        (("trainer.step=captured",), "captured"),
        (("trainer.accumulate=101", "trainer.batch_size=200"), "batch"),
    ],
)
def test_what_a_step_cannot_do_is_refused_with_what_to_type(overrides: tuple[str, ...], word: str):
    with pytest.raises(UsageError, match=word) as caught:
        make_run(*overrides)
    assert "type" in str(caught.value)


def test_max_norm_holds_after_every_update():
    run = fitted("regularization.max_norm=0.5", "optim.lr=1")
    for weight in (p for p in run.model.parameters() if p.ndim > 1):
        assert weight.flatten(1).norm(dim=1).max() <= 0.5 + 1e-6


def test_the_moving_average_is_that_of_the_weights_after_each_update():
    run = make_run("regularization.ema=0.9")
    average = [p.detach().clone() for p in run.model.parameters()]
    history: list[list[torch.Tensor]] = []

    class Weights(Listener):
        def on_step(self, run, result):
            history.append([p.detach().clone() for p in run.model.parameters()])

    run.listeners.insert(0, Weights())
    train_epoch(run)
    for t, weights in enumerate(history, 1):
        decay = min(0.9, (1 + t) / (10 + t))
        average = [decay * a + (1 - decay) * w for a, w in zip(average, weights, strict=True)]
    live = [p.detach().clone() for p in run.model.parameters()]
    with run.averaged():
        for p, a in zip(run.model.parameters(), average, strict=True):
            assert torch.allclose(p, a, atol=1e-6)
    assert all(torch.equal(p, w) for p, w in zip(run.model.parameters(), live, strict=True))


# ---- compiled: with a cheap backend here, which traces as the real one does; Inductor itself is slow ----


@pytest.fixture
def cheap_compiler(monkeypatch: pytest.MonkeyPatch):
    """`torch.compile` with full tracing and autograd, but no code generation. Counts its calls."""
    calls: list[int] = []
    real = torch.compile

    def compile_(function, **options):
        assert options["fullgraph"], "a graph break would go unnoticed"
        compiled = real(function, **options, backend="aot_eager")

        def counted(*arguments):
            calls.append(len(arguments[0]["index"]))
            return compiled(*arguments)

        return counted

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", compile_)
    yield calls
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "overrides",
    [("stats=off",), ("stats=full", "stats.every=2"), ("trainer.precision=bf16", "trainer.accumulate=2", "norm=group")],
)
def test_a_compiled_run_learns_what_an_eager_one_does(cheap_compiler: list[int], overrides: tuple[str, ...]):
    overrides = ("model=cnn", "model.widths=[4,8]", "trainer.epochs=1", *overrides)
    compiled, said = watched(*overrides, "trainer.step=compiled")
    eager, expected = watched(*overrides)
    assert compiled.step.name == "compiled"
    for a, b in zip(said.losses, expected.losses, strict=True):
        assert torch.allclose(a, b, atol=0.02 if "trainer.precision=bf16" in overrides else 1e-4)
    assert len(said.stats) == len(expected.stats)
    for a, b in zip(said.stats, expected.stats, strict=True):
        for tag in ("activation/std", "activation_gradient/std", "gradient/norm"):
            if tag in a:
                assert a[tag] == pytest.approx(b[tag], rel=0.05, abs=1e-4)
    pieces = compiled.trainer.accumulate
    assert cheap_compiler == [32 // pieces] * 3 * pieces, "the uneven last batch runs uncompiled"


def test_one_program_serves_sampled_and_other_steps(cheap_compiler: list[int]):
    from torch._dynamo.utils import counters

    counters.clear()
    fitted("model=cnn", "model.widths=[4,8]", "trainer.step=compiled", "stats.every=3", "trainer.drop_last=true")
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_network_that_cannot_be_compiled_is_refused_in_one_line(cheap_compiler: list[int]):
    run = make_run("trainer.step=compiled")
    run.model.act.register_forward_hook(lambda m, inputs, output: print(output.sum().item()))
    with pytest.raises(UsageError, match=r"trainer\.step=eager"):
        train_epoch(run)


@pytest.mark.slow
def test_inductor_learns_what_eager_does():
    torch._dynamo.reset()
    compiled, said = watched("trainer.step=compiled", "trainer.max_steps=4")
    eager, expected = watched("trainer.max_steps=4")
    assert distance(compiled.model, eager.model) < 1e-3
    assert len(said.stats) == len(expected.stats) == 2
    for a, b in zip(said.stats, expected.stats, strict=True):
        assert a["activation_gradient/std"] == pytest.approx(b["activation_gradient/std"], rel=1e-2)


# ---- on a GPU ----


@pytest.fixture
def exact_convolutions():
    """Without TF32, which cuDNN takes for float32 unless it is told not to."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


def on_gpu(*overrides: str) -> tuple[str, ...]:
    return ("trainer.device=cuda", *overrides)


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_convolutions")
@pytest.mark.filterwarnings("ignore:TensorFloat32")  # Inductor's advice
@pytest.mark.parametrize("step", ["eager", "compiled", "captured"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_step_on_the_gpu_learns_what_the_cpu_does(step: str, precision: str):
    cpu, expected = watched("norm=group")
    gpu, said = watched(*on_gpu("norm=group", f"trainer.step={step}", f"trainer.precision={precision}"))
    assert gpu.step.name == step
    for a, b in zip(said.losses, expected.losses, strict=True):
        if precision == "fp32":
            assert torch.allclose(a.cpu(), b, atol=1e-3)
        assert a.mean().item() == pytest.approx(b.mean().item(), abs=0.2)
    assert len(said.stats) == len(expected.stats)
    for a, b in list(zip(said.stats, expected.stats))[: None if precision == "fp32" else 1]:
        assert a["activation/std"] == pytest.approx(b["activation/std"], rel=0.05)
        assert a["activation_gradient/std"] == pytest.approx(b["activation_gradient/std"], rel=0.1)


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_convolutions")
@pytest.mark.parametrize(
    ("overrides", "captures_the_update"),
    [
        (("optim=momentum", "trainer.clip_norm=1"), True),
        (("optim=sgd", "regularization.decoupled_decay=0.1", "groups.head_lr=2"), True),
        (("optim=adam",), True),
        (("optim=adamw", "regularization.ema=0.9"), True),
        (("optim=rmsprop", "trainer.accumulate=2", "regularization.dropout=0"), True),
        (("optim=nadam", "optim.lr=1e-3"), True),
        (("optim=radam",), True),
        (("optim=muon", "regularization.max_norm=3"), False),
        (("optim=adamw", "optim.fused=false"), True),
        (("optim=rmsprop", "optim.foreach=false"), False),
        (("optim=momentum", "trainer.precision=fp16"), False),
        (("optim=momentum", "loss.class_weights=balanced", "regularization.l1=1e-4"), True),
    ],
)
def test_a_captured_run_learns_what_an_eager_one_does(overrides: tuple[str, ...], captures_the_update: bool):
    """Each epoch ends with an uneven batch, which runs without the graph; the rate falls with a cosine."""
    common = ("model=cnn", "model.widths=[8,16]", "regularization.dropout=0.3", "trainer.epochs=4", *overrides)
    eager, expected = watched(*on_gpu(*common, "trainer.step=eager"))
    captured, said = watched(*on_gpu(*common, "trainer.step=captured"))
    assert (captured.step._update_graph is not None) is captures_the_update
    atol = 0.05 if "trainer.precision=fp16" in overrides else 0.01
    for a, b in zip(said.losses, expected.losses, strict=True):
        assert torch.allclose(a, b, atol=atol)
    assert captured.metrics["test/loss"] == pytest.approx(eager.metrics["test/loss"], abs=atol)
    for a, b in zip(said.stats, expected.stats, strict=True):
        assert a["activation/dead"] == pytest.approx(b["activation/dead"], abs=0.2)


@pytest.mark.gpu
def test_capturing_leaves_no_trace_in_the_buffers():
    run = fitted(*on_gpu("trainer.step=captured", "trainer.max_steps=3", "trainer.drop_last=true"))
    counters = [int(b) for name, b in run.model.named_buffers() if name.endswith("num_batches_tracked")]
    assert set(counters) == {3}


@pytest.mark.gpu
def test_a_network_that_cannot_be_captured_runs_eagerly_or_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: x.relu() * float(x.isfinite().all()))
    stream = torch.cuda.current_stream()
    run = fitted(*on_gpu())
    assert run.step.name == "eager" and any("CUDA graph" in notice for notice in run.notices)
    assert torch.cuda.current_stream() == stream
    with pytest.raises(UsageError, match=r"trainer\.step=eager"):
        make_run(*on_gpu("trainer.step=captured"))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "overrides",
    [
        ("trainer.step=eager",),
        ("trainer.step=captured",),
        ("optim=adamw", "regularization.ema=0.9", "trainer.clip_norm=1", "augment=standard"),
        ("optim=muon", "regularization.max_norm=3", "augment=mixup"),
        ("optim=rmsprop", "trainer.accumulate=2", "augment=[cutmix,cutout]"),
        ("optim=momentum", "trainer.precision=fp16", "regularization.decoupled_decay=0.1", "optim.weight_decay=0"),
        ("loss.class_weights=balanced", "augment=trivial", "trainer.precision=bf16"),
        ("loss=focal", "loss.class_weights=balanced", "augment=alexnet", "stats=full"),
        ("optim=rmsprop_inception", "regularization.l2=1e-3", "augment=inception"),
        ("loading.path=mapped", "model=cnn", "regularization.dropout=0.3"),
    ],
)
def test_a_hundred_steps_never_wait_for_the_gpu(overrides: tuple[str, ...]):
    run = make_run(*on_gpu("trainer.epochs=40", "trainer.log_every=10", *overrides))

    def epochs(count: int) -> None:
        for _ in range(count):
            train_epoch(run)
            run.clock.close(run.steps_per_epoch)

    epochs(2)  # the first steps capture, allocate, and copy small tensors that stay
    with no_waiting():
        epochs(25)
    assert run.clock.step == 108


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "model",
    [
        ("model=alexnet", "model.width=0.1"),
        ("model=vgg11", "model.width=0.1"),
        ("model=inception", "model.width=0.25"),
        ("model=resnet18", "model.width=4"),
        ("model=resnet20",),
        ("model=cnn",),
        ("model=mlp",),
        ("model=speednet",),
    ],
    ids=lambda model: model[0],
)
def test_every_family_trains_in_half_precision_as_a_graph(model: tuple[str, ...], precision: str):
    small = ("data=shapes", "data.train=100", "data.val=20", "data.test=20", "trainer.epochs=1")
    run = fitted(*on_gpu(*model, *small, "optim=adamw", f"trainer.precision={precision}"))
    assert run.step.name == "captured"
    assert math.isfinite(run.metrics["test/loss"])


@pytest.mark.gpu
def test_a_deterministic_run_on_the_gpu_is_the_same_bit_for_bit():
    overrides = on_gpu("trainer.deterministic=true", "augment=standard", "regularization.ema=0.9")
    try:
        assert differences(all_state(fitted(*overrides)), all_state(fitted(*overrides))) == []
    finally:
        torch.use_deterministic_algorithms(False)


def test_every_run_of_a_config_is_the_same_bit_for_bit():
    overrides = ("model=cnn", "regularization.dropout=0.3", "augment=standard", "regularization.ema=0.9")
    assert differences(all_state(fitted(*overrides)), all_state(fitted(*overrides))) == []
