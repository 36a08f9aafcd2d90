"""The loop: what is evaluated, selected, stopped and recorded, and when."""

from __future__ import annotations

import inspect
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lab_runs import Recorded, composed, differences, fitted, make_run, resume_run, watched
from torch.nn import functional

from cnnlab import rng
from cnnlab.building.builder import build
from cnnlab.errors import CheckpointError, DivergedError
from cnnlab.machine.copies import Arriving
from cnnlab.protocols import Listener
from cnnlab.runs import checkpoint
from cnnlab.runs.folder import RunDir
from cnnlab.sinks.jsonl import read_records
from cnnlab.train import fit, loop
from cnnlab.train.recorder import sample_losses
from cnnlab.train.selection import Selection
from cnnlab.verbs.eval import evaluate_run


def test_the_loop_is_read_on_one_screen_and_knows_no_part():
    functions = [value for value in vars(loop).values() if getattr(value, "__module__", None) == loop.__name__]
    assert {loop.fit, loop.train_epoch, loop.updates, loop.close_epoch, loop.evaluate, loop.summed} == set(functions)
    lines = [line for function in functions for line in inspect.getsource(function).splitlines()]
    assert len(lines) < 60
    branches = [line.strip() for line in lines if {"if", "elif", "match", "try:"} & set(line.split())]
    assert branches == ['figures = evaluate(run, "val") if due else {}', 'if len(batch["index"]):']


def test_a_run_says_what_the_contract_promises(tmp_path: Path):
    run = fitted("trainer.log_every=3", folder=tmp_path)
    record = RunDir(tmp_path).read()
    assert record["status"] == "completed"
    assert record["steps"] == run.clock.step == 8
    assert record["epochs"] == 2
    assert record["seconds"] > 0
    assert record["images_per_second"] > 0
    named = ("loss", "data_loss", "penalty", "accuracy", "balanced_accuracy")
    assert set(record["metrics"]) == {f"test/{name}" for name in named}
    records = list(read_records(tmp_path / "metrics.jsonl"))
    assert [(r["split"], r["epoch"], r["step"]) for r in records] == [
        ("train", 1, 3), ("train", 1, 4), ("val", 1, 4), ("train", 2, 6), ("train", 2, 8), ("val", 2, 8),
        ("test", 2, 8),
    ]  # fmt: skip
    for r in records:
        assert {"step", "epoch", "split", "loss", "data_loss", "penalty", "accuracy"} <= r.keys()
        assert ("lr" in r) is (r["split"] == "train")
    assert {f"test/{k}": v for k, v in records[-1].items() if f"test/{k}" in record["metrics"]} == record["metrics"]


