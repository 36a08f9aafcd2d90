"""`data.size=null`: all headers decide, and nothing that cannot be read does."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from image_files import save_plain
from PIL import Image

from cnnlab.data import headers
from cnnlab.data.folder import ImageFolder
from cnnlab.errors import DataError


def make(root: Path, sizes: list[tuple[int, int]]) -> Path:
    """Classes a and b with an image of each size."""
    for kind in "ab":
        for n, size in enumerate(sizes):
            save_plain(root / kind / f"{n:03d}.png", size=size)
    return root


def folder(root: Path, **settings: Any) -> ImageFolder:
    given = {"cache": str(root.parent / "cache"), "val": 0.2, "test": 0.2, "workers": 0}
    return ImageFolder(str(root), **{**given, **settings})


def bomb(path: Path) -> None:
    """A PNG of 60,000 x 60,000 pixels, by its header."""
    content = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + content + struct.pack(">I", zlib.crc32(content)))


def test_two_icons_do_not_decide_over_photos(tmp_path: Path):
    root = make(tmp_path / "data", [(8, 8)] + [(160, 120)] * 20)
    data = folder(root)
    image = data.load()["train"].fetch(torch.arange(1))["image"]
    assert data.spec().size == (64, 64) == tuple(image.shape[2:])
    assert data.findings.notices == [
        "data: photos are 160x120 at the median and are taken at 64x64; data.size=96 sees more"
    ]


@pytest.mark.parametrize("where", ["a/000.png", "b/999.png"])
def test_a_file_that_cannot_be_read_decides_nothing(tmp_path: Path, where: str):
    root = make(tmp_path / "data", [(32, 32)] * 5)
    for spoil in (lambda path: path.write_text("no image"), bomb):
        spoil(root / where)
        assert folder(root).spec().size == (32, 32)
        with pytest.raises(DataError, match=where):
            folder(root).load()
        data = folder(root, on_error="skip")
        assert sum(len(split) for split in data.load().values()) == (10 if where == "b/999.png" else 9)
        assert [name for name, _ in data.findings.left_out] == [where]


def test_an_odd_file_is_named_with_what_keeps_the_others(tmp_path: Path):
    root = make(tmp_path / "data", [(28, 28)] * 30)
    save_plain(root / "b" / "odd.png", size=(30, 28))
    data = folder(root)
    data.load()
    assert data.spec().size == (64, 64) and data.findings.notices == [
        "data: most images are 28x28 and are taken at 64x64, as b/odd.png has another size; "
        "data.size=28 takes them as they are"
    ]


def test_all_splits_decide(tmp_path: Path):
    make(tmp_path / "data" / "train", [(20, 20)] * 5)
    make(tmp_path / "data" / "val", [(20, 20)] * 2)
    assert folder(tmp_path / "data").spec().size == (20, 20)
    save_plain(tmp_path / "data" / "val" / "a" / "x.png", size=(40, 40))
    assert folder(tmp_path / "data").spec().size == (64, 64)


@pytest.mark.parametrize(
    "size, better", [((500, 375), 224), ((180, 200), 160), ((375, 500), 224), ((100, 90), None), ((300, 300), 224)]
)
def test_photos_larger_than_what_is_taken_are_told(tmp_path: Path, size: tuple[int, int], better: int | None):
    root = make(tmp_path / "data", [size] * 3)
    data = folder(root)
    data.load()
    wanted = f"data: photos are {size[0]}x{size[1]} at the median and are taken at 64x64; data.size={better} sees more"
    assert data.findings.notices == ([wanted] if better else [])
    given = folder(root, size=64)
    given.load()
    assert given.findings.notices == [], "who typed a size knows"


def test_the_median_is_of_images_as_they_are_shown(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in "ab":
        for n in range(3):
            (tmp_path / "data" / kind).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (400, 300)).save(tmp_path / "data" / kind / f"{n}.jpg", exif=exif)
    data = folder(tmp_path / "data")
    data.load()
    assert "photos are 300x400" in data.findings.notices[0]


def test_headers_are_read_once_for_files_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = make(tmp_path / "data", [(20, 20)] * 5)
    assert folder(root).spec().size == (20, 20)
    read: list[str] = []
    size = headers._size
    monkeypatch.setattr(headers, "_size", lambda path: read.append(path) or size(path))
    assert folder(root).spec().size == (20, 20) and read == []
    save_plain(root / "a" / "000.png", size=(24, 20))
    assert folder(root).spec().size == (64, 64) and read
    for path in (tmp_path / "cache").glob("*.headers.json"):
        path.write_text("[torn")
    assert folder(root).spec().size == (64, 64)
