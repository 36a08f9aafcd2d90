"""Masks as people have them: palettes, grey values, colours, other sizes, lossy formats, files that are missing."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from cli_runs import TINY, Answer
from PIL import Image

from cnnlab.data import pairs
from cnnlab.data.decode import Fitted, Recipe, decode, decode_chunk
from cnnlab.data.masks import MaskFolder
from cnnlab.errors import DataError
from cnnlab.protocols import VOID

Array = np.ndarray[Any, Any]
NUMBERS = np.array([0, 1, 2, 1, 0, VOID, 2, 0], np.uint8)[:, None].repeat(8, 1)
"""Of three classes, and void in a row."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CNNLAB_CACHE", str(tmp_path / "cache"))


def put(path: Path, array: Array, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def make(root: Path, mask: Array, count: int = 5, classes: str = "sky\nroad\ncar\n", suffix: str = "png") -> Path:
    """`count` images, in one folder, all with the same mask."""
    for number in range(count):
        put(root / "images" / f"{number}.png", np.full((*mask.shape[:2], 3), number, np.uint8))
        put(root / "masks" / f"{number}.{suffix}", mask)
    if classes:
        (root / "classes.txt").write_text(classes)
    return root


def read(root: Path, **settings: Any) -> tuple[Array, list[str], MaskFolder]:
    """The first training mask (all are alike), what is told, and the data."""
    data = MaskFolder(str(root), **{"size": (8, 8), "fit": "stretch", "val": 0.2, "test": 0.2, **settings})
    data.spec()
    masks = data.load()["train"].fetch(torch.arange(2))["mask"]
    assert torch.equal(masks[0], masks[1])
    return masks[0].numpy(), data.findings.notices, data


def as_values(*values: int) -> Array:
    """NUMBERS with other values in the place of its three classes, void as it is."""
    return np.array([*values, *range(len(values), 256)], np.uint8)[NUMBERS]


def as_colours(*colours: tuple[int, int, int], void: tuple[int, int, int]) -> Array:
    table = np.full((256, 3), void, np.uint8)
    table[: len(colours)] = colours
    return table[NUMBERS]


# ---- values


def test_images_and_masks_may_lie_in_one_folder_each_and_in_subfolders(tmp_path: Path) -> None:
    root = make(tmp_path / "set", NUMBERS)
    for kind in ("images", "masks"):
        (root / kind / "town").mkdir()
        (root / kind / "0.png").rename(root / kind / "town" / "1.png")
    mask, told, _ = read(root)
    assert np.array_equal(mask, NUMBERS) and told == []


def test_of_a_palette_the_indices_count_whatever_its_colours(tmp_path: Path) -> None:
    root = make(tmp_path, NUMBERS)
    for path in (root / "masks").iterdir():
        image = Image.fromarray(NUMBERS)
        image.putpalette([value for index in range(256) for value in (255 - index, 7, index)])
        image.save(path, transparency=0)
    mask, told, _ = read(root)
    assert np.array_equal(mask, NUMBERS) and told == []


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "LA", "I;16", "bmp", "webp"])
def test_grey_is_grey_however_it_was_saved(tmp_path: Path, kind: str) -> None:
    root = make(tmp_path, NUMBERS)
    for path in [*(root / "masks").iterdir()]:
        path.unlink()
        if kind in ("bmp", "webp"):
            Image.fromarray(NUMBERS).convert("RGB").save(
                path.with_suffix(f".{kind}"), **{"lossless": True} if kind == "webp" else {}
            )
        elif kind == "I;16":
            Image.fromarray(NUMBERS.astype(np.uint16)).save(path)
        else:
            Image.fromarray(NUMBERS).convert(kind).save(path)
    mask, told, _ = read(root)
    assert np.array_equal(mask, NUMBERS) and told == []


def test_as_many_values_as_classes_are_read_in_their_order_and_told(tmp_path: Path) -> None:
    mask, told, _ = read(make(tmp_path, as_values(10, 128, 200)))
    assert np.array_equal(mask, NUMBERS)
    assert told == [
        "data: masks are read as 10 sky, 128 road, 200 car, 255 void; data.values=[10,128,200] says so for certain"
    ]


