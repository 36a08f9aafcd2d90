"""COCO's JSON: where the files are found, which object is taken, what is said of what cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_runs import Answer
from PIL import Image

from cnnlab.data.coco import CocoBoxes
from cnnlab.errors import DataError

EMPTY = ', "annotations": [], "categories": []}'
RED_BOX = [10, 5, 20, 10]
"""x, y, width and height of the red part of each image of 40 x 20."""


def document(names: list[str], **more: Any) -> dict[str, Any]:
    """A `cat` (number 3) or a `dog` (7) in turn, each with a flea; nothing is a `bird` (5)."""
    images = [{"id": 100 + n, "file_name": name, "width": 40, "height": 20} for n, name in enumerate(names)]
    annotations = []
    for n in range(len(names)):
        annotations.append({"id": 2 * n, "image_id": 100 + n, "category_id": 9, "bbox": [0, 0, 2, 2]})
        annotations.append({"id": 2 * n + 1, "image_id": 100 + n, "category_id": (3, 7)[n % 2], "bbox": RED_BOX})
    categories = [{"id": n, "name": name} for n, name in ((7, "dog"), (3, "cat"), (5, "bird"), (9, "flea"))]
    return {"images": images, "annotations": annotations, "categories": categories, **more}


def make(
    root: Path, splits: dict[str, int], images: str = "images", labels: str = "annotations/instances_{}.json"
) -> Path:
    for split, count in splits.items():
        names = [f"{split}{n}.png" for n in range(count)]
        for name in names:
            picture = np.zeros((20, 40, 3), np.uint8)
            picture[5:15, 10:30, 0] = 255
            path = root / images.format(split) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
        path = root / labels.format(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document(names)))
    return root


def coco(root: Path, **settings: Any) -> CocoBoxes:
    return CocoBoxes(str(root), **{"size": 40, "cache": str(root.parent / "cache"), **settings})


def change(
    root: Path, edit: Callable[[dict[str, Any]], object], name: str = "annotations/instances_train.json"
) -> None:
    content = json.loads((root / name).read_text())
    edit(content)
    (root / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("images", "annotations/instances_{}.json"),
        ("{}2017", "annotations/instances_{}2017.json"),
        ("{}", "{}/_annotations.coco.json"),
        ("", "{}.json"),
        ("images/{}", "{}_labels.json"),
    ],
)
def test_files_are_found_where_people_have_them(tmp_path: Path, images: str, labels: str) -> None:
    data = coco(make(tmp_path / "data", {"train": 8, "val": 3}, images, labels), test=0.25)
    spec, splits = data.spec(), data.load()
    assert spec.classes == ("cat", "dog"), "those that occur, in the order of their numbers"
    assert spec.targets == {"label", "box"}
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "val": 3, "test": 2}
    batch = splits["val"].fetch(torch.arange(3))
    assert batch["label"].tolist() == [0, 1, 0]
    torch.testing.assert_close(batch["box"], torch.tensor([[0.25, 0.375, 0.75, 0.625]]).expand(3, 4))
    assert any("have several objects; the largest of each is taken" in line for line in data.findings.notices)


def test_a_file_of_another_name_is_typed(tmp_path: Path) -> None:
    root = make(tmp_path / "data", {"train": 8}, labels="mine/{}-final.json")
    with pytest.raises(DataError, match="received none; type data.root=FOLDER and, where it has a name of its own"):
        coco(root).spec()
    assert coco(root, annotations="mine/{split}-final.json").spec().classes == ("cat", "dog")
    assert coco(root, annotations="mine/train-final.json").spec().classes == ("cat", "dog")


def test_objects_are_found_among_captions_and_two_files_are_refused(tmp_path: Path) -> None:
    root = make(tmp_path / "data", {"train": 8})
    (root / "annotations" / "captions_train.json").write_text("[]")
    assert coco(root).spec().classes == ("cat", "dog")
    (root / "annotations" / "instances_train_old.json").write_text("{}")
    with pytest.raises(DataError, match="expected one file of annotations for train"):
        coco(root).spec()


def test_val_as_test(tmp_path: Path) -> None:
    splits = coco(make(tmp_path / "data", {"train": 8, "val": 3}), val=0.25, val_as_test=True).load()
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "val": 2, "test": 3}


def test_boxes_beyond_the_image_are_cut_off_and_counted(tmp_path: Path) -> None:
    root = make(tmp_path / "data", {"train": 8})
    change(root, lambda found: found["annotations"][1].update(bbox=[-5, 5, 500, 10]))
    data = coco(root, val=0.2, test=0.2, fit="stretch")
    boxes = torch.cat([split.fetch(torch.arange(len(split)))["box"] for split in data.load().values()])
    assert (boxes >= 0).all() and (boxes <= 1).all()
    assert [0, 0.25, 1, 0.75] in boxes.tolist()
    assert "data: 1 boxes reach beyond their images and are cut off there (images/train0.png)" in data.findings.notices


@pytest.mark.parametrize(
    ("bbox", "words"),
    [
        ([10, 5, 0, 10], r"image train0.png, received 1 objects .* without an area"),
        ([10, 5, -3, 10], "without an area"),
        ([10, 5, float("nan"), 10], "without an area"),
        ([10, 5, 3], "without an area"),
        ("all of it", "without an area"),
        ([50, 5, 10, 10], r"train0.png: its box \[50.0, 5.0, 60.0, 15.0\] does not lie in the image of 40x20 pixels"),
    ],
)
def test_boxes_without_area_are_refused_by_name_or_left_out(tmp_path: Path, bbox: Any, words: str) -> None:
    root = make(tmp_path / "data", {"train": 12})

    def edit(found: dict[str, Any]) -> None:
        del found["annotations"][0]
        found["annotations"][0]["bbox"] = bbox

    change(root, edit)
    with pytest.raises(DataError, match=words):
        coco(root).load()
    data = coco(root, on_error="skip", val=0.2, test=0.2)
    assert sum(map(len, data.load().values())) == 11
    ((name, _),) = data.findings.left_out
    assert name == "images/train0.png"


def test_an_annotation_of_another_image_is_refused_and_a_smaller_one_is_scaled(tmp_path: Path) -> None:
    root = make(tmp_path / "data", {"train": 8})
    change(root, lambda found: found["images"][0].update(width=20, height=40))
    with pytest.raises(DataError, match="its annotation is of an image of 20x40 pixels, and the image has 40x20"):
        coco(root).load()

    def double(found: dict[str, Any]) -> None:
        for image in found["images"]:
            image.update(width=80, height=40)
        for one in found["annotations"]:
            one["bbox"] = [2 * side for side in one["bbox"]]

    change(root, double)
    data = coco(root, fit="stretch", val=0.2, test=0.2)
    boxes = data.load()["train"].fetch(torch.arange(3))["box"]
    torch.testing.assert_close(boxes, torch.tensor([[0.25, 0.25, 0.75, 0.75]]).expand(3, 4))
    assert any("8 images have another size than their annotation says" in line for line in data.findings.notices)


def test_what_is_not_used_is_told(tmp_path: Path) -> None:
    root = make(tmp_path / "data", {"train": 9})

    def edit(found: dict[str, Any]) -> None:
        found["annotations"] = [one for one in found["annotations"] if one["image_id"] != 108]
        found["annotations"] += [
            {"image_id": 100, "category_id": 3, "bbox": [0, 0, 40, 20], "iscrowd": 1},
            {"image_id": 999, "category_id": 3, "bbox": [0, 0, 40, 20]},
        ]

    change(root, edit)
    data = coco(root, val=0.2, test=0.2)
    assert sum(map(len, data.load().values())) == 8
    said = "\n".join(data.findings.notices)
    assert "1 images of" in said and "have no object, and are not used (images/train8.png)" in said
    assert "1 regions of many objects" in said and "1 annotations of" in said


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    root = make(tmp_path / "data", {"train": 8})
    (root / "images" / "train3.png").unlink()
    with pytest.raises(DataError, match=r"images/train3\.png: No such file"):
        coco(root).load()
    assert sum(map(len, coco(root, on_error="skip", val=0.2, test=0.2).load().values())) == 7


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "expected COCO annotations in .*instances_train.json, received: Expecting"),
        ("[" * 100_000, "received: maximum recursion|received: Expecting|received: .*recursion"),
        ("[]", "received no list of images, annotations, categories"),
        ('{"images": [], "annotations": [], "categories": []}', "expected images with objects"),
        ('{"images": [{"id": "a"}], "annotations": [], "categories": []}', "expected each image in .* to have `id`"),
        ('{"images": [3], "annotations": [], "categories": []}', "expected each image"),
        (
            '{"images": [{"id": 1, "file_name": "../../etc/passwd"}], "annotations": [], "categories": []}',
            "names of images below the data's folder",
        ),
        (
            '{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]' + EMPTY,
            "one image of each id",
        ),
    ],
)
def test_files_that_are_none_of_cocos(tmp_path: Path, content: str, words: str) -> None:
    root = make(tmp_path / "data", {"train": 2})
    (root / "annotations" / "instances_train.json").write_text(content)
    with pytest.raises(DataError, match=words):
        coco(root).spec()


def test_a_category_that_is_not_among_the_classes_is_refused(tmp_path: Path) -> None:
    root = make(tmp_path / "data", {"train": 8})
    with pytest.raises(DataError, match="expected an object of cat, bird in the annotation of images/train1.png"):
        coco(root, classes=("cat", "bird")).load()
    assert coco(root, classes=("dog", "cat")).spec().classes == ("dog", "cat")


def test_a_run_on_coco_files(tmp_path: Path, cli: Callable[..., Answer]) -> None:
    root = make(tmp_path / "data", {"train": 16})
    few = ("model=cnn", "model.widths=[4,8]", "trainer.epochs=1", "trainer.device=cpu", "trainer.threads=1")
    data = ("data=coco", f"data.root={root}", "data.size=16", f"data.cache={tmp_path / 'cache'}", "data.workers=0")
    answer = cli("train", *data, *few, "task=localization", "augment=[crop,flip]", "hydra.run.dir=here")
    assert answer.code == 0, answer.err
    assert "have several objects" in answer.out + answer.err
    again = cli("eval", "here")
    assert again.code == 0, again.err
    (root / "annotations" / "instances_train.json").write_text("{}")
    refused = cli("train", *data, *few, "task=localization")
    assert (refused.code, "received no list of images" in refused.err) == (3, True), refused.err
