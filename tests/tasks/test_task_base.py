"""What every task has without saying so: its view of the data, the sum of its losses, merging, predictions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_runs import Answer
from lab_runs import all_state, composed, differences, fitted, make_run, watched
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from cnnlab.building.trial import check
from cnnlab.protocols import VOID, Batch, DataSpec, Outputs
from cnnlab.runs import checkpoint
from cnnlab.runs.folder import RunDir, config_hash, write_yaml
from cnnlab.sinks.samples import SamplePictures
from cnnlab.sinks.tensorboard import TensorBoard
from cnnlab.tasks import Task
from cnnlab.tasks.classification import Classification
from cnnlab.tasks.segmentation import Segmentation
from cnnlab.train import fit

SCENES = (
    "data=shapes", "data.limit=null", "data.train=16", "data.val=8", "data.test=8", "data.size=16",
    "trainer.batch_size=8",
)  # fmt: skip
SPEC = DataSpec(3, (4, 4), ("cat", "dog"), frozenset({"label", "mask"}), ("sky", "road", "tree"))


class Two(Task):
    """The one method that has no default."""

    def losses(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"sum": outputs["logits"].sum(1), "square": outputs["logits"].square().sum(1)}


def no_loss(logits: Tensor, target: Tensor) -> Tensor:
    return logits.new_zeros(len(logits))


# ---- a task sees what it needs ----


def test_a_target_that_nobody_reads_hinders_nobody(cli: Callable[..., Answer]):
    """Shapes have masks and boxes, which mixup cannot mix, and classification does not read."""
    overrides = (*SCENES, "augment=mixup")
    check(composed(*overrides))
    assert cli("summary", *SCENES, "augment=mixup", "model.width=4").code == 0
    run = fitted(*overrides, "trainer.epochs=1")
    assert run.spec.targets == {"label"}
    for loader in run.loaders.values():
        batch, _ = next(loader.batches(0))
        assert set(batch) == set(loader.some(3)) == {"image", "index", "label"}


def test_a_task_that_reads_the_mask_does_not_take_mixed_labels():
    from cnnlab.errors import ConfigError

    with pytest.raises(ConfigError, match="mixes labels only"):
        check(composed(*SCENES, "task=segmentation", "augment=mixup"))


def test_the_spec_for_some_targets():
    assert SPEC.only(["mask"]).targets == {"mask"}
    assert SPEC.only(["mask"]).mask_classes == SPEC.mask_classes
    with pytest.raises(ValueError, match="needs box, and this data has only label, mask"):
        SPEC.only(["label", "box"])


def test_the_classes_of_a_run_are_those_of_its_task():
    assert make_run(*SCENES).facts["classes"].startswith("6 (circle, square,")
    assert make_run(*SCENES, "task=segmentation").facts["classes"].startswith("7 (background, circle,")


# ---- losses by name ----


def test_the_loss_is_the_weighted_sum_and_each_is_told_as_it_is():
    outputs = {"logits": torch.tensor([[1.0, 2.0], [3.0, -1.0]])}
    found = Two(no_loss, SPEC, {"square": 0.5}).loss(outputs, {})
    assert found["sum"].tolist() == [3, 2] and found["square"].tolist() == [5, 10]
    assert found["loss"].tolist() == [5.5, 7]


def test_a_task_tells_nothing_that_it_does_not_state():
    task = Two(no_loss, SPEC)
    assert (task.measure({}, {}), task.metrics({}), task.by_class({})) == ({}, {}, [])
    assert task.monitor == ("loss", "min") and task.initial_bias() is None
    image = torch.zeros(2, 3, 4, 4)
    assert task.views(image) == [(1.0, image)]
    assert set(task.pictures({"image": image})) == {"inputs"}


def test_the_parts_of_inceptions_loss_are_recorded():
    large = ("data.size=96", "trainer.batch_size=8", "model=inception_v3", "model.width=0.1", "stats=off")
    _, said = watched(*SCENES, *large, "trainer.max_steps=2", "trainer.log_every=1", "task.aux_weight=0.3")
    for record in said.records:
        if record["split"] == "train":
            whole = record["data_loss/main"] + 0.3 * record["data_loss/aux"]
            assert record["data_loss"] == pytest.approx(whole, rel=1e-5)
        else:
            assert not any(name.startswith("data_loss/") for name in record), "the second output is training's only"


# ---- views and predictions ----


def test_views_of_outputs_without_places_are_averaged():
    parts = [(0.75, {"logits": torch.tensor([[4.0, 0.0]])}), (0.25, {"logits": torch.tensor([[0.0, 8.0]])})]
    assert Two(no_loss, SPEC).merge(parts)["logits"].tolist() == [[3, 2]]


def test_a_mirrored_views_mask_is_mirrored_back():
    """Of a network that looks at each pixel alone, both views say the same."""
    task = Segmentation(no_loss, SPEC, views="mirror")
    image = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    (one, plain), (other, mirrored) = task.views(image)
    assert (one, other) == (0.5, 0.5) and torch.equal(mirrored, image.flip(-1))
    merged = task.merge([(one, {"mask": 2 * plain}), (other, {"mask": 2 * mirrored})])
    torch.testing.assert_close(merged["mask"], 2 * image)
    run = fitted(*SCENES, "task=segmentation", "task.views=mirror", "trainer.epochs=1")
    assert 0 <= run.metrics["test/mean_iou"] <= 1


def test_predictions_are_named_as_the_targets_are():
    outputs = {
        "logits": torch.tensor([[0.0, 2.0]]),
        "aux": torch.zeros(1, 2),
        "mask": torch.tensor([[[[0.0, 3.0]], [[1.0, 2.0]], [[-1.0, 9.0]]]]),
        "box": torch.tensor([[0.1, 0.2, 0.3, 0.4]]),
    }
    found = Two(no_loss, SPEC).predictions(outputs)
    assert set(found) == {"label", "probability", "mask", "box"}
    assert found["label"].tolist() == [1] and found["mask"].tolist() == [[[1, 2]]]
    assert found["probability"].item() == pytest.approx(1 / (1 + 2.718281828**-2))


# ---- pictures ----


def test_a_segmenters_picture_shows_image_truth_and_prediction():
    task = Segmentation(no_loss, SPEC)
    mask = torch.zeros(1, 64, 64, dtype=torch.int64)
    mask[:, :, 32:], mask[:, 0] = 1, VOID
    logits = torch.zeros(1, 3, 64, 64)
    logits[:, 2] = 1
    batch = {"image": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)), "mask": mask}
    assert set(task.pictures(batch)) == {"inputs", "masks"}
    picture = task.pictures(batch, {"mask": logits})["predictions"]
    assert picture.dtype is torch.uint8 and picture.shape[2] >= 3 * 64
    truth, predicted = picture[:, :64, 65:129], picture[:, :64, 130:194]
    colours = {tuple(truth[:, y, x].tolist()) for y, x in ((0, 0), (10, 5), (10, 60))}
    assert len(colours) == 3 and (0, 0, 0) in colours, "void is black, and classes are not"
    assert tuple(predicted[:, 10, 5].tolist()) not in colours and predicted.flatten(1).unique(dim=1).shape[1] == 1
    legend = picture[:, 64:]
    patches = {tuple(colour) for colour in legend.flatten(1).T.tolist()}
    assert {
        tuple(truth[:, 10, 5].tolist()),
        tuple(truth[:, 10, 60].tolist()),
        tuple(predicted[:, 1, 1].tolist()),
    } <= patches


def test_a_classifiers_picture_frames_what_is_right_and_what_is_not():
    task = Classification(no_loss, SPEC)
    batch = {"image": torch.rand(2, 1, 8, 8), "label": torch.tensor([1, 1])}
    picture = task.pictures(batch, {"logits": torch.tensor([[0.0, 5.0], [5.0, 0.0]])})["predictions"]
    first, second = picture[:, 0, 0].tolist(), picture[:, 0, 8 * 12 + 4 + 2].tolist()
    assert first[1] > first[0] and second[0] > second[1], "green, and red"


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_val_is_shown_with_predictions_and_the_run_stays_what_it_was(tmp_path: Path, task: str):
    overrides = (*SCENES, f"task={task}", "model=cnn", "trainer.epochs=5", "regularization=[ema,dropout]")
    if task == "segmentation":
        overrides = (*overrides[:-1], "regularization=ema")
    run = make_run(*overrides, folder=tmp_path / "shown")
    board = TensorBoard(RunDir(tmp_path / "shown").tensorboard)
    run.listeners += [board, SamplePictures(board)]
    fit(run)
    found = EventAccumulator(str(board.folder), {"images": 0})
    found.Reload()
    assert [event.step for event in found.Images("samples/predictions")] == [2, 4, 8, 10]
    plain = fitted(*overrides, folder=tmp_path / "plain")
    shown, bare = all_state(run), all_state(plain)
    for state in (shown, bare):
        state["records"].pop("events")  # sizes of TensorBoard's files, of which the plain run has none
    assert differences(shown, bare) == []
    assert run.metrics == plain.metrics


# ---- runs of an earlier version ----


def test_a_run_from_before_heads_is_read_and_goes_on(cli: Callable[..., Answer]):
    few = ("trainer.device=cpu", "trainer.threads=1", "model=cnn", "model.widths=[4,8]")
    assert cli("train", *SCENES, *few, "trainer.epochs=1", "hydra.run.dir=old").code == 0
    stored = Path("old/.hydra/config.yaml")
    config = RunDir("old").config()
    hashed = config_hash(config)
    del config["head"]
    write_yaml(stored, config)
    assert config_hash(config) == hashed == json.loads(Path("old/run.json").read_text())["config_hash"]
    assert cli("train", "resume=old", "trainer.epochs=2").code == 0


def test_the_decoder_was_once_a_setting_of_the_task(cli: Callable[..., Answer]):
    few = ("trainer.device=cpu", "trainer.threads=1", "model=cnn", "model.widths=[4,8]", "trainer.epochs=1")
    assert cli("train", *SCENES, *few, "task=segmentation", "head=nearest", "hydra.run.dir=old").code == 0
    config = RunDir("old").config()
    del config["head"], config["task"]["views"]
    config["task"]["upsample"] = "nearest"
    write_yaml(Path("old/.hydra/config.yaml"), config)
    for path in Path("old/checkpoints").glob("*.pt"):
        state = checkpoint.load(path)
        state["origin"]["identity"]["config"] = config_hash(config)
        checkpoint.save(state, path)
    answer = cli("eval", "old", "--json")
    assert answer.code == 0, answer.err
    assert (
        json.loads(answer.out)["test/mean_iou"]
        == json.loads(Path("old/run.json").read_text())["metrics"]["test/mean_iou"]
    )
