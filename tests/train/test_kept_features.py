"""Features of a frozen backbone, made once and kept (`finetune.cache`): the same run as without, in less time."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from cli_runs import Answer
from lab_runs import all_state, differences, files_of, fitted, interrupted_at, make_run, resume_run
from rank_processes import run_ranks
from torch import nn

import cnnlab
from cnnlab.building.trial import compose
from cnnlab.data.features import opened, written
from cnnlab.errors import ConfigError, DataError, UsageError
from cnnlab.interventions import GradientNoise
from cnnlab.machine.ranks import Ranks
from cnnlab.train import fit
from cnnlab.train.feature_loader import COMPARED, FeatureLoader
from cnnlab.train.halves import Whole, halved
from cnnlab.train.run import Run

Cli = Callable[..., Answer]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CNNLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def made(cache: str, *more: str, folder: Path | None = None) -> Run:
    return make_run("finetune=features", f"finetune.cache={cache}", *more, folder=folder)


def counted(run: Run, name: str) -> list[int]:
    """How many images a layer saw while the network was to be trained or evaluated, call by call."""
    seen: list[int] = []
    run.model.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    return seen


SHAPES = ("data=shapes", "data.size=32", "data.train=40", "data.val=20", "data.test=20", "data.limit=null")
KINDS = {
    "resnet": ("model.width=4",),
    "dropout before the classifier": ("model=cnn", "model.widths=[4,8]", "norm=batch", "regularization.dropout=0.5"),
    "vgg": ("model=vgg", "model.width=0.05", "norm=batch"),
    "speednet": ("model=speednet", "model.widths=[8,8,8]"),
    "torchvision": ("model=torchvision", "model.name=shufflenet_v2_x0_5"),
    "averages, micro-batches": ("model.width=4", "regularization.ema=0.9", "trainer.accumulate=2"),
    "bf16": ("model.width=4", "trainer.precision=bf16"),
    "fixed views": ("model.width=4", "augment=[crop,flip]", "finetune.views=2", "trainer.epochs=3"),
    "mirrored in evaluation": ("model.width=4", "task.views=mirror"),
    "unet": (*SHAPES, "task=segmentation", "model.width=4", "head=unet"),
    "unpool": (*SHAPES, "task=segmentation", "model=cnn", "model.widths=[4,8]", "norm=batch", "head=unpool"),
    "moved masks": (*SHAPES, "task=segmentation", "model.width=4", "augment=[rotate]", "finetune.views=1"),
    "boxes": (*SHAPES, "task=localization", "model.width=4"),
    "layouts": ("model.width=4", "trainer.layout=channels_last", "head=linear"),
    "memory that is watched": ("model.width=4", "trainer.auto_accumulate=true"),
    "lbfgs": ("model.width=4", "optim=lbfgs", "optim.max_iter=2"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_run_that_it_is_without(kind: str):
    """Bit for bit: weights, moments, records, each sample's loss, what val chose, test."""
    plain, kept = made("false", *KINDS[kind]), made("true", *KINDS[kind])
    assert isinstance(kept.loaders["train"], FeatureLoader) and not isinstance(plain.loaders["train"], FeatureLoader)
    fit(plain)
    fit(kept)
    one, other = all_state(plain), all_state(kept)
    for part in ("origin", "taps", "observer"):
        one.pop(part, None)
        other.pop(part, None)
    assert not differences(one, other)
    assert plain.metrics == kept.metrics


def test_the_backbone_runs_once_an_image(cache: Path):
    run = made("true", "model.width=4", "trainer.epochs=6")
    seen = counted(run, "conv1")
    run.checkpointer.take_best = lambda run: seen.append(-1)  # type: ignore[method-assign]
    fit(run)
    during = sum(seen[: seen.index(-1)])
    assert during <= 100 + run.val_size + 4 * COMPARED
    assert len(list(cache.glob("*.features"))) == 2

    again = made("true", "model.width=4", "trainer.epochs=6", "optim.lr=0.03")
    seen = counted(again, "conv1")
    again.checkpointer.take_best = lambda run: seen.append(-1)  # type: ignore[method-assign]
    fit(again)
    assert sum(seen[: seen.index(-1)]) <= 6 * COMPARED, "the entries are found"
    assert len(list(cache.glob("*.features"))) == 2