@pytest.mark.parametrize(
    ("values", "classes", "typed"),
    [
        ((0, 255), "cat\ndog\n", "data.values=[0,255]"),
        ((0, 128, 255), "sky\nroad\ncar\n", "data.values=[0,128,255]"),
        ((0, 1, 2, 3), "sky\nroad\ncar\n", "data.values=1 data.ignore=[0]"),
        ((0, 1, 2, 3), "sky\nroad\ncar\n", "data.ignore=[3]"),
        ((0, 7), "sky\nroad\ncar\n", "data.values=[...]"),
        (range(60), "sky\nroad\ncar\n", "smeared"),
    ],
)  # fmt: skip
def test_what_can_be_read_in_several_ways_is_refused_with_what_to_type(
    tmp_path: Path, values: Any, classes: str, typed: str
) -> None:
    mask = np.resize(np.array(values, np.uint8), (8, 8))
    with pytest.raises(DataError) as refused:
        read(make(tmp_path, mask, classes=classes))
    message = str(refused.value)
    assert typed in message and str(tmp_path) in message
    suggested = [re.findall(r"data\.(\w+)=(\S+?)(?:,?\s|$)", part) for part in re.split(r"type |, or ", message)[1:]]
    suggested = [options for options in suggested if options]
    for options in suggested if "..." not in typed else ():
        settings = {name: yaml.safe_load(value) for name, value in options}
        read(tmp_path, **{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
    assert suggested or typed == "smeared"


@pytest.mark.parametrize("fit", ["stretch", "letterbox"])
def test_a_255_that_is_named_is_a_class_and_what_lies_around_is_void(tmp_path: Path, fit: Any) -> None:
    half = np.where(np.arange(8) < 4, 0, 255).astype(np.uint8)[None].repeat(4, 0)
    mask, told, data = read(make(tmp_path, half, classes="cat\ndog\n"), values=(0, 255), fit=fit)
    around = VOID if fit == "letterbox" else 0
    assert (mask[:2, :4] == around).all() and (mask[2:6, :4] == 0).all() and (mask[2:6, 4:] == 1).all()
    assert told == [] and data.spec().mask_classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("options", "values"),
    [
        ({"values": 1, "ignore": (0,)}, (1, 2, 3, 0)),
        ({"values": 100, "ignore": (7,)}, (100, 101, 102, 7)),
        ({"values": (9, 3, 6), "ignore": (0, 1)}, (9, 3, 6, 1)),
        ({"ignore": (200,)}, (0, 1, 2, 200)),
    ],
)  # fmt: skip
def test_values_are_shifted_named_and_ignored(tmp_path: Path, options: Any, values: tuple[int, ...]) -> None:
    table = np.array([*values[:3], *[0] * 252, values[3]], np.uint8)
    mask, told, _ = read(make(tmp_path, table[NUMBERS]), **options)
    assert np.array_equal(mask, NUMBERS) and told == []


def test_a_value_without_a_meaning_is_refused_by_name_and_may_be_left_out(tmp_path: Path) -> None:
    root = make(tmp_path, as_values(1, 2, 3))
    put(root / "masks" / "3.png", as_values(1, 2, 9))
    with pytest.raises(DataError, match=r"masks/3\.png: expected 1, 2, 3, 255 in a mask, received 9"):
        read(root, values=1)
    _, _, data = read(root, values=1, on_error="skip")
    assert [name for name, _ in data.findings.left_out] == ["masks/3.png"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"values": (0, 1), "colours": ((0, 0, 0),)}, "received both"),
        ({"values": (0, 0, 1)}, "once"),
        ({"values": (0, 1, 2), "ignore": (2,)}, "either as a class or as void"),
        ({"values": (0, 1)}, "each of the 3 classes"),
        ({"values": 254}, "up to 255"),
        ({"ignore": (0,)}, "data.values=1 too"),
        ({"ignore": ((0, 0, 0),)}, "expected values"),
        ({"colours": ((0, 0),)}, "three values"),
        ({"colours": ((0, 0, 0), (1, 1, 1), (2, 2, 2)), "ignore": (0,)}, "expected colours"),
    ],
)  # fmt: skip
def test_options_that_contradict_each_other_are_refused(tmp_path: Path, options: Any, told: str) -> None:
    root = make(tmp_path, NUMBERS, count=1)
    with pytest.raises(ValueError, match=told):
        MaskFolder(str(root), **options).spec()


