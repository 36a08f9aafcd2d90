"""Heads: which one a task gets, in the classifier's place or beside it; what does not fit is refused in words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cli_runs import Answer
from lab_runs import composed, fitted, make_run, watched
from torch import nn

from cnnlab.building.trial import check, checked, headed
from cnnlab.composing.composer import Composer
from cnnlab.errors import ConfigError
from cnnlab.heads import LinearClassifier, NearestDecoder, UnpoolDecoder
from cnnlab.inspect.layers import head_parameters
from cnnlab.models.cnn import CNN
from cnnlab.protocols import DataSpec, Features

SCENES = (
    "data=shapes", "data.limit=null", "data.train=16", "data.val=8", "data.test=8", "data.size=16",
    "trainer.batch_size=8",
)  # fmt: skip
SEGMENTS = (*SCENES, "task=segmentation")
SMALL_CNN = ("model=cnn", "model.widths=[8,16]")


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check(composed(*overrides))
    (problem,) = caught.value.problems
    return problem


# ---- built as the experiment says ----


@pytest.mark.parametrize("head", ["unpool", "nearest"])
def test_a_decoder_has_the_experiments_own_norm_and_activation(head: str):
    run = make_run(*SEGMENTS, *SMALL_CNN, f"head={head}", "norm=group", "activation=gelu")
    kinds = {type(module) for module in run.model.head.modules()}
    assert {nn.GroupNorm, nn.GELU} <= kinds and not {nn.BatchNorm2d, nn.ReLU} & kinds
    plain = make_run(*SEGMENTS, *SMALL_CNN, f"head={head}")
    assert {nn.BatchNorm2d, nn.ReLU} <= {type(module) for module in plain.model.head.modules()}


def test_without_norm_layers_a_decoders_convolutions_have_biases():
    head = make_run(*SEGMENTS, *SMALL_CNN, "norm=none").model.head
    assert all(module.bias is not None for module in head.modules() if isinstance(module, nn.Conv2d))
    with_norm = make_run(*SEGMENTS, *SMALL_CNN, "norm=batch").model.head
    assert [m.bias is None for m in with_norm.modules() if isinstance(m, nn.Conv2d)] == [True, True, False]


def test_a_classifier_of_our_choice_stands_in_the_models_place():
    run = fitted(*SCENES, "model=vgg", "head=linear", "trainer.epochs=1")
    assert isinstance(run.model.head, LinearClassifier)
    assert head_parameters(run.model) == {"head.fc.weight", "head.fc.bias"}
    assert not any(name.startswith("classifier") for name, _ in run.model.named_parameters())
    maps = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    head = LinearClassifier((8, 3), 5)
    expected = maps.mean((2, 3)) @ head.fc.weight.T + head.fc.bias
    torch.testing.assert_close(head(Features((maps,)))["logits"], expected)


# ---- beside the classifier ----


def test_a_head_beside_the_classifier_gives_what_each_would_alone():
    model = CNN(num_classes=5, in_channels=3, image_size=(16, 16), widths=(4, 8)).eval()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    alone = model(images)["logits"]
    head = NearestDecoder(model.stage_channels, (16, 16), 7).eval()
    model.add_head(head)
    both = model(images)
    assert torch.equal(both["logits"], alone)
    assert torch.equal(both["mask"], head(model.features(images))["mask"])
    names = {name for name, _ in model.named_parameters()}
    assert head_parameters(model) == {name for name in names if name.startswith(("head.", "classifier."))}
    model.replace_head(UnpoolDecoder(model.stage_channels, model.pool_channels, (16, 16), 7))
    assert model.eval()(images).keys() == {"mask"}


# ---- what does not fit ----


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("head=unpool", *SCENES, *SMALL_CNN), "reads logits, and UnpoolDecoder gives mask; type head=auto"),
        (("head=linear", *SEGMENTS, *SMALL_CNN), "Segmentation reads mask, and LinearClassifier gives logits"),
        (("head=unpool", *SEGMENTS), "hands on no max-pooling indices; type model=vgg, or head=nearest"),
        (("head=nearest", *SEGMENTS, "model=mlp"), "whose layers have no places left"),
        (("head=nearest", *SEGMENTS, "model=vgg", "norm=instance"), "NearestDecoder cannot read what VGG gives"),
        (("head=nearest", *SEGMENTS, "norm=group", "norm.groups=4", "head.width=6"), "expected a number of groups"),
    ],
)  # fmt: skip
def test_a_head_that_does_not_fit_is_refused(overrides: tuple[str, ...], words: str):
    problem = refusal(*overrides)
    assert problem.startswith("`head`") and words in problem


def test_a_plain_module_takes_no_head(outside_composer: Composer):
    with pytest.raises(ConfigError, match="expected a network with feature stages"):
        checked(outside_composer, ["model=outside", "head=linear"])


def test_a_head_must_be_one(outside_composer: Composer):
    with pytest.raises(ConfigError, match="expected a cnnlab.protocols.Head, received Identity"):
        checked(outside_composer, ["head={_target_: torch.nn.Identity}"])


def test_a_head_that_looks_at_values_is_left_to_the_first_batch():
    class Peeking(nn.Identity):
        def forward(self, features: Features) -> dict[str, torch.Tensor]:
            return {"logits": features.stages[-1].mean((2, 3)) * float(features.stages[-1].max().item() >= 0)}

    with torch.device("meta"):
        model = CNN(num_classes=5, in_channels=3, image_size=(16, 16), widths=(4, 5))
    model.replace_head(Peeking())
    headed(model, DataSpec(3, (16, 16), tuple("abcde")))
    assert isinstance(model.head, Peeking), "taken as it is, without a trial"


# ---- from outside ----


def test_a_head_from_outside(cli: Callable[..., Answer], outside_folder: str):
    few = ("trainer.device=cpu", "trainer.threads=1", "trainer.epochs=1", "hydra.run.dir=here")
    answer = cli("train", "--config-dir", outside_folder, "head=outside", "head.hidden=5", *SMALL_CNN, *few)
    assert answer.code == 0, answer.err
    assert cli("eval", "here", "--config-dir", outside_folder).code == 0
    wrong = cli("train", "--config-dir", outside_folder, "head=outside", "head.hiden=5")
    assert (wrong.code, "did you mean `hidden`" in wrong.err) == (2, True)


def test_a_task_of_several_losses_with_its_head_from_outside(outside_composer: Composer):
    """The classifier stays, the box head stands beside it, and each loss is recorded by its name."""
    from lab_runs import Recorded

    from cnnlab.building.builder import build
    from cnnlab.train import fit

    narrow = ("model.width=4", "trainer.epochs=2", "trainer.device=cpu", "trainer.threads=1", "trainer.precision=fp32")
    overrides = [*SCENES, *narrow, "task=outside_boxes", "task.weights.box=3", "task.views=mirror", "augment=flip"]
    run, said = build(checked(outside_composer, overrides)), Recorded()
    assert {name.partition(".")[0] for name in head_parameters(run.model)} == {"head", "fc"}
    run.listeners.insert(0, said)
    metrics = fit(run)
    for record in said.records:
        whole = record["data_loss/class"] + 3 * record["data_loss/box"]
        assert record["data_loss"] == pytest.approx(whole, rel=1e-5)
        assert 0 <= record["box_error"] <= 1
    assert {record["split"] for record in said.records} == {"train", "val", "test"}
    assert "test/data_loss/box" in metrics
    batch, _ = next(run.loaders["val"].batches(0))
    assert set(batch) == {"image", "index", "label", "box"}


def test_a_task_of_one_loss_records_no_parts():
    _, said = watched(*SCENES, "trainer.epochs=1")
    assert not any("/" in name for record in said.records for name in record)