def test_training_records_are_means_over_the_samples_since_the_last():
    run, said = watched("trainer.log_every=3", "trainer.epochs=1")
    trained = [r for r in said.records if r["split"] == "train"]
    for record, losses in zip(trained, (said.losses[:3], said.losses[3:]), strict=True):
        assert record["data_loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-6)
    assert [len(losses) for losses in said.losses] == [32, 32, 32, 4]


def test_an_evaluation_is_the_mean_over_every_sample_of_the_split():
    run = make_run("trainer.eval_batch_size=7")
    figures = loop.evaluate(run, "val")
    split = run.loaders["val"].split
    batch = run.loaders["val"].transform(split.fetch(torch.arange(len(split))), 0)
    run.model.eval()
    with torch.no_grad():
        logits = run.model(batch["image"])["logits"]
    assert figures["val/loss"] == pytest.approx(functional.cross_entropy(logits, batch["label"]).item(), rel=1e-5)
    assert figures["val/accuracy"] == pytest.approx((logits.argmax(1) == batch["label"]).double().mean().item())


def test_evaluating_leaves_the_training_as_it_was():
    often, said = watched("trainer.eval_every=1", "augment=standard", "regularization.ema=0.9")
    never, expected = watched("trainer.eval_every=100", "augment=standard", "regularization.ema=0.9")
    assert all(torch.equal(a, b) for a, b in zip(said.losses, expected.losses, strict=True))
    assert differences(often.model.state_dict(), never.model.state_dict()) == []
    assert [r["split"] for r in expected.records].count("val") == 1, "the last epoch is always evaluated"


# ---- selection, early stopping, the test split ----


def follow(run, values: list[float]) -> None:
    """Lets the run decide by these values of the monitored metric, one an epoch."""
    decide = run.decide

    def scripted(figures):
        return decide({**figures, f"val/{run.selection.metric}": values[run.clock.epoch - 1]} if figures else figures)

    run.decide = scripted


def scripted(values: list[float], *overrides: str, folder: Path | None = None):
    run = make_run(f"trainer.epochs={len(values)}", *overrides, folder=folder)
    follow(run, values)
    fit(run)
    return run


def test_the_best_checkpoint_is_that_of_the_best_evaluation(tmp_path: Path):
    run = scripted([0.1, 0.7, 0.7, math.nan, 0.3], folder=tmp_path)
    assert (run.selection.value, run.selection.epoch) == (0.7, 3)
    assert checkpoint.load(tmp_path / "checkpoints" / "best.pt")["clock"]["epoch"] == 3
    assert checkpoint.load(tmp_path / "checkpoints" / "last.pt")["clock"]["epoch"] == 5
    assert RunDir(tmp_path).read()["best"] == {"metric": "val/accuracy", "value": 0.7, "epoch": 3}, (
        "of equal ones the later"
    )


@pytest.mark.parametrize("ema", ["0.0", "0.8"])
def test_the_test_split_is_evaluated_once_with_the_best_checkpoint(tmp_path: Path, ema: str):
    run = scripted([0.2, 0.9, 0.1], f"regularization.ema={ema}", "optim=momentum", folder=tmp_path)
    tested = [r for r in read_records(tmp_path / "metrics.jsonl") if r["split"] == "test"]
    assert len(tested) == 1
    for which in ("best", "last"):
        figures = evaluate_run(RunDir(tmp_path), "test", which)
        assert (figures == pytest.approx(run.metrics)) is (which == "best")
    best = checkpoint.load(tmp_path / "checkpoints" / "best.pt")
    assert differences(run.model.state_dict(), best["model"]) == []
    live = make_run(f"regularization.ema={ema}")
    live.state.load_state_dict(best, only=("model",))
    plain = loop.evaluate(live, "test")["test/loss"] if float(ema) == 0 else None
    assert plain is None or plain == pytest.approx(run.metrics["test/loss"])


@pytest.mark.parametrize("ema", ["0.0", "0.8"])
def test_without_a_file_the_best_weights_are_kept_in_memory(tmp_path: Path, ema: str):
    overrides = (f"regularization.ema={ema}", "optim=momentum")
    told = [0.2, 0.9, 0.1]
    filed = scripted(told, *overrides, folder=tmp_path / "filed")
    python = scripted(told, *overrides)
    unsaved = scripted(told, *overrides, "trainer.checkpoint=false", folder=tmp_path / "unsaved")
    assert python.metrics == unsaved.metrics == filed.metrics
    assert differences(python.model.state_dict(), filed.model.state_dict()) == []
    assert RunDir(tmp_path / "unsaved").read()["metrics"] == filed.metrics
    assert not list((tmp_path / "unsaved").rglob("*.pt"))
    last = evaluate_run(RunDir(tmp_path / "filed"), "test", "last")
    assert last["test/loss"] != pytest.approx(filed.metrics["test/loss"]), "the last weights are others"


def test_a_run_that_goes_on_without_saving_keeps_its_best_file_until_it_is_beaten(tmp_path: Path):
    run = scripted([0.2, 0.9], folder=tmp_path / "worse")
    shutil.copytree(tmp_path / "worse", tmp_path / "better")
    for name, third, chosen in (("worse", 0.1, 2), ("better", 1.0, 3)):
        resumed = resume_run(tmp_path / name, epochs=3, checkpoint=False)
        follow(resumed, [0.2, 0.9, third])
        fit(resumed)
        assert resumed.selection.epoch == chosen
        assert (differences(resumed.model.state_dict(), run.model.state_dict()) == []) is (chosen == 2)


def test_with_averages_it_is_the_averages_that_are_tested(tmp_path: Path):
    run = fitted("regularization.ema=0.8", "optim=momentum", folder=tmp_path)
    state = checkpoint.load(tmp_path / "checkpoints" / "best.pt")
    other = make_run("optim=momentum")
    names = [n for n, t in [*other.model.named_parameters(), *other.model.named_buffers()] if t.is_floating_point()]
    averaged = dict(zip(names, state["ema"]["average"], strict=True))
    other.model.load_state_dict({**state["model"], **averaged})
    assert loop.evaluate(other, "test")["test/loss"] == pytest.approx(run.metrics["test/loss"], rel=1e-6)


def test_early_stopping_waits_for_its_patience(tmp_path: Path):
    run = scripted([0.5, 0.6, 0.4, 0.6, 0.5, 0.9], "regularization.patience=2", folder=tmp_path)
    assert run.clock.epoch == 4
    record = RunDir(tmp_path).read()
    assert (record["status"], record["reason"]) == ("completed", "early stopping")
    assert record["best"]["epoch"] == 4  # of equal values the later one, though a tie ends no waiting
    assert "test/accuracy" in record["metrics"]


def test_a_selection_knows_directions_and_nan():
    smaller = Selection("loss", "min")
    assert [smaller.offer(v, e) for e, v in enumerate((2.0, 3.0, math.nan, 1.0))] == [True, False, False, True]
    assert smaller.waited == 0
    assert Selection("loss", "min").as_record() is None
    assert not Selection("accuracy", "max").offer(math.nan, 1)


def test_the_plateau_schedule_hears_of_every_evaluation():
    run = scripted([0.5, 0.4, 0.4, 0.4], "schedule=plateau", "schedule.patience=1", "schedule.warmup=null")
    assert run.schedule.state_dict()["factor"] == pytest.approx(0.1)


# ---- divergence ----


@pytest.mark.parametrize("overrides", [("optim.lr=1e10", "schedule=constant", "norm=none", "optim=momentum")])
def test_a_run_that_diverges_ends_with_its_own_code_and_its_last_good_checkpoint(tmp_path: Path, overrides):
    run = make_run(*overrides, "trainer.checkpoint_minutes=0", folder=tmp_path)
    with pytest.raises(DivergedError, match=r"optim\.lr=1e\+09") as caught:
        fit(run)
    assert caught.value.exit_code == 4
    record = RunDir(tmp_path).read()
    assert record["status"] == "diverged"
    assert "non-finite" in record["reason"]
    assert not (tmp_path / "error.txt").exists()
    saved = checkpoint.load(tmp_path / "checkpoints" / "last.pt")["model"]
    assert all(t.isfinite().all() for t in saved.values())


def test_weights_that_became_non_finite_do_not_overwrite_a_checkpoint(tmp_path: Path):
    run = make_run("trainer.log_every=1000", "trainer.eval_every=2", folder=tmp_path)

    class Breaks(Listener):
        def on_step(self, run, result):
            if run.clock.step == 4:  # the last one of an epoch that nobody evaluates
                with torch.no_grad():
                    next(run.model.parameters()).fill_(math.nan)

    run.listeners.insert(0, Breaks())
    with pytest.raises(DivergedError):
        fit(run)
    assert checkpoint.load(tmp_path / "checkpoints" / "last.pt")["clock"]["step"] == 0


def test_a_fault_of_ours_leaves_its_traceback(tmp_path: Path):
    run = make_run(folder=tmp_path)

    class Fault(Listener):
        def on_step(self, run, result):
            raise ZeroDivisionError("a bug")

    run.listeners.append(Fault())
    with pytest.raises(ZeroDivisionError):
        fit(run)
    record = RunDir(tmp_path).read()
    assert (record["status"], record["reason"]) == ("failed", "ZeroDivisionError: a bug")
    assert "in on_step" in (tmp_path / "error.txt").read_text()


# ---- random numbers: each purpose has its own stream ----


def first_batches(*overrides: str):
    return list(make_run(*overrides).loaders["train"].batches(0))


def test_the_order_and_the_init_do_not_depend_on_the_augmentation():
    plain, augmented = make_run("augment=none"), make_run("augment=standard")
    assert differences(plain.model.state_dict(), augmented.model.state_dict()) == []
    for (a, _), (b, _) in zip(plain.loaders["train"].batches(0), augmented.loaders["train"].batches(0), strict=True):
        assert torch.equal(a["index"], b["index"])
    assert not torch.equal(a["image"], b["image"])


def test_adding_an_augmentation_leaves_the_others_alone():
    flips = first_batches("augment=[flip]", "normalize=none")
    both = first_batches("augment=[flip,brightness]", "augment.brightness.strength=0.0", "normalize=none")
    for (a, _), (b, _) in zip(flips, both, strict=True):
        assert torch.allclose(a["image"], b["image"], atol=1e-6)


def test_neither_does_the_model_change_order_or_augmentation():
    for (a, _), (b, _) in zip(
        first_batches("augment=standard"), first_batches("augment=standard", "model=mlp", "optim=adam"), strict=True
    ):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["index"], b["index"])


