"""`cnnlab check`: healthy experiments pass, planted faults are named, and nothing of it stays."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_runs import Answer
from lab_runs import all_state, differences, make_run
from PIL import Image
from torch import Tensor, nn

from cnnlab.data.splits import TensorSplit
from cnnlab.diagnose.check_data import inputs
from cnnlab.diagnose.check_findings import Subject, Verdict
from cnnlab.diagnose.check_loss import finite_differences, gradients_arrive, input_matters, samples_stay_apart
from cnnlab.diagnose.checks import check_run
from cnnlab.diagnose.copies import copies
from cnnlab.runs import checkpoint
from cnnlab.runs.folder import RunDir
from cnnlab.sinks.jsonl import read_records
from cnnlab.train import fit
from cnnlab.train.run import Run

Cli = Callable[..., Answer]
SMALL = ("model=cnn", "model.widths=[8,8]", "stats=off")


def verdicts(run: Run) -> dict[str, Verdict]:
    return {finding.name: finding.verdict for finding in check_run(run)}


@pytest.fixture(scope="module")
def healthy() -> tuple[Run, dict[str, Verdict]]:
    run = make_run(*SMALL, "regularization.l2=0.001")
    return run, verdicts(run)


def test_a_healthy_experiment_is_told_nothing_bad(healthy: tuple[Run, dict[str, Verdict]]):
    assert set(healthy[1].values()) == {Verdict.good}
    assert len(healthy[1]) == 13


def test_nothing_of_it_stays(healthy: tuple[Run, dict[str, Verdict]]):
    """The run afterwards is, bit for bit, one that was never checked."""
    other = make_run(*SMALL, "regularization.l2=0.001")
    assert differences(all_state(healthy[0]), all_state(other)) == []
    again = copy.deepcopy(other.model.state_dict())
    list(check_run(other))
    assert all(torch.equal(value, other.model.state_dict()[name]) for name, value in again.items())
    assert fit(other) == fit(make_run(*SMALL, "regularization.l2=0.001"))


class Mixing(nn.Module):
    """Adds the next sample's maps to each one's."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * x.roll(1, 0)


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, slope: Tensor) -> Tensor:
        return slope


class Wrong(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return WrongBackward.apply(x)


def with_layer(run: Run, layer: nn.Module) -> Subject:
    """The run's network with a layer behind its first module that has weights."""
    model = run.model
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    first.register_forward_hook(lambda module, args, output: layer(output))
    return Subject.of(run)


def test_a_layer_that_mixes_the_batch_is_found():
    found = samples_stay_apart(with_layer(make_run(*SMALL, "norm=none"), Mixing()))
    assert found is not None and found.verdict is Verdict.bad
    batch_norm = samples_stay_apart(Subject.of(make_run(*SMALL, "norm=batch")))
    assert batch_norm is not None and batch_norm.verdict is Verdict.good and "batch norm" in batch_norm.evidence


def test_a_wrong_backward_pass_is_found():
    found = finite_differences(with_layer(make_run(*SMALL), Wrong()))
    assert found.verdict in (Verdict.watch, Verdict.bad)
    assert finite_differences(Subject.of(make_run(*SMALL))).verdict is Verdict.good


def test_parameters_without_a_gradient_are_named():
    run = make_run(*SMALL)
    run.model.register_parameter("unread", nn.Parameter(torch.ones(3)))
    found = gradients_arrive(Subject.of(run))
    assert found.verdict is Verdict.watch and "unread" in found.evidence


def test_a_parameter_that_stands_still_unasked_is_named():
    run = make_run(*SMALL)
    name, weight = next(iter(run.model.named_parameters()))
    weight.requires_grad_(False)
    found = gradients_arrive(Subject.of(run))
    assert found.verdict is Verdict.watch and name in found.evidence and "groups.freeze" in found.evidence
    asked = make_run(*SMALL, f"groups.freeze=[{name}]")
    assert gradients_arrive(Subject.of(asked)).verdict is Verdict.good


def test_evaluation_that_is_not_normalized_is_told():
    """Means are near, as those of digits are: the scale tells it."""
    run = make_run(*SMALL)
    assert inputs(Subject.of(run)).verdict is Verdict.good
    loader = run.loaders["val"]
    raw = loader.split.fetch(torch.arange(len(loader.split)))["image"].float() / 255
    loader.transform = lambda batch, epoch: {**batch, "image": batch["image"].float() / 255}
    assert float(raw.mean()) < 1.0
    found = inputs(Subject.of(run))
    assert found.verdict is Verdict.watch and "times the deviation" in found.evidence


def test_an_image_that_is_not_looked_at_is_told():
    run = make_run(*SMALL, "norm=none")
    first = next(module for module in run.model.modules() if isinstance(module, nn.Conv2d))
    first.register_forward_hook(lambda module, args, output: torch.ones_like(output))
    assert input_matters(Subject.of(run)).verdict is Verdict.bad


@pytest.mark.parametrize(
    ("typed", "check"),
    [
        (("optim=sgd", "optim.lr=1000"), "learning rate"),
        (("init=zeros",), "gradients arrive"),
        (("init=zeros",), "learns by heart"),
        (("init=normal", "init.std=2", "norm=none"), "loss at the start"),
    ],
)
def test_what_keeps_a_network_from_learning_is_told(typed: tuple[str, ...], check: str):
    assert verdicts(make_run(*SMALL, *typed))[check] in (Verdict.watch, Verdict.bad, Verdict.unknown)


def image(seed: int) -> Tensor:
    random = np.random.default_rng(seed)
    smooth = Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8)).resize((24, 24), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(smooth)).permute(2, 0, 1).contiguous()