def test_other_weights_views_and_inputs_have_entries_of_their_own(cache: Path):
    def entries(*more: str) -> int:
        fitted("finetune=features", "finetune.cache=true", "model.width=4", "trainer.epochs=3", *more)
        return len(list(cache.glob("*.features")))

    assert entries() == 2
    assert entries("seed=1") == 4, "other weights, train and val"
    assert entries("normalize=half") == 6
    assert entries("augment=flip", "finetune.views=2") == 8, "two of train; val is not augmented"
    assert entries("augment=flip", "finetune.views=3") == 9, "one more view"


@pytest.mark.parametrize("damage", ["bytes", "short", "meta"])
def test_a_damaged_entry_is_made_again(cache: Path, damage: str, caplog: pytest.LogCaptureFixture):
    first = fitted("finetune=features", "model.width=4")
    for entry in cache.glob("*.features"):
        file = entry / ("meta.json" if damage == "meta" else "0.bin")
        content = file.read_bytes()
        file.write_bytes(content[:-1] if damage == "short" else bytes([content[0] ^ 1]) + content[1:])
    with caplog.at_level(logging.WARNING):
        second = fitted("finetune=features", "model.width=4")
    assert "is damaged" in caplog.text and "is made again" in caplog.text
    assert not differences(first.model.state_dict(), second.model.state_dict())


def test_an_entry_that_another_code_made_is_noticed(cache: Path, caplog: pytest.LogCaptureFixture):
    """The key cannot know what a user's own class computes: a few samples are made again and compared."""
    first = fitted("finetune=features", "model.width=4")
    (entry,) = (entry for entry in cache.glob("*.features") if isinstance(opened(entry, 100), dict))
    found = opened(entry, 100)
    assert isinstance(found, dict)
    tensors = {name: tensor.clone() for name, tensor in found.items()}
    tensors["feature/input"] *= 1.5
    shutil.rmtree(entry)
    written(entry, 100, [tensors])
    with caplog.at_level(logging.WARNING):
        second = fitted("finetune=features", "model.width=4")
    assert "of another backbone" in caplog.text
    assert not differences(first.model.state_dict(), second.model.state_dict())


def test_a_resumed_run_is_the_unbroken_one(tmp_path: Path, cache: Path):
    """In mid-epoch, with the cache gone; its network is built with other weights and then gets its own."""
    told = ("finetune=features", "model.width=4", "trainer.epochs=3")
    whole = fitted(*told, folder=tmp_path / "whole")
    interrupted_at(5, *told, folder=tmp_path / "parts")
    shutil.rmtree(cache)
    resumed = resume_run(tmp_path / "parts")
    fit(resumed)
    assert isinstance(resumed.loaders["train"], FeatureLoader)
    assert not differences(all_state(whole), all_state(resumed))
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "parts")


def test_opened_it_is_the_whole_network(tmp_path: Path):
    run = fitted("finetune=features", "model.width=4", folder=tmp_path / "run")
    network = cnnlab.open(tmp_path / "run")
    batch = run.loaders["test"].some(8)
    run.model.eval()
    expected = run.model(batch["image"])["logits"]
    torch.testing.assert_close(network.model(batch["image"])["logits"], expected, rtol=0, atol=0)


def test_statistics_and_pictures_are_of_what_runs(tmp_path: Path, cli: Cli):
    answer = cli(
        "train", "data.limit=100", "model.width=4", "finetune=features", "trainer.device=cpu", "trainer.epochs=2",
        "stats.every=1", "hydra.run.dir=run",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert "layers before it do not run in training, and have no statistics" in answer.out
    records = [json.loads(line) for line in (tmp_path / "run" / "stats.jsonl").read_text().splitlines()]
    assert {tuple(record["layers"]) for record in records if "layers" in record} == {("fc",)}
    assert all(record["activation/std"][0] > 0 for record in records if "activation/std" in record)
    assert cli("eval", "run").code == 0


# ---- where it would be wrong ----


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        (("augment=[crop,flip]",), "augmentation draws anew in each epoch"),
        (("augment=[crop,mixup]", "finetune.views=2"), "mixes each image with another"),
        (("model.depth=14", "regularization.stochastic_depth=0.5"), "something else of an image in training"),
        (("trainer.epochs=1",), "one epoch needs them once"),
        (("model=torchvision", "model.name=googlenet", "data=shapes", "data.size=64", "data.train=20",
          "data.limit=null", "data.val=8", "data.test=8"), "is not called once"),
    ],
)  # fmt: skip
def test_what_would_be_wrong_is_not_kept_and_said(told: tuple[str, ...], reason: str):
    narrow = () if any(text.startswith("model=") for text in told) else ("model.width=4",)
    run = make_run("finetune=features", *narrow, *told)
    assert not isinstance(run.loaders["train"], FeatureLoader)
    (line,) = [notice for notice in run.notices if notice.startswith("features:")]
    assert reason in line
    if "one epoch" not in reason:
        with pytest.raises(UsageError, match=reason):
            make_run("finetune=features", "finetune.cache=true", *narrow, *told)