def test_a_samples_augmentation_does_not_depend_on_its_batch():
    def by_index(*overrides: str) -> dict[int, torch.Tensor]:
        batches = first_batches("augment=standard", *overrides)
        return {int(i): x for batch, _ in batches for i, x in zip(batch["index"], batch["image"], strict=True)}

    large, small = by_index(), by_index("trainer.batch_size=10")
    assert large.keys() == small.keys()
    assert all(torch.equal(large[i], small[i]) for i in large)


def test_a_weights_init_does_not_depend_on_the_other_weights():
    ten, hundred = (make_run(f"init={init}").model.state_dict() for init in ("he", "he"))
    assert differences(ten, hundred) == []
    deep, shallow = (make_run(f"model.depth={depth}").model.state_dict() for depth in (14, 8))
    shared = [k for k in shallow if k in deep and k.endswith("conv1.weight")]
    assert shared
    assert all(torch.equal(deep[k], shallow[k]) for k in shared)


def test_the_split_has_a_seed_of_its_own():
    labels = [make_run(*o).loaders["train"].split.labels for o in ((), ("seed=1",), ("data.split_seed=1",))]
    assert torch.equal(labels[0], labels[1])
    assert not torch.equal(labels[0], labels[2])


def test_the_seed_zero_is_a_seed():
    zero, again, one = (make_run(f"seed={s}").model.state_dict() for s in (0, 0, 1))
    assert differences(zero, again) == []
    assert differences(zero, one) != []


