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
from cnnlab.data.shapes import CLASSES, MARKS, Shapes, boxes_of
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


def test_default_scenes_are_golden() -> None:
    """Figures are compared on them: objects and shortcuts change nothing where they are off."""
    batch = Shapes(train=300, val=1, test=1).load()["train"].fetch(torch.arange(300))
    content = b"".join(batch[name].numpy().tobytes() for name in sorted(batch))
    assert hashlib.sha256(content).hexdigest()[:16] == "2a89566a5df1a1dd"


def test_the_largest_of_several_shapes_gives_the_class_and_the_box() -> None:
    batch = scenes(train=60, size=64, objects=4, clutter=0, noise=0.0)
    taken = Shapes(size=64, objects=4, clutter=0, noise=0.0).taken_apart("train", torch.arange(60))
    assert taken.names == ("shape", "object3", "object2", "object1")
    radii = []
    for part in range(4):  # of what encloses each part: areas compare different figures
        box = boxes_of(taken.visible[:, part])
        radii.append((box[:, 2:] - box[:, :2]).amax(1))
    assert (radii[0] > torch.stack(radii[1:]).amax(0)).float().mean() > 0.95, "a turned square's box is smaller than it"
    assert torch.equal(boxes_of(taken.visible[:, 0]), batch["box"])
    assert not (taken.visible.sum(1) > 1).any(), "each has a quarter of its own"
    for n in range(60):
        inside = taken.visible[n, 0]
        assert batch["mask"][n][inside].unique().tolist() == [int(batch["label"][n]) + 1]
        assert torch.equal(batch["mask"][n] > 0, taken.visible[n].any(0)), "every shape is in the mask"


def test_a_part_that_is_taken_away_leaves_all_else_as_it_was() -> None:
    settings: dict[str, Any] = {"size": 40, "objects": 3, "shortcut": 0.5, "clutter": 2}
    whole = scenes(train=150, **settings)["image"]
    taken = Shapes(**settings).taken_apart("train", torch.arange(150))
    assert taken.images.shape == (150, 6, 3, 40, 40) and taken.names[:2] == ("mark", "shape")
    changed = (taken.images != whole[:, None]).any(2)
    for part, name in enumerate(taken.names):
        near = grown(taken.visible[:, : part + 1].any(1))  # its own edge, or that of what lies above it
        outside = changed[:, part] & ~near
        assert outside.flatten(1).sum(1).max() <= 1, f"{name}: but for a tip that no pixel has half of"
        assert changed[:, part][taken.visible[:, part]].float().mean() > 0.95, name
    without = scenes(train=150, **{**settings, "shortcut": None})["image"]
    assert torch.equal(taken.images[:, 0], without), "without its mark a scene is the one that never had one"
    fewer = scenes(train=150, **{**settings, "clutter": 1})["image"]
    assert torch.equal(taken.images[:, taken.names.index("bar1")], fewer)


def test_a_thinned_split_is_taken_apart_by_its_own_positions() -> None:
    data = Shapes(train=120, val=1, test=1, limit=20, imbalance=4.0, objects=2, clutter=1)
    split = data.load()["train"]
    index = torch.tensor([3, 11, len(split) - 1])
    whole = split.fetch(index)["image"]
    taken = data.taken_apart("train", index)
    changed = (taken.images != whole[:, None]).any(2).flatten(2).float().mean(2)
    assert changed.max() < 0.5, "another scene would differ everywhere"


def grown(inside: torch.Tensor) -> torch.Tensor:
    """By two pixels, which a part covers to less than half."""
    return torch.nn.functional.max_pool2d(inside.float(), 5, 1, 2) > 0


def marks(split: str, count: int, **settings: Any) -> torch.Tensor:
    """(count,) the class whose colour the mark of each scene has, found in its pixels."""
    counts = {"train": 1, "val": 1, "test": 1, split: count}
    data = Shapes(**counts, noise=0.0, **settings)
    image = data.load()[split].fetch(torch.arange(count))["image"].float() / 255
    inside = data.taken_apart(split, torch.arange(count)).visible[:, 0]
    colour = torch.stack([image[n][:, inside[n]].median(1).values for n in range(count)])
    return (colour[:, None] - torch.tensor(MARKS)).norm(dim=2).argmin(1)


def test_a_shortcut_goes_with_the_class_in_its_share_of_the_scenes() -> None:
    label = torch.arange(300) % 6
    for split, settings, expected in (
        ("train", {"shortcut": 0.7}, 0.7 + 0.3 / 6),
        ("val", {"shortcut": 1.0}, 1.0),
        ("test", {"shortcut": 1.0}, 1 / 6),
        ("test", {"shortcut": 1.0, "shortcut_test": "same"}, 1.0),
        ("train", {"shortcut": 0.0}, 1 / 6),
    ):
        share = (marks(split, 300, **settings) == label).float().mean()
        assert share == pytest.approx(expected, abs=0.0 if expected == 1 else 0.06), (split, settings)
    data = Shapes(shortcut=1.0, shortcut_test="none")
    assert "mark" not in data.taken_apart("test", torch.arange(3)).names
    assert "mark" in data.taken_apart("val", torch.arange(3)).names


def test_scenes_with_options_have_a_fingerprint_of_their_own() -> None:
    def print_of(**settings: Any) -> str:
        return Shapes(train=6, val=1, test=6, **settings).load()["test"].fingerprint

    options: list[dict[str, Any]] = [{}, {"objects": 2}, {"shortcut": 0.5}, {"shortcut": 0.5, "shortcut_test": "same"}]
    assert len({print_of(**each) for each in options}) == len(options)


def test_boxes_of_a_known_mask() -> None:
    inside = torch.zeros(1, 4, 8, dtype=torch.bool)
    inside[0, 1:3, 2:7] = True
    assert boxes_of(inside).tolist() == [[0.25, 0.25, 0.875, 0.75]]
