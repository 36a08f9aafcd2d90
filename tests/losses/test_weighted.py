"""A weighted sum of losses; class weights counted in pixels."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lab_runs import composed, make_run, watched
from torch.nn import functional

from cnnlab.building.trial import check
from cnnlab.errors import ConfigError
from cnnlab.losses import CrossEntropy, Dice, Focal, Weighted
from cnnlab.protocols import VOID

SCENES = (
    "data=shapes", "data.limit=null", "data.train=16", "data.val=8", "data.test=8", "data.size=16",
    "trainer.batch_size=8", "stats=off",
)  # fmt: skip
SEGMENTS = (*SCENES, "task=segmentation", "model=cnn", "model.widths=[8,16]")


def masks() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 4, (3, 6, 5), generator=generator)
    target[0, :2] = VOID
    return torch.randn(3, 4, 6, 5, generator=generator), target


def test_a_weighted_sum_is_that_of_its_parts():
    logits, target = masks()
    parts = {"cross_entropy": CrossEntropy, "dice": Dice, "focal": partial(Focal, variant="softmax", prior=None)}
    loss = Weighted(4, parts, {"cross_entropy": 0.5, "dice": 2.0, "focal": 0.0})
    apart = loss.apart(logits, target)
    assert set(apart) == {"cross_entropy", "dice"}
    valid = target != VOID
    entropy = functional.cross_entropy(logits, target, ignore_index=VOID, reduction="none")
    by_sample = (entropy * valid).sum((1, 2)) / valid.sum((1, 2))
    torch.testing.assert_close(apart["cross_entropy"], by_sample)
    torch.testing.assert_close(apart["dice"], Dice(4)(logits, target))
    torch.testing.assert_close(loss(logits, target), 0.5 * by_sample + 2 * apart["dice"])
    assert loss.expected_initial_loss() is None and loss.initial_bias(4) is None
    alone = Weighted(4, {"focal": Focal}, {"focal": 3.0})
    assert alone.expected_initial_loss() == pytest.approx(3 * Focal(4).expected_initial_loss())


def test_void_counts_in_no_part_and_a_sample_of_void_alone_has_loss_0():
    logits, target = masks()
    parts = {"cross_entropy": CrossEntropy, "dice": Dice, "focal": partial(Focal, variant="softmax", prior=None)}
    loss = Weighted(4, parts)
    other = logits.clone()
    other[0, :, :2] = 50 * torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loss(other, target), loss(logits, target))
    assert torch.equal(loss(logits, torch.full_like(target, VOID)), torch.zeros(3))


def test_parts_are_recorded_apart_before_their_weights():
    _, said = watched(*SEGMENTS, "loss=weighted", "loss.weights.dice=0.5", "trainer.epochs=1")
    assert {record["split"] for record in said.records} == {"train", "val", "test"}
    for record in said.records:
        whole = record["data_loss/cross_entropy"] + 0.5 * record["data_loss/dice"]
        assert record["data_loss"] == pytest.approx(whole, rel=1e-5)
        assert "data_loss/focal" not in record


def test_a_classifier_takes_a_weighted_sum_too():
    _, said = watched(*SCENES, "loss=weighted", "loss.weights={cross_entropy:1,dice:0,focal:1}", "trainer.epochs=1")
    assert {"data_loss/cross_entropy", "data_loss/focal"} <= set(said.records[0])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("loss.weights={cross_entropy:0,dice:0,focal:0}", "expected a weight above 0 for one of cross_entropy, dice"),
        ("+loss.weights.dise=1", "received one of dise"),
        ("loss.weights.dice=-1", "expected a mapping of names to a number >= 0"),
        ("loss.parts.dice.smoth=1", "did you mean `smooth`"),
        ("loss.parts.dice={_target_: torch.nn.ReLU, _partial_: true}", "loss.parts.dice"),
    ],
)
def test_what_a_weighted_sum_refuses(override: str, words: str):
    with pytest.raises(ConfigError) as caught:
        check(composed(*SEGMENTS, "loss=weighted", override))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("loss", "path"),
    [
        (("loss=cross_entropy", "loss.class_weights=balanced"), ()),
        (("loss=weighted", "loss.parts.cross_entropy.class_weights=balanced"), ("parts", "cross_entropy")),
    ],
)
def test_balanced_weights_of_masks_are_counted_in_pixels(loss: tuple[str, ...], path: tuple[str, ...]):
    run = make_run(*SEGMENTS, *loss)
    split = run.loaders["train"].split
    pixels = split.fetch(torch.arange(len(split)))["mask"].flatten()
    counts = torch.stack([(pixels == number).sum() for number in range(7)]).double()
    present = counts > 0
    expected = torch.where(present, counts.sum() / (present.sum() * counts), 1.0).float()
    criterion = run.task.criterion if not path else run.task.criterion.parts[path[1]]
    torch.testing.assert_close(criterion.weight, expected)
    (notice,) = [line for line in run.notices if line.startswith("loss:")]
    assert f"{int(counts.sum()):,} in 16 training masks: from background" in notice
    assert expected[criterion.weight.argmin()] == expected[0]


def test_masks_are_not_counted_where_nobody_asks():
    run = make_run(*SEGMENTS)
    assert run.task.criterion.weight is None and not any(line.startswith("loss:") for line in run.notices)