def test_the_random_state_outside_does_not_matter():
    torch.manual_seed(123)
    first = fitted("model=cnn", "regularization.dropout=0.3")
    torch.manual_seed(456)
    torch.rand(7)
    second = fitted("model=cnn", "regularization.dropout=0.3")
    assert differences(first.model.state_dict(), second.model.state_dict()) == []


def test_building_a_run_leaves_the_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    make_run("activation=gelu")
    assert torch.equal(torch.get_rng_state(), before)


# ---- evidence ----


def test_every_samples_loss_is_kept_epoch_by_epoch(tmp_path: Path):
    run, said = watched(folder=tmp_path)
    kept = sample_losses(RunDir(tmp_path))
    assert kept.shape == (2, 100)
    for epoch in (0, 1):
        indices, losses = (torch.cat(x[4 * epoch : 4 * epoch + 4]) for x in (said.indices, said.losses))
        assert torch.equal(indices, rng.permutation(0, epoch, 100))
        assert np.allclose(kept[epoch, indices.numpy()], losses.numpy(), rtol=1e-3)


def test_samples_that_were_left_out_are_not_a_number(tmp_path: Path):
    run = fitted("trainer.drop_last=true", folder=tmp_path)
    kept = sample_losses(RunDir(tmp_path))
    assert np.isnan(kept).sum(1).tolist() == [4, 4]
    assert run.clock.step == 6


def test_a_last_batch_too_small_for_batch_norm_is_left_out_and_said_so():
    run = make_run("data.limit=97")
    assert run.steps_per_epoch == 3
    assert any("last batch would have 1 sample," in notice for notice in run.notices)
    other = make_run("data.limit=97", "norm=group")
    assert other.steps_per_epoch == 4
    assert other.notices == []
    fit(other)


def test_the_moments_of_the_inputs_are_recorded_as_the_network_gets_them(tmp_path: Path):
    fitted("normalize=none", "augment=[brightness]", folder=tmp_path)
    inputs = RunDir(tmp_path).read()["inputs"]
    run = make_run("normalize=none", "augment=[brightness]")
    for name in ("train", "val"):
        batch, _ = next(run.loaders[name].batches(0))
        assert inputs[name]["mean"] == pytest.approx([batch["image"].mean().item()], rel=1e-5)
        assert inputs[name]["std"] == pytest.approx([batch["image"].std(correction=0).item()], rel=1e-4)