def split(images: list[Tensor]) -> TensorSplit:
    return TensorSplit(torch.stack(images), {"label": torch.zeros(len(images), dtype=torch.long)}, "x")


def saved_again(picture: Tensor, path: Path) -> Tensor:
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path, quality=90)
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).contiguous()


def test_copies_are_counted_exactly_and_nearly(tmp_path: Path):
    train = [image(seed) for seed in range(30)]
    turned = torch.rot90(train[5], 1, (1, 2)).contiguous()
    mirrored = train[6].flip(2)
    test = [image(100), train[3], turned, mirrored, saved_again(train[7], tmp_path / "x.jpg"), image(101)]
    found = copies({"train": split(train), "val": split([image(200), image(201)]), "test": split(test)}, seed=0)
    assert (found.exact, found.near, found.looked, found.judged) == (1, 4 - 1, 38, 8)
    assert found.example == "test 1 and train 3"


def test_images_within_one_split_may_be_alike():
    same = [image(1)] * 5
    found = copies({"train": split(same), "val": split([image(2)]), "test": split([image(3)])}, seed=0)
    assert (found.exact, found.near) == (0, 0)


def test_the_verb(cli: Cli):
    answer = cli("check", *SMALL, "data.limit=64", "trainer.device=cpu", "--json")
    assert answer.code == 0, answer.err
    found = {row["check"]: row["verdict"] for row in json.loads(answer.out)["findings"]}
    assert found["loss at the start"] == "good" and len(found) == 12
    assert not list(Path().iterdir()), "nothing is written"
    strict = cli("check", *SMALL, "data.limit=64", "init=zeros", "--strict")
    assert strict.code == 2 and "learns by heart" in strict.err
    assert "→" in strict.out


# ---- before training ----

TRAIN = (
    "train",
    *SMALL,
    "data.limit=60",
    "trainer.batch_size=20",
    "trainer.epochs=2",
    "trainer.device=cpu",
    "trainer.threads=1",
    "trainer.precision=fp32",
    "trainer.log_every=1",
    "trainer.progress=false",
    "optim=momentum",
    "regularization.dropout=0.2",
    "augment=[crop,noise]",
)


def kept(folder: str) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    state = checkpoint.load(Path(folder) / "checkpoints" / "last.pt")
    state.pop("clock"), state["observer"].pop("overhead", None)
    state["origin"].pop("identity", None)
    state["records"].pop("events", None)  # named by the time
    return state, list(read_records(Path(folder) / "metrics.jsonl")), RunDir(folder).read()


def test_a_run_after_its_check_is_the_run_without_it(cli: Cli):
    assert cli(*TRAIN, "hydra.run.dir=without").code == 0
    answer = cli(*TRAIN, "check=true", "hydra.run.dir=with")
    assert answer.code == 0 and "gradients arrive" in answer.out
    (state, records, told), (other, same, checked) = kept("without"), kept("with")
    assert differences(state, other) == [] and records == same
    assert told["config_hash"] == checked["config_hash"] and told["metrics"] == checked["metrics"]
    assert "check" not in told and {row["check"]: row["verdict"] for row in checked["check"]}["targets"] == "good"
    again = cli("train", "resume=with", "trainer.epochs=3")
    assert again.code == 0 and "gradients arrive" not in again.out


def test_what_is_bad_is_told_and_stops_only_where_that_was_asked_for(cli: Cli):
    wrong = ("init=zeros", "norm=none", "optim=sgd", "regularization.dropout=0", "trainer.epochs=1")
    told = cli(*TRAIN, *wrong, "check=true", "hydra.run.dir=told")
    assert told.code == 0 and "bad" in told.out
    strict = cli(*TRAIN, *wrong, "check=strict", "hydra.run.dir=strict")
    assert strict.code == 2 and "check=strict: " in strict.err and "check=true" in strict.err
    record = RunDir("strict").read()
    assert record["status"] == "failed" and any(row["verdict"] == "bad" for row in record["check"])
    assert not Path("strict/metrics.jsonl").exists()
    assert cli("train", "check=perhaps").code == 2


def test_a_sweeps_cells_are_checked_one_by_one(cli: Cli):
    answer = cli(*TRAIN, "trainer.max_steps=1", "check=strict", "init=he,zeros", "norm=none", "-m", "hydra.sweep.dir=s")
    assert answer.code == 1
    cells = json.loads(Path("s/sweep.json").read_text())["cells"]
    assert [cell["status"] for cell in cells] == ["completed", "failed"]
