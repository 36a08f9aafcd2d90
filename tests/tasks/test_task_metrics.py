"""Metrics against scikit-learn, and what void and mixed targets do to them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from cnnlab.protocols import VOID, DataSpec
from cnnlab.tasks.classification import Classification
from cnnlab.tasks.metrics import by_class, confusion
from cnnlab.tasks.pictures import coloured, picture_grid
from cnnlab.tasks.segmentation import Segmentation

RANDOM = np.random.default_rng(0)


def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return logits.flatten(1).sum(1)


def classification(classes: int) -> Classification:
    return Classification(loss, DataSpec(3, (8, 8), tuple(map(str, range(classes)))))


def segmentation(classes: int) -> Segmentation:
    spec = DataSpec(3, (8, 8), ("a",), frozenset({"mask"}), tuple(map(str, range(classes))))
    return Segmentation(loss, spec)


def labels(classes: int, count: int, missing: int = 0) -> tuple[np.ndarray, np.ndarray]:
    target = RANDOM.integers(0, classes - missing, count)
    predicted = np.where(RANDOM.random(count) < 0.5, target, RANDOM.integers(0, classes, count))
    return target, predicted


def one_hot(predicted: np.ndarray, classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.from_numpy(predicted), classes).float()


@pytest.mark.parametrize("classes", [2, 7, 300])
def test_confusion_is_scikit_learns(classes: int):
    target, predicted = labels(classes, 2000)
    counts = confusion(torch.from_numpy(predicted), torch.from_numpy(target), classes)
    assert np.array_equal(counts.numpy(), sk.confusion_matrix(target, predicted, labels=range(classes)))


def test_what_became_of_each_class_is_scikit_learns():
    random = np.random.default_rng(0)
    target = random.integers(0, 4, 200)
    predicted = np.where(random.random(200) < 0.7, target, random.integers(0, 4, 200))
    found = by_class(confusion(torch.from_numpy(predicted), torch.from_numpy(target), 4), "abcd")
    precision, recall, _, count = sk.precision_recall_fscore_support(target, predicted)
    for name, wanted in (("precision", precision), ("recall", recall), ("samples", count)):
        assert [row[name] for row in found] == pytest.approx(wanted.tolist())
    assert [row["iou"] for row in found] == pytest.approx(sk.jaccard_score(target, predicted, average=None).tolist())


def test_a_class_that_never_occurs_has_no_rates():
    cat, dog, cow = by_class(torch.tensor([[3, 1, 0], [0, 2, 0], [0, 0, 0]]), ("cat", "dog", "cow"))
    assert (cat["recall"], cat["taken_for"]) == (0.75, "dog")
    assert (dog["precision"], dog["taken_for"]) == (pytest.approx(2 / 3), None)
    assert (cow["samples"], cow["recall"], cow["precision"], cow["iou"]) == (0, None, None, None)


@pytest.mark.parametrize(("classes", "missing"), [(2, 0), (10, 0), (10, 3), (300, 0)])
def test_classification_metrics_are_scikit_learns(classes: int, missing: int):
    target, predicted = labels(classes, 3000, missing)
    task = classification(classes)
    sums: dict[str, torch.Tensor] = {}
    for part in np.array_split(np.arange(3000), 7):
        batch = {"label": torch.from_numpy(target[part])}
        found = task.measure({"logits": one_hot(predicted[part], classes)}, batch)
        sums = {name: sums.get(name, 0) + value for name, value in found.items()}
    figures = task.metrics(sums)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # predicted classes that never occur
        assert figures["accuracy"] == pytest.approx(sk.accuracy_score(target, predicted))
        assert figures["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(target, predicted))


def test_class_255_of_300_is_a_class_and_not_void():
    task = classification(300)
    sums = task.measure({"logits": one_hot(np.array([VOID, 3]), 300)}, {"label": torch.tensor([VOID, 3])})
    assert int(sums["confusion"].sum()) == 2
    assert task.metrics(sums)["accuracy"] == 1


def test_a_mixed_label_counts_as_its_larger_share():
    mixed = torch.tensor([[0.3, 0.7, 0.0], [0.6, 0.0, 0.4]])
    task = classification(3)
    sums = task.measure({"logits": one_hot(np.array([1, 2]), 3)}, {"label": mixed})
    assert sums["confusion"].tolist() == [[0, 0, 1], [0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize("classes", [2, 6])
def test_segmentation_metrics_are_scikit_learns_without_void(classes: int):
    target, predicted = (x.reshape(5, 8, 8) for x in labels(classes, 5 * 64))
    target = np.where(RANDOM.random(target.shape) < 0.2, VOID, target)
    logits = one_hot(predicted, classes).movedim(-1, 1)
    task = segmentation(classes)
    sums = task.measure({"mask": logits}, {"mask": torch.from_numpy(target)})
    figures = task.metrics(sums)
    known = target != VOID
    assert figures["pixel_accuracy"] == pytest.approx(sk.accuracy_score(target[known], predicted[known]))
    assert figures["mean_iou"] == pytest.approx(sk.jaccard_score(target[known], predicted[known], average="macro"))


def test_a_class_that_neither_occurs_nor_is_predicted_has_no_iou():
    mask = torch.tensor([[[0, 0], [1, 1]]])
    logits = one_hot(np.array([[[0, 0], [1, 0]]]), 5).movedim(-1, 1)
    task = segmentation(5)
    figures = task.metrics(task.measure({"mask": logits}, {"mask": mask}))
    assert figures["mean_iou"] == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_the_auxiliary_output_counts_by_its_weight():
    spec = DataSpec(3, (8, 8), ("a", "b"))
    task = Classification(loss, spec, aux_weight=0.3)
    main, aux = torch.ones(4, 2), torch.full((4, 2), 2.0)
    batch = {"label": torch.zeros(4, dtype=torch.int64)}
    assert task.loss({"logits": main, "aux": aux}, batch)["loss"].tolist() == pytest.approx([2 + 0.3 * 4] * 4)
    assert task.loss({"logits": main}, batch)["loss"].tolist() == [2] * 4


def test_class_counts():
    spec = DataSpec(3, (8, 8), tuple("abcd"))
    assert Classification.class_counts(spec, torch.tensor([0, 2, 2])).tolist() == [1, 0, 2, 0]
    assert Classification.class_counts(spec, None) is None
    assert Segmentation.class_counts(spec, torch.tensor([0, 2, 2])) is None, "of pixels, nobody has counted them"


@pytest.mark.parametrize(("count", "channels", "side"), [(1, 1, 8), (5, 3, 32), (20, 4, 70)])
def test_pictures_are_grids_of_bytes(count: int, channels: int, side: int):
    images = torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(0))
    images[0] = 7.0  # constant: nothing to stretch
    grid = picture_grid(images)
    assert grid.dtype is torch.uint8
    assert grid.shape[0] == 3
    assert grid.shape[2] >= 8 * side


def test_void_is_black_and_classes_are_not():
    colours = coloured(torch.tensor([[[0, 1], [3, VOID]]]), 4)[0].flatten(1).T
    assert colours[3].tolist() == [0, 0, 0]
    assert len({tuple(c.tolist()) for c in colours}) == 4
