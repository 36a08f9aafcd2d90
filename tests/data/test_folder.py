"""Image folders: layouts, formats, modes, and what is said of folders that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import GREEN, RED, make_folder, save_plain
from PIL import Image

from cnnlab.data.decode import Recipe, decode
from cnnlab.data.folder import ImageFolder
from cnnlab.errors import DataError
from cnnlab.protocols import Split


def folder(root: Path, **settings: Any) -> ImageFolder:
    return ImageFolder(str(root), **{"size": 8, "cache": str(root.parent / "cache"), **settings})


def whole(split: Split) -> dict[str, torch.Tensor]:
    return split.fetch(torch.arange(len(split)))


def test_class_folders_are_split_by_class(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", {"cat": 20, "dog": 10, "emu": 10})
    (root / "cat" / "notes.txt").write_text("no image")
    (root / ".hidden").mkdir()
    data = folder(root, val=0.1, test=0.2)
    spec, splits = data.spec(), data.load()
    assert spec.classes == ("cat", "dog", "emu") and spec.size == (8, 8) and spec.channels == 3
    counts = {name: torch.bincount(whole(split)["label"]).tolist() for name, split in splits.items()}
    assert counts == {"train": [14, 7, 7], "val": [2, 1, 1], "test": [4, 2, 2]}
    for split in splits.values():
        batch = whole(split)
        assert (batch["image"] == 10 * batch["label"][:, None, None, None]).all()


def test_split_folders_are_kept_and_missing_ones_cut_out_of_train(tmp_path: Path) -> None:
    root = tmp_path / "data"
    make_folder(root / "train", {"a": 10, "b": 10})
    make_folder(root / "valid", {"a": 3, "b": 2})
    splits = folder(root, test=0.2).load()
    assert {name: len(split) for name, split in splits.items()} == {"train": 16, "val": 5, "test": 4}
    as_test = folder(root, val=0.1, val_as_test=True).load()
    assert {name: len(split) for name, split in as_test.items()} == {"train": 18, "val": 2, "test": 5}
    assert torch.equal(whole(as_test["test"])["image"], whole(splits["val"])["image"])


def test_nested_class_folders_are_searched(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", {"a": 4, "b/more": 4})
    make_folder(root / "b", {".": 3})
    splits = folder(root, val=0.2, test=0.2).load()
    assert sum(len(split) for split in splits.values()) == 11


def test_limit_decodes_only_what_is_used(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", {"a": 20, "b": 20})
    every, some = folder(root).load(), folder(root, limit=6).load()
    assert len(some["train"]) == 6
    assert torch.equal(whole(some["test"])["image"], whole(every["test"])["image"])
    assert torch.equal(whole(some["test"])["label"], whole(every["test"])["label"])
    entries = sorted(len(np.load(p, mmap_mode="r")) for p in (tmp_path / "cache").glob("*/images.npy"))
    assert entries == [6 + len(some["val"]) + len(some["test"]), 40]


def test_the_crop_is_the_middle_and_the_aspect_ratio_stays(tmp_path: Path) -> None:
    picture = np.zeros((20, 60, 3), np.uint8)
    picture[:, 20:40] = (255, 0, 0)  # the middle third of a wide image is all that a square crop keeps
    Image.fromarray(picture).save(tmp_path / "wide.png")
    Image.fromarray(picture.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    for name in ("wide.png", "tall.png"):
        array, size = decode(str(tmp_path / name), Recipe(3, 20, 20, "crop", 20))
        assert size == ((20, 60) if name == "wide.png" else (60, 20))
        assert (array[0] == 255).all() and (array[1:] == 0).all()
    larger, _ = decode(str(tmp_path / "wide.png"), Recipe(3, 8, 8, "crop", 16))
    assert larger.shape == (3, 8, 8) and (larger[0] == 255).all()


def test_downscaling_is_antialiased(tmp_path: Path) -> None:
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    Image.fromarray(checks.astype(np.uint8)).save(tmp_path / "checks.png")
    array, _ = decode(str(tmp_path / "checks.png"), Recipe(1, 8, 8, "crop", 8))
    assert abs(array.astype(int) - 127).max() <= 4


def save_mode(path: Path, mode: str) -> None:
    """RED in the file's own mode (its grey value where the mode has no colour)."""
    grey = round(0.299 * RED[0] + 0.587 * RED[1] + 0.114 * RED[2])
    if mode == "I;16":
        Image.fromarray(np.full((10, 12), grey * 257, np.uint16)).save(path)
    elif mode == "RGBA":
        Image.new("RGBA", (12, 10), (*RED, 255)).save(path)
    elif mode in ("L", "LA"):
        Image.new("L", (12, 10), grey).convert(mode).save(path)
    elif mode == "transparent palette":
        image = Image.new("P", (12, 10), 1)
        image.putpalette([0, 0, 0, *RED])
        image.save(path, transparency=0)
    else:
        Image.new("RGB", (12, 10), RED).convert(mode).save(path)


