"""Oxford-IIIT Pet and Pascal VOC 2012, read from small files in torchvision's layouts."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_runs import Answer
from image_files import GREEN, RED, save_plain
from PIL import Image
from torchvision import datasets

from cnnlab.data.pet import BREEDS, OxfordPet
from cnnlab.data.pool import DecodingPool
from cnnlab.data.voc2012 import CLASSES, Voc2012
from cnnlab.errors import DataError
from cnnlab.protocols import VOID
from cnnlab.schema import Loading

Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CNNLAB_CACHE", str(tmp_path / "cache"))


# ---- pets


def make_pets(root: Path, trainval: int = 6, test: int = 2) -> Path:
    """Of three breeds, `trainval` and `test` photos each, 24 x 16: green with the pet, a red half, on the right. The
    trimap has 1 where the pet is, 2 elsewhere and 3 in the column between."""
    base = root / "oxford-iiit-pet"
    (base / "annotations" / "trimaps").mkdir(parents=True)
    (base / "images").mkdir()
    picture = np.zeros((16, 24, 3), np.uint8)
    picture[:, :12], picture[:, 12:] = GREEN, RED
    trimap = np.full((16, 24), 2, np.uint8)
    trimap[:, 12:], trimap[:, 12] = 1, 3
    for split, count in (("trainval", trainval), ("test", test)):
        lines = []
        for breed in (1, 12, 37):
            for number in range(count):
                name = f"{BREEDS[breed - 1].title()}_{split}{number}"
                Image.fromarray(picture).save(base / "images" / f"{name}.jpg", quality=95)
                Image.fromarray(trimap).save(base / "annotations" / "trimaps" / f"{name}.png")
                lines.append(f"{name} {breed} 1 1\n")
        (base / "annotations" / f"{split}.txt").write_text("".join(lines))
    return root


@pytest.mark.parametrize("crops", [False, True], ids=["as seen", "stored whole"])
@pytest.mark.parametrize("masks", [False, True])
def test_a_pets_box_is_the_bounds_of_its_pixels(tmp_path: Path, masks: bool, crops: bool) -> None:
    """The right half of the photo, less the border; the crop of the middle cuts a third of it off."""
    data = OxfordPet(boxes=True, masks=masks, root=str(make_pets(tmp_path)), size=32, val=0.34, crops=crops)
    splits = data.load()
    assert data.spec().targets == {"label", "box", *(["mask"] if masks else [])}
    for name, split in splits.items():
        batch = split.fetch(torch.arange(len(split)))
        assert ("mask" in batch) == masks
        seen = [18 / 32, 0, 1, 1] if not (crops and name == "train") else [13 / 24, 0, 1, 1]
        torch.testing.assert_close(batch["box"], torch.tensor([seen]).expand(len(split), 4), atol=0.03, rtol=0)


def test_an_image_without_a_pet_is_refused_by_name_or_left_out(tmp_path: Path) -> None:
    root = make_pets(tmp_path)
    path = root / "oxford-iiit-pet" / "annotations" / "trimaps" / "Abyssinian_trainval2.png"
    Image.fromarray(np.full((16, 24), 2, np.uint8)).save(path)
    with pytest.raises(DataError, match=r"Abyssinian_trainval2.png: no pixel of a pet in what the network sees"):
        OxfordPet(boxes=True, root=str(root), size=16).load()
    data = OxfordPet(boxes=True, root=str(root), size=16, val=0.34, on_error="skip")
    assert sum(map(len, data.load().values())) == 23 and len(data.findings.left_out) == 1


def test_pets_have_their_breed(tmp_path: Path) -> None:
    root = make_pets(tmp_path)
    data = OxfordPet(root=str(root), size=16, val=1 / 3)
    spec, splits = data.spec(), data.load()
    assert spec.num_classes == 37 and spec.targets == {"label"} and spec.size == (16, 16)
    assert {name: len(split) for name, split in splits.items()} == {"train": 12, "val": 6, "test": 6}
    theirs = datasets.OxfordIIITPet(str(root), split="test")
    test = splits["test"].fetch(torch.arange(6))
    assert test["label"].tolist() == [label for _, label in theirs]
    assert spec.classes[theirs[2][1]] == "egyptian_mau"
    assert test["image"].shape == (6, 3, 16, 16)


@pytest.mark.parametrize("masks", [False, True])
def test_training_pets_are_stored_whole_for_crops(tmp_path: Path, masks: bool) -> None:
    root = str(make_pets(tmp_path))
    plain, splits = (OxfordPet(masks, root, size=14, crops=crops).load() for crops in (False, True))
    every = torch.arange(len(splits["train"]))
    batch, seen = splits["train"].fetch(every), plain["train"].fetch(every)
    assert batch["image"].shape[-2:] == (16, 22) and torch.equal(batch["label"], seen["label"])
    assert batch["image"][:, 1, :, :10].min() > 100 > batch["image"][:, 1, :, 13:].max(), "green is on the left"
    if masks:
        assert set(batch["mask"][:, :, :10].unique().tolist()) == {1} and batch["mask"].shape[-2:] == (16, 22)
    for name in ("val", "test"):
        assert torch.equal(splits[name].fetch(torch.arange(2))["image"], plain[name].fetch(torch.arange(2))["image"])


def test_the_names_of_the_breeds_are_torchvisions(tmp_path: Path) -> None:
    """They are made from the files' names there, in the order of the labels."""
    base = tmp_path / "oxford-iiit-pet"
    (base / "images").mkdir(parents=True)
    (base / "annotations").mkdir()
    lines = "".join(f"{name}_1 {number} 1 1\n" for number, name in enumerate(BREEDS, 1))
    (base / "annotations" / "trainval.txt").write_text(lines)
    theirs = datasets.OxfordIIITPet(str(tmp_path)).classes
    assert [name.replace("_", " ").title() for name in BREEDS] == theirs
    assert list(BREEDS) == sorted(BREEDS) and len(BREEDS) == 37


