"""One file, decoded: how it lies, what its values mean, how large it may be; and the processes that do it."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from cnnlab.data import formats, pixels
from cnnlab.data.decode import Recipe, decode, decode_chunk, hush
from cnnlab.data.gpu_jpeg import is_plain_jpeg
from cnnlab.data.pixels import Depth, checked_range
from cnnlab.data.pool import DecodingPool
from cnnlab.errors import DataError

XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'
WHOLE = Recipe(1, 8, 12, "stretch")


def picture(width: int = 8, height: int = 12) -> Image.Image:
    return Image.fromarray((np.arange(width * height) * 2).astype(np.uint8).reshape(height, width))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("where", ["exif", "xmp"])
def test_an_image_lies_as_pillows_transposition_has_it(orientation: int, kind: str, where: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"exif": exif} if where == "exif" else {"xmp": (XMP % orientation).encode()}
    if kind == "PNG" and where == "xmp":
        from PIL.PngImagePlugin import PngInfo

        options = {"pnginfo": PngInfo()}
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", XMP % orientation)
    if kind == "TIFF" and where == "xmp":
        options = {"tiffinfo": {700: (XMP % orientation).encode()}}
    file = saved(picture().convert("RGB"), kind, **options)
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("L")
    array, size = decode(io.BytesIO(file), Recipe(1, wanted.height, wanted.width, "stretch"))
    assert size == (wanted.height, wanted.width) and np.array_equal(array[0], np.asarray(wanted))
    if kind == "JPEG":
        assert not is_plain_jpeg(file), "a GPU would not turn it"


def test_sixteen_bits_and_floats_by_a_range() -> None:
    values = np.array([[0, 1024, 2048, 4095]], np.uint16)
    file = saved(Image.fromarray(values), "PNG")
    recipe, depth = Recipe(1, 1, 4, "stretch"), Depth()
    assert decode(io.BytesIO(file), recipe, depth)[0].tolist() == [[[0, 4, 8, 16]]]
    assert (depth.images, depth.highest) == (1, 4095)
    ranged = Recipe(1, 1, 4, "stretch", value_range=(0, 4095))
    assert decode(io.BytesIO(file), ranged)[0].tolist() == [[[0, 64, 128, 255]]]
    floats = saved(Image.fromarray(np.array([[-1, 0, 0.5, np.nan]], np.float32)), "TIFF")
    assert decode(io.BytesIO(floats), Recipe(1, 1, 4, "stretch", value_range=(0, 1)))[0].tolist() == [[[0, 0, 128, 0]]]
    with pytest.raises(ValueError, match=r"data\.value_range"):
        decode(io.BytesIO(floats), recipe)
    for wrong in ([1.0], [2.0, 1.0], [0.0, float("inf")]):
        with pytest.raises(ValueError, match=r"value_range=\[LOW,HIGH\]"):
            checked_range(wrong)


def test_too_many_pixels_are_refused_by_name_and_a_large_jpeg_is_halved() -> None:
    bound = Recipe(3, 8, 8, "crop", 8, max_pixels=1000)
    for kind, size in (("PNG", (100, 11)), ("GIF", (1, 4001)), ("JPEG", (64, 63)), ("TIFF", (1, 1001))):
        with pytest.raises(ValueError, match=r"data\.max_pixels"):
            decode(io.BytesIO(saved(Image.new("RGB", size), kind)), bound)
    with pytest.raises(ValueError, match=r"data\.max_pixels"):
        decode(io.BytesIO(saved(Image.new("RGB", (60, 50)), "JPEG", progressive=True)), bound)
    file = saved(Image.new("RGB", (60, 50), (9, 99, 199)), "JPEG", quality=95)
    array, size = decode(io.BytesIO(file), bound)
    assert size == (50, 60) and abs(int(array[2, 4, 4]) - 199) <= 3
    assert not is_plain_jpeg(file, 1000)
    assert Image.MAX_IMAGE_PIXELS is not None and Image.MAX_IMAGE_PIXELS > 10**6, "Pillow's own bound is put back"


def test_what_a_format_takes_in_memory_counts() -> None:
    allowed = {"PNG": 1000, "GIF": 1000, "WEBP": 235, "JPEG2000": 200 * 4, "TIFF": 1000}
    bound = Recipe(3, 8, 8, "crop", 8, max_pixels=1000)
    hush()
    for kind, most in allowed.items():
        decode(io.BytesIO(saved(Image.new("RGB", (20, most // 20)), kind)), bound)
        with pytest.raises(ValueError, match=r"data\.max_pixels=(\d+|NUMBER) to"):
            decode(io.BytesIO(saved(Image.new("RGB", (20, most // 20 + 3)), kind)), bound)
    one_strip = saved(Image.new("RGB", (20, 50)), "TIFF", compression="tiff_deflate", tiffinfo={278: 50})
    with pytest.raises(ValueError, match=r"memory of 2,000; type data\.max_pixels=2000"):
        decode(io.BytesIO(one_strip), bound)
    assert decode(io.BytesIO(one_strip), Recipe(3, 8, 8, "crop", 8, max_pixels=2000))[1] == (50, 20)
    with pytest.raises(ValueError, match="sides of at most"):
        decode(io.BytesIO(saved(Image.new("1", ((1 << 20) + 1, 1)), "PNG")), WHOLE)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "I;16"])
def test_a_large_image_is_turned_and_converted_by_pieces_to_the_same_pixels(
    orientation: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(0).integers(0, 255, (70, 90, 4), np.uint8)
    image = Image.fromarray(values[..., 0].astype(np.uint16) * 250) if mode == "I;16" else Image.fromarray(values)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = saved(image if mode == "I;16" else image.convert(mode), "TIFF", exif=exif)
    recipe = Recipe(3, 16, 16, "crop", 20)
    whole, size = decode(io.BytesIO(file), recipe)
    monkeypatch.setattr(pixels, "_BAND", 1000)
    monkeypatch.setattr(pixels.Pixels, "whole", None)
    pieces, again = decode(io.BytesIO(file), recipe)
    assert size == again == ((90, 70) if orientation > 4 else (70, 90)) and np.array_equal(whole, pieces)


def test_a_tall_strip_is_resized_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    strip = Image.fromarray((np.arange(4000) // 16).astype(np.uint8).reshape(2000, 2))
    recipe = Recipe(1, 20, 30, "stretch")
    whole, _ = decode(io.BytesIO(saved(strip, "PNG")), recipe)
    monkeypatch.setattr(pixels, "_MANY", 1000)
    rows, _ = decode(io.BytesIO(saved(strip, "PNG")), recipe)
    assert np.abs(whole.astype(int) - rows).max() <= 1


def test_of_a_long_strip_only_what_is_kept_is_resized(monkeypatch: pytest.MonkeyPatch) -> None:
    strip = Image.fromarray((np.arange(20_000) // 80).astype(np.uint8)[None])
    asked: list[tuple[int, int]] = []
    whole = Image.Image.resize

    def resize(self: Image.Image, size: tuple[int, int], *arguments: Any, **options: Any) -> Image.Image:
        asked.append(size)
        return whole(self, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", resize)
    array, size = decode(io.BytesIO(saved(strip, "PNG")), Recipe(1, 32, 32, "crop", 32))
    assert asked == [(32, 32)] and size == (1, 20_000) and abs(int(array[0, 16, 16]) - 125) <= 1


def test_a_pipe_is_neither_opened_nor_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    chunk = decode_chunk([str(tmp_path / "a.png"), "/dev/zero"], WHOLE)
    assert [number for number, _ in chunk.failures] == [0, 1] and "expected a file" in chunk.failures[0][1]


@pytest.mark.parametrize("kind", ["ICO", "TIFF", "WEBP", "JPEG2000", "TGA", "PCX", "SGI", "DDS", "QOI"])
def test_a_file_is_read_as_pillow_reads_it_under_any_name(kind: str) -> None:
    file = saved(picture(32, 32).convert("RGBA" if kind == "ICO" else "RGB"), kind)
    with formats.opened(io.BytesIO(file)) as image, Image.open(io.BytesIO(file)) as theirs:
        assert image.format == theirs.format == kind and image.size == theirs.size


def test_a_library_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = saved(picture(64, 64), "TIFF", compression="tiff_lzw")
    (tmp_path / "a.tif").write_bytes(file[: len(file) // 2] + b"\0" * (len(file) - len(file) // 2))
    (tmp_path / "b.tif").write_bytes(file[:-40])
    decode_chunk([str(tmp_path / "a.tif"), str(tmp_path / "b.tif")], WHOLE)
    assert capfd.readouterr() == ("", "")


def test_nothing_in_the_current_folder_takes_the_place_of_a_library(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(saved(picture(), "PNG"))
    for name in ("pickle", "numpy", "copy", "PIL", "struct", "queue"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('executed')")
    code = (
        "import sys; from cnnlab.data.pool import DecodingPool; from cnnlab.data.decode import Recipe\n"
        "sys.path.append(''); sys.path.append(sys.argv[1])\n"
        "pool = DecodingPool(1); chunk = pool.ask(['image.png'], Recipe(1, 8, 8, 'crop', 8)).result()\n"
        "print(chunk.failures, chunk.images.shape); pool.close()"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "[] (1, 1, 8, 8)\n", done.stderr


def test_a_frozen_decoder_is_given_up_with_the_files_name(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(saved(picture(), "PNG"))
    pool = DecodingPool(1, patience=None)
    pool.ask([str(path)], WHOLE).result(60)
    os.kill(pool.pids[0], signal.SIGSTOP)
    asked = pool.ask([str(path)], WHOLE)
    until(lambda: pool._decoders[0].look(0.0) or asked.done())
    with pytest.raises(DataError, match=r"image\.png(.|\n)*loading\.patience"):
        asked.result(0)
    pool.close()
    assert pool.ask([str(path)], WHOLE).result(60).failures == []
    os.kill(pool.pids[0], signal.SIGSTOP)
    (pid,) = pool.pids
    closing = threading.Thread(target=pool.close)
    closing.start()
    closing.join(60)
    assert not closing.is_alive()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_start_takes_nothing_of_a_files_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cnnlab.data.pool._PROGRAM", "import sys; sys.stdin.buffer.read()")
    pool = DecodingPool(1, patience=None)
    asked = pool.ask([str(tmp_path / "image.png")], WHOLE)
    until(lambda: pool._decoders[0]._job)
    pool._decoders[0].look(0.0)
    assert not asked.done()
    monkeypatch.setattr("cnnlab.data.pool._START", 0.0)
    until(lambda: pool._decoders[0].look(0.0) or asked.done())
    with pytest.raises(DataError, match="the start of a decoding process"):
        asked.result(0)
    pool.close()


def test_the_watch_looks_at_each_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(saved(picture(), "PNG"))
    monkeypatch.setattr("cnnlab.data.pool._START", 0.0)
    pool = DecodingPool(1, patience=0.01)
    with pytest.raises(DataError):
        pool.ask([str(path)], WHOLE).result(60)
    pool.close()


def until(condition: Callable[[], object]) -> None:
    """Waits for it, on a busy machine, too; what never comes fails."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