# ---- eval ----


def test_eval_reproduces_the_runs_own_figures(tmp_path: Path):
    run = fitted("regularization.ema=0.9", "augment=standard", "trainer.precision=bf16", folder=tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert evaluate_run(RunDir(tmp_path), "test") == pytest.approx(run.metrics)
    best = RunDir(tmp_path).read()["best"]
    assert evaluate_run(RunDir(tmp_path), "val")["val/accuracy"] == best["value"]
    train = evaluate_run(RunDir(tmp_path), "train")
    assert 0 < train["train/accuracy"] <= 1
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_eval_of_a_damaged_or_missing_checkpoint(tmp_path: Path):
    config = composed("trainer.max_steps=1")
    folder = RunDir(tmp_path)
    folder.create(config.config, config.overrides)
    with pytest.raises(CheckpointError, match="has no checkpoint; to have one: cnnlab train"):
        evaluate_run(folder, "test")
    fit(build(config, folder))
    for path in (folder.best, folder.last):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut short"):
        evaluate_run(folder, "test")


def test_listeners_hear_everything_in_order(tmp_path: Path):
    heard: list[str] = []

    class Hears(Listener):
        def __getattribute__(self, name):
            if name.startswith("on_"):
                heard.append(name)
            return super().__getattribute__(name)

    run = make_run("trainer.epochs=1", "trainer.max_steps=2", "stats.every=3", folder=tmp_path)
    run.listeners.insert(0, Hears())
    fit(run)
    assert heard == [
        "on_start", "on_save", "on_step", "on_stats", "on_step", "on_record", "on_record", "on_epoch", "on_save",
        "on_trained", "on_record", "on_end",
    ]  # fmt: skip


def test_a_split_whose_loss_alone_is_not_finite_is_told_apart(tmp_path: Path):
    """Young running moments overflow in evaluation only; a smaller rate would not help."""

    class Spoils(Listener):
        def on_step(self, run, result):
            next(m for m in run.model.modules() if isinstance(m, torch.nn.BatchNorm2d)).running_var.fill_(float("nan"))

    run = make_run(folder=tmp_path)
    run.listeners.insert(0, Spoils())
    with pytest.raises(DivergedError, match=r"loss on val is non-finite by step 4 .*eval_every"):
        fit(run)


def test_an_optimizer_that_cannot_factorize_its_gradients_has_diverged(tmp_path: Path):
    run = make_run(folder=tmp_path)

    def fail(closure=None):
        raise torch.linalg.LinAlgError("svd did not converge")

    run.optimizer.step = fail
    with pytest.raises(DivergedError, match=r"SGD cannot factorize .*clip_norm=1"):
        fit(run)
    assert RunDir(tmp_path).read()["status"] == "diverged"


def test_figures_that_arrive_late_make_the_same_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As on a GPU, where a record's figures are still on their way when the next step begins."""
    overrides = ("trainer.log_every=1", "trainer.epochs=2", "stats=off")
    fitted(*overrides, folder=tmp_path / "prompt")
    monkeypatch.setattr(Arriving, "ready", lambda self: False)
    fitted(*overrides, folder=tmp_path / "late")
    prompt, late = (list(read_records(tmp_path / name / "metrics.jsonl")) for name in ("prompt", "late"))
    assert late == prompt
    assert [record["step"] for record in late if record["split"] == "train"] == list(range(1, 9))


def test_run_json_is_valid_at_every_moment(tmp_path: Path):
    run = make_run("trainer.epochs=1", folder=tmp_path)
    seen = []

    class Reads(Listener):
        def on_step(self, run, result):
            seen.append(json.loads((tmp_path / "run.json").read_text())["status"])

    run.listeners.append(Reads())
    fit(run)
    assert seen == ["running"] * 4


def test_recorded_is_what_the_files_have(tmp_path: Path):
    run, said = make_run(folder=tmp_path), Recorded()
    run.listeners.insert(0, said)
    fit(run)
    assert list(read_records(tmp_path / "metrics.jsonl")) == said.records
    assert [r["step"] for r in read_records(tmp_path / "stats.jsonl")] == [r["step"] for r in said.stats]
