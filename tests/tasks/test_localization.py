"""Localization: losses by name, what counts where an object has left the frame, views, pictures, learning."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_runs import Answer
from lab_runs import all_state, composed, differences, fitted, interrupted_at, make_run, resume_run, watched
from torch import Tensor

from cnnlab.building.trial import check
from cnnlab.errors import ConfigError
from cnnlab.losses import CrossEntropy
from cnnlab.protocols import DataSpec
from cnnlab.tasks.localization import Localization
from cnnlab.train import fit

SCENES = (
    "data=shapes", "data.limit=null", "data.train=16", "data.val=8", "data.test=8", "data.size=16",
    "trainer.batch_size=8", "task=localization",
)  # fmt: skip
SMALL_CNN = ("model=cnn", "model.widths=[8,16]")
SPEC = DataSpec(3, (8, 16), ("cat", "dog"), frozenset({"label", "box"}))


def task(**settings: float | str) -> Localization:
    return Localization(CrossEntropy(2), SPEC, **settings)  # type: ignore[arg-type]


def sample(*boxes: tuple[float, ...], labels: tuple[int, ...]) -> dict[str, Tensor]:
    return {"image": torch.rand(len(boxes), 3, 8, 16), "box": torch.tensor(boxes), "label": torch.tensor(labels)}


def said_of(*boxes: tuple[float, ...], labels: tuple[int, ...]) -> dict[str, Tensor]:
    return {"box": torch.tensor(boxes), "logits": torch.nn.functional.one_hot(torch.tensor(labels), 2) * 4.0}


def test_the_loss_is_the_weighted_sum_of_its_parts():
    batch, outputs = sample((0, 0, 0.4, 0.5), labels=(0,)), said_of((0.2, 0, 0.6, 0.5), labels=(0,))
    found = task(class_weight=2, mse=3, smooth_l1=5, giou=7).loss(outputs, batch)
    assert set(found) == {"loss", "class", "box_mse", "box_smooth_l1", "box_giou"}
    parts = [found[name].item() for name in ("class", "box_mse", "box_smooth_l1", "box_giou")]
    assert parts[1:] == pytest.approx([0.02, 0.075, 2 / 3])
    assert found["loss"].item() == pytest.approx(2 * parts[0] + 3 * parts[1] + 5 * parts[2] + 7 * parts[3])
    assert set(task(mse=1, smooth_l1=0, giou=0).loss(outputs, batch)) == {"loss", "class", "box_mse"}


def test_a_localizer_without_a_loss_of_the_box_is_refused():
    with pytest.raises(ConfigError, match=r"a weight above 0 for a loss of the box, received none; type task.giou=1"):
        check(composed(*SCENES, "task.smooth_l1=0", "task.giou=0"))


def test_data_without_boxes_is_refused():
    with pytest.raises(ConfigError, match="Localization needs box, and this data has only label"):
        check(composed("task=localization"))


@pytest.mark.parametrize("mixing", ["mixup", "cutmix"])
def test_boxes_are_not_mixed(mixing: str):
    with pytest.raises(ConfigError, match="mixes labels only"):
        check(composed(*SCENES, f"augment={mixing}"))


def test_what_is_measured():
    """Right and found; right, and too far off; found, and the wrong class; found, of the other class."""
    truth = (0.0, 0.0, 0.5, 0.5)
    batch = sample(truth, truth, truth, truth, labels=(0, 0, 0, 1))
    outputs = said_of(truth, (0.25, 0, 0.75, 0.5), (0, 0, 0.5, 0.4), (-0.5, -0.5, 0.5, 0.5), labels=(0, 0, 1, 1))
    sums = task().measure(outputs, batch)
    found = task().metrics(sums)
    assert found["accuracy"] == 0.75 and found["accuracy_at_iou_50"] == 0.5 and found["outside"] == 0
    assert found["mean_iou"] == pytest.approx((1 + 1 / 3 + 0.8 + 1) / 4), "what lies outside the image is cut off"
    cat, dog = task().by_class(sums)
    assert cat["iou"] == pytest.approx((1 + 1 / 3 + 0.8) / 3) and cat["found"] == pytest.approx(1 / 3)
    assert (dog["iou"], dog["found"], dog["samples"]) == (1, 1, 1)
    halves = [task().measure({k: v[i : i + 2] for k, v in outputs.items()}, {k: v[i : i + 2] for k, v in batch.items()})
              for i in (0, 2)]  # fmt: skip
    assert task().metrics({name: halves[0][name] + halves[1][name] for name in sums}) == pytest.approx(found)


def test_an_object_outside_the_frame_teaches_its_class_alone():
    inside, gone = (0.0, 0.0, 0.5, 0.5), (0.0, 0.0, 0.0, 0.0)
    batch, outputs = sample(inside, gone, labels=(0, 1)), said_of((0, 0, 0.5, 0.4), (0.1, 0.1, 0.9, 0.9), labels=(0, 1))
    outputs["box"].requires_grad_()
    found = task(mse=1).loss(outputs, batch)
    assert [found[name][1].item() for name in ("box_mse", "box_smooth_l1", "box_giou")] == [0, 0, 0]
    assert found["class"][1] > 0 and found["box_giou"][0] > 0
    found["loss"].sum().backward()
    assert outputs["box"].grad[1].tolist() == [0, 0, 0, 0] and outputs["box"].grad[0].abs().sum() > 0
    sums = task().measure(outputs, batch)
    figures = task().metrics(sums)
    assert figures["outside"] == 0.5 and figures["mean_iou"] == pytest.approx(0.8) and figures["accuracy"] == 1
    assert task().by_class(sums)[1]["iou"] is None


@pytest.mark.parametrize("kind", ["none", "mirror", "mirror_translate"])
def test_each_views_box_is_moved_back_before_they_are_averaged(kind: str):
    """Of a network that finds the bright rectangle exactly, all views say the same."""
    image = torch.zeros(1, 3, 8, 16)
    image[..., 2:5, 3:9] = 1
    truth = torch.tensor([[3 / 16, 2 / 8, 9 / 16, 5 / 8]])
    localizer = task(views=kind)

    def seen(view: Tensor) -> Tensor:
        rows, columns = view[0, 0].nonzero().T
        sides = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        return (sides / torch.tensor([16, 8, 16, 8]))[None]

    views = localizer.views(image)
    merged = localizer.merge([(weight, {"box": seen(view), "logits": torch.ones(1, 2)}) for weight, view in views])
    assert len(views) == {"none": 1, "mirror": 2, "mirror_translate": 6}[kind]
    torch.testing.assert_close(merged["box"], truth)
    torch.testing.assert_close(merged["logits"], torch.ones(1, 2))


def test_predictions_lie_in_the_image():
    found = task().predictions(said_of((-0.2, 0.1, 1.3, 0.9), labels=(1,)))
    assert found["box"].tolist()[0] == pytest.approx([0, 0.1, 1, 0.9]) and found["label"].tolist() == [1]


def test_pictures_show_the_true_and_the_predicted_box():
    batch = sample((0.25, 0.25, 0.75, 0.75), (0, 0, 0, 0), labels=(0, 1))
    batch["image"] = torch.linspace(0.2, 0.6, 64).expand(2, 3, 64, 64)
    pictures = task().pictures(batch)
    assert set(pictures) == {"inputs", "boxes"}
    first = pictures["boxes"][:, :64, :64]
    assert first[:, 16, 16:48].min() == 255 and first[:, 17, 17:47].max() == 0, "white, with black inside"
    assert torch.equal(pictures["boxes"][:, :64, 65:], pictures["inputs"][:, :64, 65:]), "no box, nothing drawn"
    outputs = said_of((0, 0, 0.5, 0.5), (0, 0, 1, 1), labels=(0, 0))
    shown = task().pictures(batch, outputs)["predictions"][:, 2:66]
    green, red = shown[:, 0, 10].tolist(), shown[:, 0, 2 + 68 + 1 + 10].tolist()
    assert green[1] > green[0] and red[0] > red[1], "the class is right, and is not"
    assert shown[:, 16, 40].tolist() == [255, 255, 255]


def test_parts_of_the_loss_are_recorded_and_val_is_evaluated_with_views():
    run, said = watched(*SCENES, *SMALL_CNN, "task.mse=2", "task.views=mirror_translate", "trainer.epochs=2")
    for record in said.records:
        parts = [record[f"data_loss/{name}"] for name in ("class", "box_mse", "box_smooth_l1", "box_giou")]
        assert record["data_loss"] == pytest.approx(parts[0] + 2 * parts[1] + parts[2] + parts[3], rel=1e-5)
        assert 0 <= record["accuracy_at_iou_50"] <= record["accuracy"] <= 1 and 0 <= record["mean_iou"] <= 1
    assert run.selection.value is not None and "test/accuracy_at_iou_50" in run.metrics


def test_training_counts_the_objects_that_left_the_frame():
    _, said = watched(*SCENES, *SMALL_CNN, "augment=translate", "augment.translate.fraction=1", "trainer.epochs=1")
    shares = {record["split"]: record["outside"] for record in said.records}
    assert shares["train"] > 0.1 and shares["val"] == shares["test"] == 0


@pytest.mark.parametrize(
    "overrides", [("trainer.precision=bf16",), ("trainer.precision=fp16",), ("trainer.accumulate=2",)]
)
def test_it_trains_in_half_precision_and_in_pieces(overrides: tuple[str, ...]):
    run = fitted(*SCENES, *SMALL_CNN, *overrides, "trainer.max_steps=2")
    assert run.clock.step == 2


def test_a_resumed_run_is_the_same(tmp_path: Path):
    overrides = (*SCENES, *SMALL_CNN, "augment=[flip,rotate]", "regularization=ema", "trainer.epochs=3")
    whole = fitted(*overrides, folder=tmp_path / "whole")
    interrupted_at(3, *overrides, folder=tmp_path / "cut")
    resumed = resume_run(tmp_path / "cut")
    fit(resumed)
    assert differences(all_state(whole), all_state(resumed)) == [] and resumed.metrics == whole.metrics


def test_each_verb_takes_it(cli: Callable[..., Answer]):
    few = (*SCENES, *SMALL_CNN, "trainer.device=cpu", "trainer.threads=1", "trainer.epochs=1")
    assert cli("train", *few, "head=box_points", "hydra.run.dir=here").code == 0
    evaluated = cli("eval", "here", "--json")
    assert evaluated.code == 0, evaluated.err
    assert (
        json.loads(evaluated.out)["test/mean_iou"]
        == json.loads(Path("here/run.json").read_text())["metrics"]["test/mean_iou"]
    )
    told = cli("eval", "here")
    assert "accuracy_at_iou_50" in told.out and "IoU" in told.out
    summary = cli("summary", *few)
    assert summary.code == 0 and "head" in summary.out, summary.err


@pytest.mark.parametrize("model", ["resnet", "vgg", "alexnet", "inception", "speednet"])
def test_every_kind_of_backbone_takes_a_box_head(model: str):
    sizes = {"alexnet": 64, "inception": 32}
    run = make_run(*SCENES, f"model={model}", f"data.size={sizes.get(model, 32)}")
    batch, _ = next(run.batches())
    assert run.model(batch["image"])["box"].shape == (8, 4)


def test_a_weighted_sum_for_the_class_is_told_part_by_part():
    run, said = watched(*SCENES, *SMALL_CNN, "loss=weighted", "task.class_weight=2", "trainer.max_steps=2")
    parts = {name: 2 * weight for name, weight in run.task.criterion.weights.items()}
    record = said.records[0]
    whole = sum(weight * record[f"data_loss/{name}"] for name, weight in parts.items())
    boxes = record["data_loss/box_smooth_l1"] + record["data_loss/box_giou"]
    assert record["data_loss"] == pytest.approx(whole + boxes, rel=1e-5) and len(parts) > 1