def test_what_values_there_are_is_remembered_and_found_again_where_that_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make(tmp_path / "set", as_values(10, 128, 200))
    first, told, _ = read(root)
    looks: list[int] = []
    look = pairs._Inside._found
    monkeypatch.setattr(pairs._Inside, "_found", lambda inside: looks.append(1) or look(inside))
    assert np.array_equal(read(root)[0], first) and read(root)[1] == told and not looks
    for path in (tmp_path / "cache").glob("*.values.json"):
        path.write_bytes(path.read_bytes()[:-9])
    assert np.array_equal(read(root)[0], first) and read(root)[1] == told and len(looks) == 2, "raw, and as classes"


# ---- colours


BLUE, GREY, RED, BLACK = (0, 0, 200), (90, 90, 90), (200, 0, 0), (0, 0, 0)


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "P"])
def test_colours_by_a_list(tmp_path: Path, kind: str) -> None:
    root = make(tmp_path, as_colours(BLUE, GREY, RED, void=BLACK))
    for path in (root / "masks").iterdir():
        image = Image.open(path)
        (image.quantize(8) if kind == "P" else image.convert(kind)).save(path)
    mask, told, _ = read(root, colours=(BLUE, GREY, RED), ignore=(BLACK,))
    assert np.array_equal(mask, NUMBERS) and told == []
    with pytest.raises(DataError, match=r"3 colours of data\.colours in a mask, received 1 others, as \(0, 0, 0\)"):
        read(root, colours=(BLUE, GREY, RED))


@pytest.mark.parametrize(
    "text",
    [
        "0 0 200\t\tsky\n200 0 0 car\n90 90 90 road\n0 0 0 void\n",
        "\ufeffname,r,g,b\r\nsky,0,0,200\r\nroad,90,90,90\r\ncar,200,0,0\r\nvoid,0,0,0\r\n",
    ],
    ids=["label_colors.txt", "class_dict.csv"],
)
def test_colours_by_a_file_as_camvid_has_it(tmp_path: Path, text: str) -> None:
    root = make(tmp_path, as_colours(BLUE, GREY, RED, void=BLACK))
    (root / "colours.txt").write_bytes(text.encode())
    mask, told, data = read(root, colours=str(root / "colours.txt"))
    assert np.array_equal(mask, NUMBERS) and data.spec().mask_classes == ("sky", "road", "car")
    assert told == [f"data: no class of this set, and so void, are these of {root / 'colours.txt'}: void"]


def test_a_class_may_have_several_colours_and_the_file_may_name_the_classes(tmp_path: Path) -> None:
    root = make(tmp_path, as_colours(BLUE, GREY, RED, void=BLACK), classes="")
    (root / "colours.txt").write_text("0 0 200 sky\n90 90 90 ground below\n200 0 0 ground below\n0 0 0 sky\n")
    mask, told, data = read(root, colours=str(root / "colours.txt"))
    assert data.spec().mask_classes == ("sky", "ground below") and told == []
    assert np.array_equal(mask, np.isin(NUMBERS, (1, 2)))