@pytest.mark.parametrize(
    "mode, suffix, tolerance",
    [
        ("RGB", "png", 0),
        ("RGB", "jpg", 6),
        ("RGB", "bmp", 0),
        ("RGB", "tif", 0),
        ("RGB", "gif", 6),
        ("RGB", "ppm", 0),
        ("P", "png", 40),
        ("RGBA", "png", 0),
        ("transparent palette", "png", 0),
        ("CMYK", "jpg", 8),
        ("CMYK", "tif", 2),
    ],
)
def test_colour_modes_decode_to_the_colour(tmp_path: Path, mode: str, suffix: str, tolerance: int) -> None:
    path = tmp_path / f"image.{suffix}"
    save_mode(path, mode)
    array, size = decode(str(path), Recipe(3, 8, 8, "crop", 8))
    assert size == (10, 12)
    assert (abs(array.astype(int) - np.array(RED)[:, None, None]) <= tolerance).all()


@pytest.mark.parametrize("mode, suffix", [("L", "png"), ("LA", "png"), ("I;16", "png"), ("I;16", "tif"), ("L", "jpg")])
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_modes_decode_to_the_level(tmp_path: Path, mode: str, suffix: str, channels: int) -> None:
    path = tmp_path / f"image.{suffix}"
    save_mode(path, mode)
    array, _ = decode(str(path), Recipe(channels, 8, 8, "crop", 8))
    assert array.shape == (channels, 8, 8)
    assert (abs(array.astype(int) - 82) <= 1).all()


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    array, _ = decode(str(tmp_path / "clear.png"), Recipe(3, 8, 8, "crop", 8))
    assert (array == 255).all()


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    picture = np.zeros((16, 8, 3), np.uint8)
    picture[:8] = GREEN  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: the upper half becomes the right one
    Image.fromarray(picture).save(tmp_path / "turned.png", exif=exif)
    array, size = decode(str(tmp_path / "turned.png"), Recipe(3, 8, 16, "stretch"))
    assert size == (8, 16)
    assert (array[:, :, 8:] == np.array(GREEN)[:, None, None]).all() and (array[:, :, :8] == 0).all()


def test_a_broken_file_is_named_or_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make_folder(tmp_path / "data", {"a": 10, "b": 10})
    (root / "a" / "003.png").write_bytes((root / "a" / "003.png").read_bytes()[:40])
    (root / "b" / "x.jpg").write_text("this is no JPEG")
    with pytest.raises(DataError) as caught:
        folder(root).load()
    assert "2 of 21" in str(caught.value) and "data.on_error=skip" in str(caught.value)
    assert "a/003.png" in str(caught.value) and "b/x.jpg" in str(caught.value)
    assert not list((tmp_path / "cache").iterdir()), "a refused folder leaves nothing in the cache"
    splits = folder(root, on_error="skip").load()
    assert sum(len(split) for split in splits.values()) == 19
    (told,) = caplog.messages
    assert told.startswith("2 of 21 files are unreadable and left out: a/003.png: ")
    with pytest.raises(DataError, match="2 of 21"):
        folder(root).load()


def test_many_broken_files_are_counted(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", {"a": 3, "b": 1})
    for n in range(9):
        (root / "a" / f"broken{n}.png").write_text("")
    with pytest.raises(DataError, match="and 4 more"):
        folder(root).load()


def test_unusable_folders_say_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"received nothing; type data\.root=FOLDER"):
        folder(tmp_path / "nowhere").spec()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="received a file"):
        folder(tmp_path / "file").spec()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="one folder a class"):
        folder(tmp_path / "empty").spec()
    make_folder(tmp_path / "single", {"cat": 3})
    with pytest.raises(DataError, match="two classes at least in .*single, received cat alone"):
        folder(tmp_path / "single").spec()
    save_plain(tmp_path / "flat" / "1.png")
    with pytest.raises(DataError, match="received 1 image in none"):
        folder(tmp_path / "flat").spec()
    make_folder(tmp_path / "bare" / "val", {"a": 1})
    with pytest.raises(DataError, match="expected a folder `train`"):
        folder(tmp_path / "bare").spec()
    make_folder(tmp_path / "odd" / "train", {"a": 1})
    make_folder(tmp_path / "odd" / "test", {"b": 1})
    with pytest.raises(DataError, match="received b besides"):
        folder(tmp_path / "odd").spec()
    with pytest.raises(DataError, match="val_as_test=false"):
        folder(tmp_path / "odd", val_as_test=True).spec()
    save_plain(tmp_path / "hollow" / "a" / "1.png")
    (tmp_path / "hollow" / "b").mkdir()
    with pytest.raises(DataError, match="every class folder"):
        folder(tmp_path / "hollow").load()


def test_refused_combinations() -> None:
    with pytest.raises(ValueError, match=r"data\.resize"):
        ImageFolder("x", size=64, resize=32)
    with pytest.raises(ValueError, match=r"data\.val"):
        ImageFolder("x", val=0.5, test=0.5)


def test_the_images_own_size_is_taken_where_they_are_square_and_alike(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "alike" / name).mkdir(parents=True)
        (tmp_path / "mixed" / name).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "alike" / name / "a.png")
        Image.new("RGB", (20, 20 if name == "cat" else 30)).save(tmp_path / "mixed" / name / "a.png")
    assert ImageFolder(str(tmp_path / "alike")).spec().size == (20, 20)
    assert ImageFolder(str(tmp_path / "mixed")).spec().size == (64, 64)
    assert ImageFolder(str(tmp_path / "alike"), size=8).spec().size == (8, 8)
