"""Pascal-VOC boxes and mask folders: geometry, splits, and what is said of files that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import GREEN, RED, save_plain
from PIL import Image

from cnnlab.augment import Identity, Pipeline, RandomResizedCrop
from cnnlab.data.decode import Recipe, decode, letterbox
from cnnlab.data.masks import MaskFolder
from cnnlab.data.voc import VocBoxes
from cnnlab.errors import DataError
from cnnlab.protocols import VOID

Box = tuple[int, int, int, int]


def annotate(root: Path, name: str, objects: list[tuple[str, Box]]) -> None:
    """An annotation; boxes are (xmin, ymin, xmax, ymax), counted from 1, ends included."""
    sides = ("xmin", "ymin", "xmax", "ymax")
    body = "".join(
        f"<object><name>{kind}</name><bndbox>"
        + "".join(f"<{side}>{value}</{side}>" for side, value in zip(sides, box))
        + "</bndbox></object>"
        for kind, box in objects
    )
    path = root / "Annotations" / f"{name}.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation>{body}</annotation>")


def make_voc(root: Path, counts: dict[str, int], size: tuple[int, int] = (40, 20)) -> Path:
    """Black images with a red box, (11, 6)..(30, 15), a `cat` or a `dog` in turn."""
    box: Box = (11, 6, 30, 15)
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (root / "JPEGImages").mkdir()
    for split, count in counts.items():
        names = [f"{split}{n}" for n in range(count)]
        (lists / f"{split}.txt").write_text("\n".join(names) + "\n")
        for n, name in enumerate(names):
            picture = np.zeros((size[1], size[0], 3), np.uint8)
            picture[box[1] - 1 : box[3], box[0] - 1 : box[2]] = RED
            Image.fromarray(picture).save(root / "JPEGImages" / f"{name}.png")
            annotate(root, name, [(("cat", "dog")[n % 2], box), ("flea", (1, 1, 2, 2))])
    return root


def boxes(root: Path, **settings: Any) -> VocBoxes:
    return VocBoxes(str(root), **{"size": 40, "cache": str(root.parent / "cache"), **settings})


@pytest.mark.parametrize("fit", ["letterbox", "stretch"])
def test_boxes_lie_on_the_object(tmp_path: Path, fit: Any) -> None:
    data = boxes(make_voc(tmp_path / "voc", {"train": 8, "val": 2}), test=0.25, fit=fit)
    spec, splits = data.spec(), data.load()
    assert spec.classes == ("cat", "dog") and spec.targets == {"label", "box"} and spec.size == (40, 40)
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "val": 2, "test": 2}
    batch = splits["train"].fetch(torch.arange(6))
    for image, box in zip(batch["image"], batch["box"]):
        rows, columns = (image[0] > 110).nonzero().T
        edges = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 40
        assert torch.allclose(box, edges, atol=0.026)
    wanted = [0.25, 0.375, 0.75, 0.625] if fit == "letterbox" else [0.25, 0.25, 0.75, 0.75]
    assert batch["box"][0].tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("size", [(40, 20), (32, 48)])
@pytest.mark.parametrize("fit", ["letterbox", "stretch"])
def test_boxes_lie_on_the_object_in_crops_of_whole_photos(tmp_path: Path, fit: Any, size: tuple[int, int]) -> None:
    data = boxes(make_voc(tmp_path / "voc", {"train": 8, "val": 2}, size), test=0.25, fit=fit, crops=True)
    splits = data.load()
    assert splits["val"].fetch(torch.tensor([0]))["image"].shape[-2:] == (40, 40)
    batch = splits["train"].fetch(torch.arange(len(splits["train"])))
    assert batch["image"].shape[-2:] == (46, 62)
    pipeline = Pipeline({"crop": RandomResizedCrop((0.8, 1.0))}, Identity(), spec=data.spec(), seed=0)
    moved = pipeline(batch, epoch=0, train=True)
    for image, box in zip(moved["image"], moved["box"]):
        there = (image[0] > 0.3).nonzero().float()
        bounds = torch.cat([there.min(0).values.flip(0), there.max(0).values.flip(0) + 1]) / 40
        torch.testing.assert_close(box, bounds, atol=0.06, rtol=0)


def test_a_box_over_the_whole_image_is_the_unit_square(tmp_path: Path) -> None:
    root = make_voc(tmp_path / "voc", {"train": 8})
    for path in (root / "Annotations").iterdir():
        annotate(root, path.stem, [("cat", (1, 1, 40, 20))])
    splits = boxes(root, fit="stretch", val=0.2, test=0.2).load()
    assert splits["train"].fetch(torch.tensor([0]))["box"].tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize(
    "size, target, wanted",
    [
        ((100, 50), (40, 40), (10, 0, 20, 40)),
        ((50, 100), (40, 40), (0, 10, 40, 20)),
        ((7, 7), (14, 28), (7, 0, 14, 14)),
        ((1000, 1), (10, 10), (4, 0, 1, 10)),
    ],
)
def test_letterbox(size: tuple[int, int], target: tuple[int, int], wanted: tuple[int, ...]) -> None:
    assert letterbox(*size, *target) == wanted


def test_unusable_annotations_are_named(tmp_path: Path) -> None:
    root = make_voc(tmp_path / "voc", {"train": 8})
    with pytest.raises(DataError, match=r"train\.txt"):
        boxes(tmp_path / "nowhere").spec()
    annotate(root, "train3", [("cat", (9, 9, 4, 4))])
    with pytest.raises(DataError, match=r"train3\.xml, received 1 objects"):
        boxes(root).spec()
    annotate(root, "train3", [("cat", (100, 100, 120, 120))])
    with pytest.raises(
        DataError, match=r"train3: its box \[99.0, 99.0, 120.0, 120.0\] does not lie in the image of 40x20"
    ):
        boxes(root).load()
    (root / "Annotations" / "train3.xml").write_text("<annotation>")
    with pytest.raises(DataError, match="expected a VOC annotation"):
        boxes(root).spec()
    annotate(root, "train3", [("cat", (1, 1, 4, 4))])
    (root / "JPEGImages" / "train5.png").unlink()
    with pytest.raises(DataError, match="train5: no file of its name in JPEGImages"):
        boxes(root).load()


def make_masks(root: Path, counts: dict[str, int], palette: bool = False) -> Path:
    """Images red on the left half and green on the right, masks 0 and 1, with a row of void at the top."""
    for split, count in counts.items():
        for n in range(count):
            picture = np.zeros((12, 16, 3), np.uint8)
            picture[:, :8], picture[:, 8:] = RED, GREEN
            numbers = np.zeros((12, 16), np.uint8)
            numbers[:, 8:], numbers[0] = 1, VOID
            for kind, array in (("images", picture), ("masks", numbers)):
                path = root / kind / split / f"{n}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image = Image.fromarray(array)
                if palette and kind == "masks":
                    image.putpalette([9, 9, 9] * 256)
                image.save(path)
    (root / "classes.txt").write_text("red\ngreen\n")
    return root


def masks(root: Path, **settings: Any) -> MaskFolder:
    return MaskFolder(str(root), **{"size": (12, 16), "cache": str(root.parent / "cache"), **settings})


@pytest.mark.parametrize("palette", [False, True])
def test_masks_lie_on_the_image(tmp_path: Path, palette: bool) -> None:
    data = masks(make_masks(tmp_path / "data", {"train": 10, "test": 3}, palette), val=0.2)
    spec, splits = data.spec(), data.load()
    assert spec.targets == {"mask"} and spec.mask_classes == ("red", "green") and spec.size == (12, 16)
    assert {name: len(split) for name, split in splits.items()} == {"train": 8, "val": 2, "test": 3}
    assert splits["train"].labels is None
    batch = splits["train"].fetch(torch.arange(8))
    assert batch["mask"].dtype == torch.int64 and (batch["mask"][:, 0] == VOID).all()
    green = batch["image"][:, 1] > 100
    assert torch.equal(batch["mask"][:, 1:], green[:, 1:].long())


def test_resized_masks_keep_class_numbers_and_fill_with_void(tmp_path: Path) -> None:
    data = masks(make_masks(tmp_path / "data", {"train": 6}), size=(9, 24), val=0.2, test=0.2, limit=2)
    splits = data.load()
    assert len(splits["train"]) == 2
    batch = splits["train"].fetch(torch.arange(2))
    assert batch["mask"].unique().tolist() == [0, 1, VOID]
    assert (batch["mask"][:, :, :6] == VOID).all() and (batch["image"][:, :, :, :6] == 0).all()
    assert (batch["mask"][:, 3:, 6:12] == 0).all() and (batch["mask"][:, 3:, 12:18] == 1).all()


def test_unusable_masks_are_named(tmp_path: Path) -> None:
    root = make_masks(tmp_path / "data", {"train": 6, "val": 2, "test": 2})
    with pytest.raises(DataError, match=r"classes\.txt"):
        masks(tmp_path / "nowhere").spec()
    path = root / "masks" / "train" / "4.png"
    Image.fromarray(np.full((12, 16), 7, np.uint8)).save(path)
    with pytest.raises(DataError, match=r"received 7 in masks/train/4\.png"):
        masks(root).load()
    Image.fromarray(np.zeros((12, 12), np.uint8)).save(path)
    with pytest.raises(DataError, match=r"masks/train/4\.png: expected .*, 12 x 16, received 12 x 12"):
        masks(root).load()
    save_plain(path, size=(16, 12))
    with pytest.raises(DataError, match="greyscale or palette"):
        masks(root).load()
    assert len(masks(root, on_error="skip").load()["train"]) == 5
    path.unlink()
    with pytest.raises(DataError, match=r"images/train/4\.png: no mask of its name"):
        masks(root).load()


def test_a_sixteen_bit_mask_holds_class_numbers(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 3, np.uint16)).save(tmp_path / "mask.png")
    array, _ = decode(str(tmp_path / "mask.png"), Recipe(1, 4, 4, "stretch", mask=True))
    assert (array == 3).all()


def test_refused_combinations() -> None:
    with pytest.raises(ValueError, match=r"data\.size=\[height,width\]"):
        MaskFolder("x", size=(4,))
    with pytest.raises(ValueError, match=r"data\.val"):
        VocBoxes("x", val=0.6, test=0.5)


def test_masks_of_0_and_255_for_two_classes_are_refused(tmp_path: Path) -> None:
    root = make_masks(tmp_path / "data", {"train": 6, "val": 2, "test": 2})
    for path in (root / "masks").rglob("*.png"):
        Image.fromarray(np.where(np.arange(16) < 8, 0, 255).astype(np.uint8)[None].repeat(12, 0)).save(path)
    with pytest.raises(DataError, match=r"no pixel would be `green`; type data\.values=\[0,255\]"):
        masks(root).load()


def test_what_no_pixel_teaches_and_a_split_of_void_are_told(tmp_path: Path) -> None:
    root = make_masks(tmp_path / "data", {"train": 6, "valid": 2, "test": 2})
    (root / "classes.txt").write_bytes(b"\xef\xbb\xbfred\ngreen\nsky\n")
    for path in (root / "masks" / "valid").iterdir():
        Image.fromarray(np.full((12, 16), VOID, np.uint8)).save(path)
    data = masks(root)
    assert data.spec().classes == ("red", "green", "sky") and len(data.load()["val"]) == 2
    untaught, void = data.findings.notices
    assert "no pixel of the training masks is sky" in untaught and "val has no pixel that is not void" in void


def test_two_images_for_one_mask_and_two_folders_for_one_split_are_refused(tmp_path: Path) -> None:
    root = make_masks(tmp_path / "data", {"train": 6, "val": 2})
    save_plain(root / "images" / "train" / "3.jpg", size=(16, 12))
    with pytest.raises(DataError, match=r"images/train/3\.jpg and images/train/3\.png"):
        masks(root).load()
    make_masks(root, {"Valid": 1})
    with pytest.raises(DataError, match="received Valid and val"):
        masks(root).load()


# ---- annotations that are to be doubted ----


def test_what_lies_outside_is_cut_off_and_counted_and_several_objects_are_told(tmp_path: Path) -> None:
    root = make_voc(tmp_path / "voc", {"train": 8})
    annotate(root, "train3", [("cat", (-20, 6, 60, 15))])
    data = boxes(root, val=0.2, test=0.2, fit="stretch")
    found = torch.cat([split.fetch(torch.arange(len(split)))["box"] for split in data.load().values()])
    assert [0, 0.25, 1, 0.75] in found.tolist()
    assert "data: 1 boxes reach beyond their images and are cut off there (train3)" in data.findings.notices
    several = "data: 7 of 8 images have several objects; the largest of each is taken (train0)"
    assert several in data.findings.notices


def test_the_largest_is_the_largest_inside_the_image(tmp_path: Path) -> None:
    root = make_voc(tmp_path / "voc", {"train": 8})
    path = root / "Annotations" / "train3.xml"
    annotate(root, "train3", [("flea", (35, 1, 900, 900)), ("cat", (1, 1, 30, 20))])
    text = path.read_text().replace("<annotation>", "<annotation><size><width>40.0</width><height>20</height></size>")
    path.write_text(text)
    assert boxes(root).spec().classes == ("cat", "dog")


def test_an_annotation_of_another_image_is_refused_or_left_out(tmp_path: Path) -> None:
    root = make_voc(tmp_path / "voc", {"train": 8})
    path = root / "Annotations" / "train3.xml"
    size = "<annotation><size><width>20</width><height>40</height></size>"
    path.write_text(path.read_text().replace("<annotation>", size))
    with pytest.raises(
        DataError, match="train3: its annotation is of an image of 20x40 pixels, and the image has 40x20"
    ):
        boxes(root).load()
    data = boxes(root, on_error="skip", val=0.2, test=0.2)
    assert sum(map(len, data.load().values())) == 7 and data.findings.left_out[0][0] == "train3"


BOMB = (
    '<!DOCTYPE a [<!ENTITY a "ha">'
    + "".join(f'<!ENTITY {name} "{f"&{before};" * 10}">' for before, name in zip("abcdefgh", "bcdefghi", strict=True))
    + "]><annotation><object><name>&i;</name></object></annotation>"
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (BOMB, "the entity 'a', and entities are not expanded"),
        ('<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>', "the entity 'x'"),
        ("<annotation>&nothing;</annotation>", "undefined entity"),
        ("<annotation><object><name>cat</name></object></annotation>", "without an area"),
        ("<annotation><size><width>inf</width></size></annotation>", "received: cannot convert float infinity"),
        ("", "no element found"),
        ("<a>" * 20_000 + "</a>" * 20_000, "received 0 objects"),
    ],
)
def test_xml_that_is_unsafe_or_none_is_refused_by_name(tmp_path: Path, content: str, words: str) -> None:
    root = make_voc(tmp_path / "voc", {"train": 8})
    (root / "Annotations" / "train3.xml").write_text(content)
    with pytest.raises(DataError, match=r"train3\.xml") as caught:
        boxes(root).spec()
    assert words in str(caught.value)
    assert sum(map(len, boxes(root, on_error="skip", val=0.2, test=0.2).load().values())) == 7