@pytest.mark.parametrize("fit", ["crop", "letterbox", "stretch"])
def test_a_trimap_is_pet_background_and_a_void_border(tmp_path: Path, fit: Any) -> None:
    data = OxfordPet(True, str(make_pets(tmp_path)), size=24, fit=fit, limit=4)
    spec, splits = data.spec(), data.load()
    assert spec.targets == {"label", "mask"} and spec.mask_classes == ("pet", "background")
    assert len(splits["train"]) == 4
    batch = splits["train"].fetch(torch.arange(4))
    mask, red = batch["mask"], batch["image"][:, 0] > batch["image"][:, 1]
    assert mask.unique().tolist() == [0, 1, VOID] and mask.dtype == torch.int64
    inside = mask != VOID
    assert torch.equal(mask[inside] == 0, red[inside])
    border = (mask == VOID).any(1).sum(1)
    assert torch.all(border == (24 if fit == "letterbox" else border.min())) and border.min() >= 1


def test_unusable_pets_are_named(tmp_path: Path) -> None:
    base = make_pets(tmp_path) / "oxford-iiit-pet"
    trimap = base / "annotations" / "trimaps" / "Abyssinian_trainval0.png"
    Image.fromarray(np.zeros((16, 24), np.uint8)).save(trimap)
    with pytest.raises(DataError, match=r"Abyssinian_trainval0\.png: expected 1, 2, 3, 255 in a mask, received 0"):
        OxfordPet(True, str(tmp_path), size=16).load()
    trimap.unlink()
    with pytest.raises(DataError, match=r"(?s)Abyssinian_trainval0: no .* in annotations/trimaps.*data\.download=true"):
        OxfordPet(True, str(tmp_path), size=16).load()
    assert len(OxfordPet(root=str(tmp_path), size=16).load()["train"]) > 0
    (base / "images" / "Abyssinian_test1.jpg").unlink()
    with pytest.raises(DataError, match="1 of 24:\n  Abyssinian_test1: no file of its name in images"):
        OxfordPet(root=str(tmp_path), size=16).load()
    (base / "annotations" / "test.txt").write_text("Abyssinian_1 38 1 1\n")
    with pytest.raises(DataError, match=r"breeds 1\.\.37"):
        OxfordPet(root=str(tmp_path), size=16).load()


# ---- VOC 2012