def test_statistics_that_move_are_refused_before_the_data():
    with pytest.raises(ConfigError, match="under finetune.norm=update the statistics of norm layers move"):
        compose(["finetune=features", "finetune.norm=update", "finetune.cache=true"])


def test_an_intervention_in_batches_is_not_bypassed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(GradientNoise, "batch", lambda self, batch, step: batch, raising=False)
    run = make_run("finetune=features", "model.width=4", "intervention=gradient_noise")
    assert not isinstance(run.loaders["train"], FeatureLoader)
    assert any("changes the batches" in notice for notice in run.notices)


def test_neither_is_a_foreign_one_in_weights(monkeypatch: pytest.MonkeyPatch):
    foreign = type("Shrinks", (GradientNoise,), {"weights": lambda self, step: None, "__module__": "mylab"})
    monkeypatch.setattr("cnnlab.interventions.GradientNoise", foreign)
    run = make_run("finetune=features", "model.width=4", "intervention=gradient_noise")
    assert not isinstance(run.loaders["train"], FeatureLoader)
    assert any("may change weights that do not train" in notice for notice in run.notices)


def test_a_backbone_that_changes_ends_the_run():
    run = made("true", "model.width=4")
    list(run.loaders["train"].batches(0))
    with torch.no_grad():
        run.model.conv1.weight.mul_(1)
    list(run.loaders["train"].batches(1))  # changed in place to what it was
    with torch.no_grad():
        run.model.conv1.weight.mul_(1.1)
    with pytest.raises(UsageError, match="has changed while its features were in use"):
        list(run.loaders["train"].batches(1))


def test_a_cache_that_cannot_be_written(cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    plain = fitted("finetune=features", "finetune.cache=false", "model.width=4")
    monkeypatch.setattr("cnnlab.train.feature_loader.written", full)
    with caplog.at_level(logging.WARNING):
        run = fitted("finetune=features", "model.width=4")
    assert "the backbone runs in each epoch" in caplog.text
    assert not differences(plain.model.state_dict(), run.model.state_dict())
    with pytest.raises(DataError, match="No space left"):
        fitted("finetune=features", "finetune.cache=true", "model.width=4")


# ---- entries ----


def test_tensors_of_any_type_come_back(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    whole = {
        "a": torch.randn(7, 2, 3, generator=generator).bfloat16(),
        "b": torch.randint(0, 9, (7,), generator=generator),
        "c": torch.rand(7, 4, 2, 2, generator=generator).contiguous(memory_format=torch.channels_last),
        "d": torch.rand(7, 1, generator=generator) < 0.5,
        "e": torch.zeros(7, 0),
    }
    parts = ({name: tensor[start : start + 3] for name, tensor in whole.items()} for start in (0, 3, 6))
    found = written(tmp_path / "entry", 7, parts)
    assert not differences(whole, found)
    with pytest.raises(ValueError, match="not 7 rows"):
        written(tmp_path / "other", 7, [{"a": torch.zeros(3)}])
    assert [path.name for path in tmp_path.iterdir()] == ["entry"], "nothing is left of what failed"


# ---- two processes ----


def _two(ranks: Ranks, folder: str, cache: str) -> list[torch.Tensor]:
    os.environ["CNNLAB_CACHE"] = f"{folder}/cache"
    run = make_run("finetune=features", f"finetune.cache={cache}", "model.width=4", ranks=ranks)
    fit(run)
    return [tensor.clone() for tensor in run.model.state_dict().values()]


@pytest.mark.slow
def test_on_two_processes(tmp_path: Path):
    plain, kept = (run_ranks(_two, str(tmp_path), cache) for cache in ("false", "true"))
    for rank in range(2):
        for one, other in zip(plain[rank], kept[rank], strict=True):
            assert torch.equal(one, other)


def test_a_network_that_names_no_head_has_no_halves():
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    model = Bare()
    with pytest.raises(Whole, match="Bare names no classifier and has no stages"):
        halved(model, torch.rand(4, 3, 2, 2), model.train, nullcontext)
