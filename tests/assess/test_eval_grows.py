"""What `cnnlab eval` tells beyond the metrics, on small runs of the three tasks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_runs import Answer
from lab_runs import fitted
from PIL import Image

Cli = Callable[..., Answer]
SHAPES = ("data=shapes", "data.train=60", "data.val=12", "data.test=20", "data.limit=null", "data.size=16")
TASKS = {
    "classification": (),
    "segmentation": ("task=segmentation", "model=cnn", "model.widths=[4,8]"),
    "localization": ("task=localization", "model=cnn", "model.widths=[4,8]"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, float]]]:
    made: dict[str, tuple[Path, dict[str, float]]] = {}

    def get(task: str) -> tuple[Path, dict[str, float]]:
        if task not in made:
            folder = tmp_path_factory.mktemp(task) / "run"
            made[task] = folder, fitted(*SHAPES, *TASKS[task], "trainer.epochs=1", folder=folder).metrics
        return made[task]

    return get


def evaluated(cli: Cli, *words: str) -> dict[str, Any]:
    answer = cli("eval", *words, "--json")
    assert answer.code == 0, answer.err
    return json.loads(answer.out)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("task", TASKS)
def test_all_of_it_and_the_metrics_stay_what_they_were(task: str, runs: Any, cli: Cli, tmp_path: Path):
    folder, metrics = runs(task)
    before = contents(folder)
    plain = evaluated(cli, str(folder))
    assert {name: plain[name] for name in metrics} == pytest.approx(metrics, rel=1e-6)
    assert contents(folder) == before, "an evaluation leaves the folder as it is"
    monitor = {"classification": "accuracy", "segmentation": "mean_iou", "localization": "accuracy_at_iou_50"}[task]
    low, high = plain["intervals"][f"test/{monitor}"]
    assert low <= plain[f"test/{monitor}"] <= high
    assert sum(row["count"] for row in plain["calibration"]["bins"]) == (20 * 256 if task == "segmentation" else 20)
    assert (plain["calibration"]["ece_if_calibrated"] is None) is (task == "segmentation")

    out = tmp_path / "out"
    whole = evaluated(
        cli, str(folder), "--figures", "--robustness", "--top-losses", "3", "--out", str(out), "--samples", "99"
    )
    assert {name: whole[name] for name in plain} == plain
    assert contents(folder) == before
    robust = whole["robustness"]
    assert robust["metric"] == f"test/{monitor}" and robust["samples"] == 20
    assert robust["clean"] == pytest.approx(plain[f"test/{monitor}"], rel=1e-6)
    assert all(len(row["values"]) == 5 for row in robust["corruptions"].values())
    losses = [row["loss"] for row in whole["top_losses"]]
    assert losses == sorted(losses, reverse=True)
    drawn = {Path(path).name for path in whole["pictures"]}
    wanted = {"eval-confusion.png", "eval-calibration.png", "eval-robustness.png", "eval-top-losses.png"}
    assert drawn == wanted | (set() if task == "classification" else {"eval-iou.png"})
    for name in drawn:
        with Image.open(out / name) as picture:
            assert picture.width > 300 and len(picture.convert("RGB").getcolors(1 << 24)) > 20
    assert json.loads((out / "evaluation.json").read_text()) == whole


def test_the_hardest_are_those_of_the_highest_loss(runs: Any, cli: Cli):
    folder, metrics = runs("classification")
    rows = evaluated(cli, str(folder), "--top-losses", "20", "--out", "hardest")["top_losses"]
    assert sorted(row["index"] for row in rows) == list(range(20))
    assert np.mean([row["loss"] for row in rows]) == pytest.approx(metrics["test/data_loss"], rel=1e-5)
    accuracy = np.mean([row["label"] == row["predicted"] for row in rows])
    assert accuracy == pytest.approx(metrics["test/accuracy"])
    wrong = [row for row in rows if row["label"] != row["predicted"]]
    assert all(row["loss"] >= -math.log(1 - row["probability"]) - 1e-4 for row in wrong)


def test_a_network_without_maps_has_its_hardest_images_alone(cli: Cli, tmp_path: Path):
    folder = tmp_path / "run"
    fitted(*SHAPES, "model=mlp", "model.hidden=[8]", "trainer.epochs=1", folder=folder)
    answer = cli("eval", str(folder), "--top-losses", "2")
    assert answer.code == 0 and "no maps beside the images" in answer.err
    assert (folder / "figures" / "eval-top-losses.png").is_file()


def test_tables(runs: Any, cli: Cli):
    folder, _ = runs("classification")
    answer = cli("eval", str(folder), "--per-class", "--robustness", "--samples", "6")
    lines = answer.out.splitlines()
    (heading,) = [line for line in lines if line.startswith("class ")]
    assert heading.split()[:2] == ["class", "samples"] and heading.count("95 %") == 3 and "F1" in heading
    (noise,) = [line for line in lines if line.startswith("noise ") and "x + 255" not in line]
    assert len(noise.split()) == 8
    assert any("test/accuracy, 6 samples" in line for line in lines)
    assert any(line.startswith("calibration error") for line in lines)
    masks, _ = runs("segmentation")
    assert "IoU" in cli("eval", str(masks), "--per-class").out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--samples", "5"], "is of --robustness"),
        (["--top-losses", "0"], "from 1 on"),
        (["--out", "there"], "type --figures or --top-losses"),
        (["--robustnes"], "did you mean `--robustness`"),
    ],
)
def test_flags_that_go_for_nothing_are_refused(runs: Any, cli: Cli, words: list[str], said: str):
    answer = cli("eval", str(runs("classification")[0]), *words)
    assert answer.code == 2 and said in answer.err


def test_figures_without_matplotlib_say_what_to_type(runs: Any, cli: Cli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cnnlab.sinks.figures.can_draw", lambda: False)
    answer = cli("eval", str(runs("classification")[0]), "--figures")
    assert answer.code == 2 and "pip install 'cnnlab[figures]'" in answer.err


def test_classes_of_other_data_have_their_own_names(cli: Cli, tmp_path: Path):
    """`b` is the network's second class and the other data's first: what fails is told by its name."""
    for root, classes in (("photos", "abc"), ("fewer", "bc")):
        for name in classes:
            for number in range(8):
                path = tmp_path / root / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.random.default_rng(number + 50 * ord(name)).integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(path)
    folder = tmp_path / "run"
    data = ("data=folder", "data.limit=null", "data.size=8", f"data.cache={tmp_path}")
    fitted(*data, f"data.root={tmp_path / 'photos'}", "trainer.epochs=1", folder=folder)
    other = ("data=folder", f"data.root={tmp_path / 'fewer'}", "data.val=0.25", "data.test=0.5")
    found = evaluated(cli, str(folder), *other, "--top-losses", "8")
    assert [row["label"] for row in found["top_losses"]] == [row["sample"][0] for row in found["top_losses"]]
    assert {row["label"] for row in found["top_losses"]} == {"b", "c"}
    assert [row["samples"] for row in found["classes"]] == [0, 4, 4]
    assert found["classes"][0]["recall_interval"] is None and found["classes"][1]["recall_interval"] is not None
    (tmp_path / "fewer" / "c").rename(tmp_path / "fewer" / "d")
    refused = cli("eval", str(folder), *other)
    assert refused.code == 5 and "does not know d" in refused.err


def test_names_with_formulas_and_foreign_letters_are_drawn_as_they_are():
    from cnnlab.assess.figures import confusion
    from cnnlab.sinks.figures import _png

    names = ["$x^2$", "猫", "a" * 80, "$broken"]
    figure = confusion(torch.eye(4) * 1500, names, "images")
    assert _png(figure)
    ticks = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert ticks[0] == "$x^2$" and not figure.axes[0].get_xticklabels()[0].get_parse_math()