def make_voc2012(root: Path) -> Path:
    """Twelve training and four validation photos, 40 x 20, black with a red box; a cat or a tvmonitor in turn, with a
    mask of its class, and a void row above it."""
    base = root / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Main", "ImageSets/Segmentation"):
        (base / folder).mkdir(parents=True)
    for split, count in (("train", 12), ("val", 4)):
        names = [f"2008_{split}{number}" for number in range(count)]
        for kind in ("Main", "Segmentation"):
            (base / "ImageSets" / kind / f"{split}.txt").write_text("\n".join(names) + "\n")
        for number, name in enumerate(names):
            thing = ("cat", "tvmonitor")[number % 2]
            picture, mask = np.zeros((20, 40, 3), np.uint8), np.zeros((20, 40), np.uint8)
            picture[5:15, 10:30], mask[5:15, 10:30], mask[4] = RED, CLASSES.index(thing) + 1, VOID
            Image.fromarray(picture).save(base / "JPEGImages" / f"{name}.jpg", quality=95)
            numbers = Image.fromarray(mask)
            numbers.putpalette([9, 9, 9] * 256)
            numbers.save(base / "SegmentationClass" / f"{name}.png")
            box = "<xmin>11</xmin><ymin>6</ymin><xmax>30</xmax><ymax>15</ymax>"
            text = f"<object><name>{thing}</name><bndbox>{box}</bndbox></object>"
            (base / "Annotations" / f"{name}.xml").write_text(f"<annotation>{text}</annotation>")
    return root


def test_voc_boxes(tmp_path: Path) -> None:
    root = make_voc2012(tmp_path)
    data = Voc2012(root=str(root), size=40, fit="stretch", val=0.25)
    spec, splits = data.spec(), data.load()
    assert spec.classes == CLASSES and len(CLASSES) == 20 and spec.targets == {"label", "box"}
    assert {name: len(split) for name, split in splits.items()} == {"train": 9, "val": 3, "test": 4}
    test = splits["test"].fetch(torch.arange(4))
    assert [spec.classes[label] for label in test["label"]] == ["cat", "tvmonitor", "cat", "tvmonitor"]
    for image, box in zip(test["image"], test["box"], strict=True):
        rows, columns = (image[0] > 110).nonzero().T
        edges = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 40
        torch.testing.assert_close(box, edges, atol=0.026, rtol=0)


def test_voc_masks(tmp_path: Path) -> None:
    data = Voc2012("mask", str(make_voc2012(tmp_path)), size=40, fit="stretch", val=0.25)
    spec, splits = data.spec(), data.load()
    assert spec.targets == {"mask"} and spec.mask_classes == ("background", *CLASSES)
    assert {name: len(split) for name, split in splits.items()} == {"train": 9, "val": 3, "test": 4}
    batch = splits["test"].fetch(torch.arange(4))
    assert batch["mask"].unique().tolist() == [0, 1 + CLASSES.index("cat"), 20, VOID]
    counted = batch["mask"] != VOID
    assert torch.equal((batch["mask"] > 0)[counted], (batch["image"][:, 0] > 110)[counted])


def test_unusable_voc_files_are_named(tmp_path: Path) -> None:
    base = make_voc2012(tmp_path) / "VOCdevkit" / "VOC2012"
    text = (base / "Annotations" / "2008_train0.xml").read_text().replace("cat", "unicorn")
    (base / "Annotations" / "2008_train0.xml").write_text(text)
    with pytest.raises(DataError, match=r"2008_train0\.xml, received 'unicorn'"):
        Voc2012(root=str(tmp_path), size=16).load()
    (base / "SegmentationClass" / "2008_train1.png").unlink()
    with pytest.raises(DataError, match="2008_train1: no file of its name in SegmentationClass"):
        Voc2012("mask", str(tmp_path), size=16).load()
    (base / "ImageSets" / "Segmentation" / "val.txt").write_text("")
    with pytest.raises(DataError, match="an empty file"):
        Voc2012("mask", str(tmp_path), size=16).load()
    with pytest.raises(ValueError, match=r"data\.imbalance=null"):
        Voc2012("mask", imbalance=3.0)


