"""A setting that was typed and does nothing is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_runs import Answer
from lab_runs import make_run
from PIL import Image

from cnnlab.composing.composer import Composer
from cnnlab.composing.experiment import Experiment
from cnnlab.composing.idle import idle
from cnnlab.data.choice import without_stream
from cnnlab.data.folder import ImageFolder
from cnnlab.data.splits import TensorSplit
from cnnlab.init import PaperAlexNet
from cnnlab.schema import Loading

Cli = Callable[..., Answer]


@pytest.mark.parametrize(
    "typed, others",
    [
        (["schedule=step", "schedule.warmup_start=0.5"], "schedule.warmup is null"),
        (["optim.dampening=0.5"], "optim.momentum is 0.0"),
        (["optim=adam", "optim.decoupled_weight_decay=true"], "optim.weight_decay is 0.0"),
        (["stats=off", "stats.samples=4"], "stats.enabled is false"),
        (["stats=off", "stats.every=4"], "stats.enabled is false"),
        (["stats=off", "stats.max_overhead=null"], "stats.enabled is false"),
        (["stats=off", "stats.max_records=9"], "stats.enabled is false"),
        (["stats=off", "probe=[gradients]"], "stats.enabled is false; type stats=default"),
        (["trainer.checkpoint=false", "trainer.checkpoint_minutes=1"], "trainer.checkpoint is false"),
        (
            ["groups.decay_norm_and_bias=true"],
            "optim.weight_decay is 0.0 and regularization.decoupled_decay is 0.0",
        ),
        (["optim=lbfgs", "groups.decay_norm_and_bias=true"], "regularization.decoupled_decay is 0.0"),
    ],
)
def test_what_acts_only_beside_another_one_that_is_off_is_told(
    shared_composer: Composer, typed: list[str], others: str
):
    key, _, value = typed[-1].partition("=")
    said = f"`{key}`" if key == "probe" else f"`{typed[-1]}`"
    assert idle(Experiment.of(shared_composer.compose(typed))) == [f"{said} has no effect while {others}"]


@pytest.mark.parametrize(
    "typed",
    [
        ["schedule=cosine", "schedule.warmup_start=0.5"],
        ["optim=momentum", "optim.dampening=0.5", "optim.nesterov=false"],
        ["optim=adam", "optim.decoupled_weight_decay=true", "optim.weight_decay=.1"],
        ["optim=adamw", "groups.decay_norm_and_bias=true"],
        ["groups.decay_norm_and_bias=true", "regularization=decoupled_decay"],
        ["schedule=step", "schedule.warmup_start=0.01"],
        ["optim.dampening=0"],
        ["stats.every=4", "probe=[gradients]"],
        ["stats=off"],
    ],
)
def test_what_acts_or_is_so_anyway_is_not(shared_composer: Composer, typed: list[str]):
    assert idle(Experiment.of(shared_composer.compose(typed))) == []


def test_a_run_and_the_summary_say_so(cli: Cli):
    assert "`optim.dampening=0.5` has no effect while optim.momentum is 0.0" in make_run("optim.dampening=0.5").notices
    told = " ".join(cli("summary", "model.width=4", "optim.dampening=0.5").out.split())
    assert "`optim.dampening=0.5` has no effect while optim.momentum is 0.0" in told


def test_the_biases_of_an_init_that_a_network_lacks_are_told():
    bare = torch.nn.Sequential(*(torch.nn.Conv2d(2, 2, 3, bias=False) for _ in range(5)), torch.nn.Linear(2, 2))
    assert ["`init.bias=0.5` has no effect" in line for line in PaperAlexNet(bias=0.5).notices(bare)] == [True]
    bare[1] = torch.nn.Conv2d(2, 2, 3)
    assert PaperAlexNet(bias=0.5).notices(bare) == []
    assert any("`init.bias=1` has no effect" in line for line in make_run("init=alexnet_2012", "model=cnn").notices)


def test_settings_of_a_stream_are_told_where_nothing_streams():
    split = TensorSplit(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), {}, "x")
    told = "data: `loading.workers=4` has no effect, as no image is decoded anew each epoch"
    assert without_stream(Loading(workers=4), split) == [told]
    assert without_stream(Loading(), split) == []
    assert told in make_run("loading.workers=4").notices


def test_a_fraction_of_a_split_that_is_there_is_told(tmp_path: Path):
    for number in range(10):
        path = tmp_path / "photos" / ("val" if number < 2 else "train") / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(path)
    data = ImageFolder(str(tmp_path / "photos"), val=0.3, test=0.4, cache=str(tmp_path / "cache"))
    data.load()
    told = [line for line in data.findings.notices if "no effect" in line]
    assert told == ["data: `data.val=0.3` has no effect, as there is a val split"]
    data = ImageFolder(str(tmp_path / "photos"), test=0.4, cache=str(tmp_path / "cache"))
    data.load()
    assert not [line for line in data.findings.notices if "no effect" in line]
    assert data.train_samples() == len(data.load()["train"])
