"""The data sets that need no file: digits and shapes."""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import numpy as np
import pytest
import torch

from cnnlab.data import digits
from cnnlab.data.digits import Digits
from cnnlab.data.shapes import CLASSES, Shapes, boxes_of
from cnnlab.protocols import Batch


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    splits = Digits().load()
    batches = [split.fetch(torch.arange(len(split))) for split in splits.values()]
    images = torch.cat([batch["image"] for batch in batches]).flatten(1).numpy()
    found = np.column_stack([images, torch.cat([batch["label"] for batch in batches]).numpy()])
    wanted = np.column_stack([np.round(pixels * 255 / 16), labels])
    assert found.shape == wanted.shape
    assert (found[np.lexsort(found.T)] == wanted[np.lexsort(wanted.T)]).all()


def test_digits_load_without_scikit_learn_being_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    Digits().load()
    assert "sklearn" not in sys.modules


def test_digits_fall_back_to_scikit_learns_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    direct = Digits().load()["val"].fingerprint
    monkeypatch.setattr(digits, "find_spec", lambda name: None)
    assert Digits().load()["val"].fingerprint == direct


def test_digits_split_is_golden() -> None:
    """The default split may never move: figures are compared on it."""
    splits = Digits().load()
    assert {name: len(split) for name, split in splits.items()} == {"train": 1258, "val": 180, "test": 359}
    batch = splits["test"].fetch(torch.arange(359))
    content = batch["image"].numpy().tobytes() + batch["label"].numpy().tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == "4c28e3f9f6159cc5"
    assert Digits(split_seed=1).load()["test"].fingerprint != splits["test"].fingerprint


def test_digits_limit_imbalance_and_size() -> None:
    splits = Digits(limit=100, imbalance=5.0, size=16).load()
    assert len(splits["train"]) == 100 and len(splits["test"]) == 359
    labels = splits["train"].labels
    assert labels is not None
    counts = torch.bincount(labels, minlength=10)
    assert counts[0] > 3 * counts[9] > 0
    assert splits["train"].fetch(torch.tensor([0]))["image"].shape == (1, 1, 16, 16)
    assert Digits(size=16).spec().size == (16, 16)


def scenes(train: int, **settings: Any) -> Batch:
    """All training scenes."""
    return Shapes(train=train, val=1, test=1, **settings).load()["train"].fetch(torch.arange(train))


def test_shapes_have_balanced_classes_masks_and_boxes_that_agree() -> None:
    data = Shapes(train=240, val=30, test=60, size=40)
    splits = data.load()
    assert {name: len(split) for name, split in splits.items()} == {"train": 240, "val": 30, "test": 60}
    assert data.spec().mask_classes == ("background", *CLASSES)
    batch = splits["train"].fetch(torch.arange(240))
    assert batch["image"].shape == (240, 3, 40, 40) and batch["mask"].shape == (240, 40, 40)
    assert torch.bincount(batch["label"]).tolist() == [40] * 6
    for label, mask, box in zip(batch["label"], batch["mask"], batch["box"]):
        assert mask.unique().tolist() == [0, int(label) + 1]
        rows, columns = mask.nonzero().T
        edges = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 40
        assert torch.allclose(box, edges)


def test_shapes_areas_are_those_of_the_figures() -> None:
    """The pixels of each class against the areas of the ideal figures, through the ratio to the circle's."""
    batch = scenes(train=600, size=64)
    area = (batch["mask"] > 0).sum((1, 2)).float()
    mean = [area[batch["label"] == label].mean() for label in range(6)]
    tip, notch = 1.0, 0.4
    ideal = {
        "circle": np.pi,
        "square": 2.0,
        "triangle": 3 * np.sqrt(3) / 4,
        "cross": 2 * (1.9 * 0.56) - 0.56**2,
        "ring": np.pi * (1 - 0.56**2),
        "star": 10 * 0.5 * tip * notch * np.sin(np.pi / 5),
    }
    for name, found in zip(CLASSES, mean):
        assert float(found / mean[0]) == pytest.approx(ideal[name] / np.pi, rel=0.12), name


def test_shapes_are_a_function_of_seed_split_and_index() -> None:
    few, many = (Shapes(train=n, val=10, test=10).load() for n in (130, 300))
    assert torch.equal(few["train"].fetch(torch.arange(130))["image"], many["train"].fetch(torch.arange(130))["image"])
    assert few["val"].fingerprint == many["val"].fingerprint
    assert not torch.equal(few["val"].fetch(torch.arange(10))["image"], few["test"].fetch(torch.arange(10))["image"])
    other = Shapes(train=1, val=10, test=1, split_seed=1).load()
    assert other["val"].fingerprint != few["val"].fingerprint


def test_shapes_stand_out_from_the_background_by_the_contrast_asked_for() -> None:
    batch = scenes(train=120, clutter=0, noise=0.0, contrast=0.8)
    images = batch["image"].float() / 255
    inside = batch["mask"][:, None] > 0
    shape = (images * inside).sum((2, 3)) / inside.sum((2, 3))
    rest = (images * ~inside).sum((2, 3)) / (~inside).sum((2, 3))
    assert float((shape - rest).norm(dim=1).min()) > 0.4


def test_shapes_noise_and_clutter_change_the_background_only_where_asked() -> None:
    plain = scenes(train=12, clutter=0, noise=0.0)
    busy = scenes(train=12, clutter=4, noise=0.0)
    assert torch.equal(plain["mask"], busy["mask"])
    changed = (plain["image"] != busy["image"]).any(1)
    assert changed[plain["mask"] == 0].float().mean() > 0.05
    noisy = scenes(train=12, clutter=0, noise=0.3)
    assert (noisy["image"] != plain["image"]).float().mean() > 0.8


def test_shapes_imbalance() -> None:
    split = Shapes(train=600, val=6, test=6, imbalance=10.0).load()["train"]
    assert split.labels is not None
    assert torch.bincount(split.labels).tolist() == [100, 63, 39, 25, 15, 10]


def test_boxes_of_a_known_mask() -> None:
    inside = torch.zeros(1, 4, 8, dtype=torch.bool)
    inside[0, 1:3, 2:7] = True
    assert boxes_of(inside).tolist() == [[0.25, 0.25, 0.875, 0.75]]