def test_an_archive_in_the_root_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no network: the archive, brought by hand, with `data.download=true`."""
    made = make_voc2012(tmp_path / "made")
    root = tmp_path / "root"
    root.mkdir()
    with tarfile.open(root / "VOCtrainval_11-May-2012.tar", "w") as archive:
        archive.add(made / "VOCdevkit", "VOCdevkit")
    monkeypatch.setattr("torchvision.datasets.utils.check_integrity", lambda path, md5=None: Path(path).is_file())
    assert len(Voc2012(root=str(root), size=16, download=True).load()["test"]) == 4
    (root / "VOCtrainval_11-May-2012.tar").unlink()
    assert len(Voc2012(root=str(root), size=16, download=True).load()["test"]) == 4, "the unpacked files are enough"


# ---- both


SETS = ("pet", "pet_segmentation", "pet_boxes", "voc2012", "voc2012_segmentation")


@pytest.mark.parametrize("name", SETS)
def test_files_that_are_not_there_end_with_exit_3_and_what_to_do(cli: Callable[..., Answer], name: str) -> None:
    task = ["task=segmentation"] if "segmentation" in name else []
    answer = cli("train", f"data={name}", "model=cnn", *task)
    assert answer.code == 3
    assert "data.root=FOLDER, or data.download=true" in answer.err and "Traceback" not in answer.err


@pytest.mark.parametrize("name", ["pet", "voc2012"])
def test_an_unreachable_network_ends_with_exit_3_too(
    cli: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known")

    module = {"pet": "oxford_iiit_pet", "voc2012": "voc"}[name]
    monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", unreachable)
    answer = cli("train", f"data={name}", "model=cnn", "data.download=true")
    assert answer.code == 3
    assert "on a machine with a network" in answer.err


@pytest.mark.parametrize(
    ("name", "task"),
    [("pet", "classification"), ("pet_segmentation", "segmentation"), ("pet_boxes", "localization"),
     ("voc2012", "classification"), ("voc2012", "localization"),
     ("voc2012_segmentation", "segmentation")],
)  # fmt: skip
def test_each_trains_from_the_command_line(cli: Callable[..., Answer], tmp_path: Path, name: str, task: str) -> None:
    make_pets(tmp_path / "sets")
    make_voc2012(tmp_path / "sets")
    answer = cli(
        "train", f"data={name}", f"task={task}", f"data.root={tmp_path / 'sets'}", "data.size=16", "data.val=0.34",
        "data.workers=0", "model=cnn", "model.widths=[4,8]", "trainer.epochs=1", "trainer.device=cpu", "stats=off",
        "trainer.batch_size=8", "trainer.threads=1",
    )  # fmt: skip
    assert answer.code == 0, answer.err


def test_a_plain_colour_is_no_mask(tmp_path: Path) -> None:
    base = make_pets(tmp_path) / "oxford-iiit-pet"
    save_plain(base / "annotations" / "trimaps" / "Abyssinian_trainval0.png", size=(24, 16))
    with pytest.raises(DataError, match="greyscale or palette"):
        OxfordPet(True, str(tmp_path), size=16).load()


# ---- what the lists say


def test_lists_are_read_as_editors_save_them_and_what_is_odd_in_them_is_told(tmp_path: Path) -> None:
    base = make_pets(tmp_path) / "oxford-iiit-pet"
    train = base / "annotations" / "trainval.txt"
    lines = train.read_text().splitlines()
    names = [line.split()[0] for line in lines]
    again = [lines[0], "", "# a remark", lines[1]]
    train.write_bytes("\r\n".join([*lines, *again]).encode("utf-16"))
    test = base / "annotations" / "test.txt"
    test.write_text(test.read_text() + lines[2] + "\n")
    save_plain(base / "images" / "Stray_1.jpg")
    linked = base / "images" / f"{names[4]}.jpg"
    linked.unlink()
    linked.symlink_to("Abyssinian_test0.jpg")
    save_plain(base / "images" / "._Stray_2.jpg")
    data = OxfordPet(root=str(tmp_path), size=16, val=1 / 3)
    splits = data.load()
    assert {name: len(split) for name, split in splits.items()} == {"train": 12, "val": 6, "test": 7}
    twice, shared, unlisted, links = data.findings.notices
    assert twice == f"data: {train} lists {names[0]}, {names[1]} more than once; each counts once"
    assert shared.startswith(f"data: 1 images are in train and in test ({names[2]});")
    assert unlisted == f"data: 1 files of {base / 'images'} are in no list (images/Stray_1.jpg); not used"
    assert links.startswith(f"data: 1 files are in train and in test, by links ({names[4]}, Abyssinian_test0);")
    train.write_bytes(b"Abyssinian_\xff 1 1 1\n")
    with pytest.raises(DataError, match=r"trainval\.txt, line 1: expected text in UTF-8"):
        data.load()


def test_files_that_pets_lack_are_refused_or_left_out(tmp_path: Path) -> None:
    base = make_pets(tmp_path) / "oxford-iiit-pet"
    (base / "images" / "Abyssinian_trainval0.jpg").unlink()
    (base / "annotations" / "trimaps" / "Abyssinian_trainval1.png").unlink()
    (base / "images" / "Abyssinian_trainval2.jpg").write_bytes(b"no image")
    for folder, name in (("images", "Abyssinian_test0.jpg"), ("annotations/trimaps", "Abyssinian_test1.png")):
        (base / folder / name).unlink()
        (base / folder / name).symlink_to("nowhere")
    data = OxfordPet(True, str(tmp_path), size=16, on_error="skip")
    assert sum(len(split) for split in data.load().values()) == 24 - 5
    assert dict(data.findings.left_out).keys() == {
        "Abyssinian_trainval0", "Abyssinian_trainval1", "images/Abyssinian_trainval2.jpg", "Abyssinian_test0",
        "Abyssinian_test1",
    }  # fmt: skip
    save_plain(base / "images" / "Abyssinian_trainval3.png")
    with pytest.raises(DataError, match=r"images/Abyssinian_trainval3\.jpg and images/Abyssinian_trainval3\.png"):
        data.load()


@pytest.mark.parametrize("target", ["box", "mask"])
def test_files_that_voc_lacks_are_refused_or_left_out(tmp_path: Path, target: Any) -> None:
    base = make_voc2012(tmp_path) / "VOCdevkit" / "VOC2012"
    (base / "JPEGImages" / "2008_train0.jpg").unlink()
    wanted = "Annotations/2008_train1.xml" if target == "box" else "SegmentationClass/2008_train1.png"
    (base / wanted).unlink()
    if target == "box":
        os.mkfifo(base / wanted)  # which nobody ever writes to
    (base / "JPEGImages" / "2008_val0.jpg").write_bytes(b"no image")
    save_plain(base / "JPEGImages" / "2007_0.jpg")
    for kind in ("Main", "Segmentation"):
        path = base / "ImageSets" / kind / "train.txt"
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"2008_val1\n2008_train5\n")
    with pytest.raises(DataError, match="2008_train1"):
        Voc2012(target, str(tmp_path), size=16).load()
    data = Voc2012(target, str(tmp_path), size=16, on_error="skip")
    splits = data.load()
    assert len(splits["train"]) + len(splits["val"]) == 12 - 2 + 1 and len(splits["test"]) == 3
    assert dict(data.findings.left_out).keys() == {"2008_train0", "2008_train1", "JPEGImages/2008_val0.jpg"}
    told = "\n".join(data.findings.notices)
    assert "2008_train5 more than once" in told and "1 images are in train and in test (2008_val1)" in told
    assert "(JPEGImages/2007_0.jpg); not used" in told


def test_a_hung_disk_is_waited_for_as_long_as_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting reaches the decoding processes of each set, for images and for masks."""
    make_pets(tmp_path)
    make_voc2012(tmp_path)
    asked: list[float | None] = []

    class Pool(DecodingPool):
        def __init__(self, workers: int, patience: float | None) -> None:
            asked.append(patience)
            super().__init__(0, patience)

    monkeypatch.setattr("cnnlab.data.cache.DecodingPool", Pool)
    common: dict[str, Any] = {"root": str(tmp_path), "size": 16, "workers": 1, "loading": Loading(patience=7.0)}
    for data in (OxfordPet(**common), OxfordPet(masks=True, **common), Voc2012(**common), Voc2012("mask", **common)):
        data.load()
    assert asked == [7.0] * 4, "images and masks of each; images are in the cache the second time"