def test_a_file_of_colours_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    root = make(tmp_path, as_colours(BLUE, GREY, RED, void=BLACK))
    path = root / "colours.txt"
    for text, told in (("0 0 200 sky\n", "received none of road, car"), ("0 0 300 sky\nx", "line 2"), ("", "none"),
                       ("0 0 0 sky\n0 0 0 car\n", r"line 2: .* \(0, 0, 0\) for sky and car")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(DataError, match=told):
            read(root, colours=str(path))
    with pytest.raises(DataError, match=r"received colours, as \(0, 0, 200\); say by data\.colours"):
        read(root)


# ---- formats that smear


@pytest.mark.parametrize(("suffix", "options"), [("jpg", {}), ("webp", {}), ("tif", {"compression": "jpeg"})])
def test_a_format_that_smears_values_is_refused_by_name(tmp_path: Path, suffix: str, options: Any) -> None:
    root = make(tmp_path, NUMBERS, count=8)
    (root / "masks" / "2.png").unlink()
    put(root / "masks" / f"2.{suffix}", NUMBERS, **options)
    with pytest.raises(
        DataError, match=rf"masks/2\.{suffix}: expected a mask in a format that keeps each value \(PNG\)"
    ):
        read(root)
    _, _, data = read(root, on_error="skip")
    assert [name for name, _ in data.findings.left_out] == [f"masks/2.{suffix}"]


# ---- sizes


def test_a_mask_of_another_size_is_refused_left_out_or_scaled(tmp_path: Path) -> None:
    root = make(tmp_path / "set", NUMBERS)
    put(root / "masks" / "1.png", NUMBERS[::2, ::2])
    with pytest.raises(DataError, match=r"received 1 of another:\n  masks/1\.png: .* 8 x 8, received 4 x 4"):
        read(root)
    assert [name for name, _ in read(root, on_error="skip")[2].findings.left_out] == ["masks/1.png"]
    data = MaskFolder(str(root), size=(8, 8), val=0.2, test=0.2, scale_masks=True)
    split = data.load()["train"]
    assert data.findings.notices == [
        "data: 1 masks have another size than their images (masks/1.png), and are scaled to it"
    ]
    batch = split.fetch(torch.arange(len(split)))
    for number, mask in zip(batch["image"][:, 0, 0, 0].tolist(), batch["mask"].numpy()):
        assert np.array_equal(mask, NUMBERS[::2].repeat(2, 0) if number == 1 else NUMBERS)


def test_a_mask_that_lies_across_its_image_is_not_scaled(tmp_path: Path) -> None:
    """The image is turned by its EXIF, and the mask was painted on what is not."""
    root = make(tmp_path, NUMBERS[:, :4], count=8)
    put(root / "masks" / "1.png", NUMBERS[:, :4].T)
    with pytest.raises(DataError, match=r"masks/1\.png: .* 8 x 4, received 4 x 8; turn it as its image is shown"):
        read(root, scale_masks=True)
    _, told, data = read(root, scale_masks=True, on_error="skip")
    assert [name for name, _ in data.findings.left_out] == ["masks/1.png"]
    assert told == ["data: 1 masks have another size than their images (masks/1.png), and are left out"]


@pytest.mark.parametrize("fit", ["letterbox", "crop"])
def test_a_scaled_mask_takes_its_images_place_to_the_pixel(tmp_path: Path, fit: Any) -> None:
    """101 x 75 is letterboxed to another place than a third of it, 34 x 25."""
    big = np.zeros((75, 101), np.uint8)
    big[20:60, 30:90] = 1
    whole = put(tmp_path / "big.png", big)
    small = put(tmp_path / "small.png", big[1::3, 1::3])
    recipe = Recipe(1, 180, 240, fit, resize=240 if fit == "crop" else 0, mask=True)
    (wanted, _), (alone, _) = decode(str(whole), recipe), decode(str(small), recipe)
    chunk = decode_chunk([Fitted(str(small), (75, 101))], recipe)
    got = chunk.images[0]
    assert np.array_equal(got == VOID, wanted == VOID) and tuple(chunk.sizes[0]) == (25, 34)
    assert fit == "crop" or not np.array_equal(alone == VOID, wanted == VOID)
    assert (got != wanted).mean() < 0.05, "but for the edges"


# ---- files that are missing


def test_missing_masks_are_refused_or_left_out_and_surplus_ones_counted(tmp_path: Path) -> None:
    root = make(tmp_path, NUMBERS, count=8)
    (root / "masks" / "3.png").rename(root / "masks" / "3_L.png")
    with pytest.raises(DataError, match=r"none for 1 of 8:\n  images/3\.png: no mask .*\n.*there is masks/3_L\.png"):
        read(root)
    _, told, data = read(root, on_error="skip")
    with pytest.raises(DataError) as refused:
        read(root)
    assert "data.mask_name" not in str(refused.value), "the others are called as their images"
    assert data.findings.left_out == [("images/3.png", "no mask of its name in masks, for train")]
    assert told == [
        "data: 1 masks have no image (masks/3_L.png); not used",
        "data: 1 images have no mask, and are left out (images/3.png)",
    ]
    for path in (root / "masks").iterdir():
        path.rename(path.with_stem(path.stem + "_gt"))
    with pytest.raises(DataError, match="none for 8 of 8"):
        read(root, on_error="skip")


@pytest.mark.parametrize("name", ["*_L", "mask_*", "gt.*.labels"])
def test_masks_may_be_called_after_their_images(tmp_path: Path, name: str) -> None:
    """CamVid's are `0001TP_006690_L.png`."""
    root = make(tmp_path, NUMBERS, count=11)
    for path in [*(root / "masks").iterdir()]:
        path.rename(path.with_stem(name.replace("*", path.stem)))
    with pytest.raises(DataError, match="none for 11 of 11") as refused:
        read(root)
    assert f"type data.mask_name='{name}'" in str(refused.value)
    mask, told, _ = read(root, mask_name=name)
    assert np.array_equal(mask, NUMBERS) and told == []
    put(root / "masks" / "1.png", NUMBERS)
    assert read(root, mask_name=name)[1] == ["data: 1 masks have no image (masks/1.png); not used"]
    with pytest.raises(ValueError, match=r"one \* for the image's name"):
        MaskFolder(str(root), mask_name="_L")


def test_what_two_splits_share_by_links_is_told(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for split in ("train", "val", "test"):
        part = make(tmp_path / split, NUMBERS, count=3)
        for kind in ("images", "masks"):
            (root / kind).mkdir(parents=True, exist_ok=True)
            (part / kind).rename(root / kind / split)
    (root / "classes.txt").write_text("sky\nroad\ncar\n")
    (root / "images" / "val" / "1.png").unlink()
    os.link(root / "images" / "train" / "2.png", root / "images" / "val" / "1.png")
    _, told, data = read(root, val=0.1)
    assert data.train_samples() == 3
    assert len(told) == 1 and "1 files are in train and in val, by links" in told[0]


def test_without_a_folder_for_training_the_others_are_no_splits_to_choose_from(tmp_path: Path) -> None:
    root = make(tmp_path / "set", NUMBERS)
    for kind in ("images", "masks"):
        (root / kind).rename(root / "val")
        (root / kind).mkdir()
        (root / "val").rename(root / kind / "val")
    with pytest.raises(DataError, match="a folder `train` beside val"):
        read(root)


# ---- a whole run


def test_a_val_split_of_void_ends_with_the_last_weights_and_says_so(cli: Callable[..., Answer], tmp_path: Path) -> None:
    root = tmp_path / "set"
    for split in ("train", "val", "test"):
        part = make(tmp_path / split, np.full_like(NUMBERS, VOID) if split == "val" else NUMBERS, count=4)
        for kind in ("images", "masks"):
            (root / kind).mkdir(parents=True, exist_ok=True)
            (part / kind).rename(root / kind / split)
    (root / "classes.txt").write_text("sky\nroad\ncar\n")
    answer = cli(
        "train",
        *TINY[1:],
        "data=masks",
        f"data.root={root}",
        "data.size=[8,8]",
        "task=segmentation",
        "hydra.run.dir=run",
    )
    assert answer.code == 0, answer.err
    assert "val has no pixel that is not void" in answer.out
    tested = cli("eval", "run")
    assert tested.code == 0 and "test/mean_iou" in tested.out, tested.err
