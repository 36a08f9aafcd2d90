"""Which files are taken for images, and as what they are read."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from cnnlab.data.decode import Recipe, decode
from cnnlab.data.formats import _SUFFIXES, EXTENSIONS, opened

NOT_DECODED = {"EPS", "WMF", "PDF", "PALM", "MPEG", "BUFR", "GRIB", "HDF5", "IPTC"}
"""An interpreter's, written only, or recognized only."""


def test_extensions_mean_what_they_mean_to_pillow():
    Image.init()
    own = {f".{suffix}": name for name, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}
    known = Image.registered_extensions()
    assert {known[extension] for extension in EXTENSIONS & set(known)} - {"MPO"} <= set(_SUFFIXES)
    assert all(own[ext] == known[ext] for ext in EXTENSIONS & set(known) if known[ext] != "MPO")
    assert not EXTENSIONS & {ext for ext, name in known.items() if name in NOT_DECODED}
    assert {".jpg", ".jfif", ".jpe", ".png", ".tga", ".webp", ".tif", ".j2k"} <= EXTENSIONS


@pytest.mark.parametrize("suffix", ["jfif", "tga", "webp", "pcx", "ico", "sgi", "dib", "pnm"])
def test_a_file_of_each_format_is_read(tmp_path: Path, suffix: str):
    Image.init()
    Image.new("RGB", (16, 16), (255, 0, 0)).save(tmp_path / f"a.{suffix}", "JPEG" if suffix == "jfif" else None)
    array, size = decode(str(tmp_path / f"a.{suffix}"), Recipe(3, 8, 8, "crop", 8))
    assert size == (16, 16) and array[0].min() > 250 and array[1:].max() < 5


def test_an_eps_file_under_another_name_reaches_no_interpreter(tmp_path: Path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(OSError, match="cannot identify"):
        opened(str(tmp_path / "a.png"))
    with pytest.raises(OSError, match="cannot identify"), (tmp_path / "a.png").open("rb") as file:
        opened(file)


def test_the_content_decides_not_the_name(tmp_path: Path):
    Image.new("RGB", (5, 4)).save(tmp_path / "a.webp")
    (tmp_path / "a.webp").rename(tmp_path / "a.png")
    with (tmp_path / "a.png").open("rb") as file, opened(file) as image:
        assert (image.format, image.size) == ("WEBP", (5, 4))
