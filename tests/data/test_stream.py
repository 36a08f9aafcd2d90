"""Streams: the same batches as the decoded cache, in the same order, from processes that leave nothing behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lab_runs import no_waiting
from PIL import Image

from cnnlab.data.choice import with_decoder
from cnnlab.data.decode import Recipe, decode
from cnnlab.data.folder import ImageFolder
from cnnlab.data.gpu_jpeg import GpuJpegs, is_plain_jpeg
from cnnlab.data.loader import Loader
from cnnlab.data.pool import DecodingPool
from cnnlab.data.splits import TensorSplit
from cnnlab.data.stream import StreamSplit, streams
from cnnlab.errors import DataError, UsageError
from cnnlab.protocols import Batch, Split
from cnnlab.schema import DataPath, Decoder, Loading


def photos(root: Path, count: int = 12, **options: Any) -> Path:
    """Noisy JPEG files of several sizes in two classes."""
    draw = np.random.default_rng(0)
    for n in range(2 * count):
        path = root / ("cat", "dog")[n % 2] / f"{n:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (20 + n % 5, 24 + n % 3, 3), np.uint8)).save(path, **options)
    return root


def splits_of(root: Path, path: str, workers: int = 0, **settings: Any) -> dict[str, Split]:
    loading = Loading(path=DataPath(path), workers=workers)
    cache = str(root.parent / "cache")
    return ImageFolder(str(root), **{"size": 8, "resize": 10, "cache": cache, "loading": loading, **settings}).load()


def batches(split: Split, rank: int = 0, world: int = 1, start: int = 0) -> list[Batch]:
    loader = Loader(split, 5, seed=3, shuffle=True, rank=rank, world=world)
    return [batch for batch, _ in loader.batches(2, start)]


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert all(one[name].dtype == other[name].dtype for name in one)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_serves_the_batches_of_the_cache(tmp_path: Path, workers: int) -> None:
    root = photos(tmp_path / "data")
    mapped, stream = splits_of(root, "mapped"), splits_of(root, "stream", workers)
    assert all(isinstance(split, TensorSplit) for split in mapped.values())
    assert all(isinstance(split, StreamSplit) for split in stream.values())
    for name in ("train", "val"):
        assert_equal(batches(stream[name]), batches(mapped[name]))
        assert stream[name].labels is not None and torch.equal(stream[name].labels, mapped[name].labels)
    assert_equal(batches(stream["train"], start=2), batches(mapped["train"])[2:])
    # 16 training samples: on three ranks, two have no part of the last batch.
    for rank in range(3):
        assert_equal(batches(stream["train"], rank, 3), batches(mapped["train"], rank, 3))


def test_a_stream_stores_no_pixels_and_its_fingerprint_is_of_the_files(tmp_path: Path) -> None:
    root = photos(tmp_path / "data")
    first = splits_of(root, "stream")["train"]
    assert not (tmp_path / "cache").exists()
    os.utime(root / "cat" / "000.jpg", (0, 0))
    assert splits_of(root, "stream")["train"].fingerprint == first.fingerprint, "a copy has other times"
    assert splits_of(root, "stream", size=9)["train"].fingerprint != first.fingerprint
    Image.new("RGB", (30, 30)).save(root / "cat" / "000.jpg")
    assert splits_of(root, "stream")["train"].fingerprint != first.fingerprint


def test_the_choice_follows_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"bytes": 1000}
    usage = type("Usage", (), {"free": property(lambda _: free["bytes"])})()
    monkeypatch.setattr("cnnlab.data.stream.shutil.disk_usage", lambda _: usage)
    auto, folder = Loading(), tmp_path / "not" / "yet"
    assert streams(auto, 501, folder, cached=False) and not streams(auto, 500, folder, cached=False)
    assert not streams(auto, 501, folder, cached=True)
    assert streams(Loading(path=DataPath.stream), 1, folder, cached=True)
    assert not streams(Loading(path=DataPath.mapped), 10**9, folder, cached=False)


def test_a_broken_file_is_named_when_its_batch_is_due(tmp_path: Path) -> None:
    root = photos(tmp_path / "data")
    whole = root / "cat" / "004.jpg"
    whole.write_bytes(whole.read_bytes()[:300])
    with pytest.raises(DataError, match=r"cat/004\.jpg(.|\n)*data\.on_error=skip"):
        for split in splits_of(root, "stream").values():
            batches(split)
    (root / "cat" / "006.jpg").write_text("no image")
    stream, mapped = splits_of(root, "stream", on_error="skip"), splits_of(root, "mapped", on_error="skip")
    assert sum(len(split) for split in stream.values()) == 22
    for name in stream:
        assert_equal(batches(stream[name]), batches(mapped[name]))


def test_a_stream_tells_of_dark_images_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for n in range(12):
        path = tmp_path / "data" / "ab"[n % 2] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 300 * n, np.uint16)).save(path)
    split = splits_of(tmp_path / "data", "stream")["train"]
    for _ in range(2):
        batches(split)
    told = [record.message for record in caplog.records if "value_range" in record.message]
    assert len(told) == 1 and "data.value_range=[0,4095]" in told[0]


def test_skipping_tries_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = photos(tmp_path / "data")
    first = splits_of(root, "stream", on_error="skip")

    def fail(*_: object) -> None:
        raise AssertionError("tried again")

    monkeypatch.setattr("cnnlab.data.cache.decode_chunk", fail)
    again = splits_of(root, "stream", on_error="skip")
    assert {name: len(split) for name, split in again.items()} == {name: len(split) for name, split in first.items()}


def test_a_vanished_file_is_a_data_error(tmp_path: Path) -> None:
    root = photos(tmp_path / "data")
    stream = splits_of(root, "stream")
    for path in root.rglob("*.jpg"):
        path.unlink()
    with pytest.raises(DataError, match="No such file"):
        stream["train"].fetch(torch.arange(3))


# ---- the processes ----


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_processes_end_when_nobody_holds_the_pool(tmp_path: Path) -> None:
    split = splits_of(photos(tmp_path / "data"), "stream", workers=2)["train"]
    assert isinstance(split, StreamSplit)
    split.fetch(torch.arange(4))
    pids = split.pool.pids
    assert all(map(alive, pids))
    del split
    gc.collect()
    assert not any(map(alive, pids))


def test_a_killed_process_is_a_data_error_and_a_closed_pool_starts_anew(tmp_path: Path) -> None:
    (path,) = [photos(tmp_path / "data") / "cat" / "000.jpg"]
    pool, recipe = DecodingPool(1), Recipe(3, 8, 8, "crop", 8)
    assert pool.ask([str(path)], recipe).result().failures == []
    os.kill(pool.pids[0], signal.SIGKILL)
    with pytest.raises(DataError, match="decoding process died"):
        pool.ask([str(path)], recipe).result()
    pool.close()
    assert pool.ask([str(path)], recipe).result().failures == []
    pool.close()


HOLDS_A_POOL = """
import sys, time
from cnnlab.data.decode import Recipe
from cnnlab.data.pool import DecodingPool
pool = DecodingPool(1)
pool.ask([sys.argv[1]], Recipe(3, 8, 8, "crop", 8)).result()
print(pool.pids[0], flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_its_parent(tmp_path: Path, number: int) -> None:
    path = photos(tmp_path / "data", 1) / "cat" / "000.jpg"
    parent = subprocess.Popen(
        [sys.executable, "-c", HOLDS_A_POOL, str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert parent.stdout is not None
    with parent.stdout:
        child = int(parent.stdout.readline())
        os.kill(child, signal.SIGINT)  # as Ctrl-C does, which reaches the whole group
        os.kill(child, signal.SIGTERM)
        time.sleep(0.05)
        assert alive(child), "the parent may still need a batch"
        parent.send_signal(number)
        parent.wait(20)
    deadline = time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(child)


# ---- the GPU's decoder, whose code runs on the CPU too ----


def test_what_torchvision_decodes_is_what_pillow_does_up_to_rounding(tmp_path: Path) -> None:
    ramp = np.add.outer(np.arange(60) * 2, np.arange(80) * 1.5)
    picture = np.stack([ramp, ramp[::-1], np.full_like(ramp, 90)], 2).clip(0, 255).astype(np.uint8)
    files = [tmp_path / name for name in ("a.jpg", "b.jpg", "c.png", "d.jpg", "e.jpg")]
    for path in files[:3]:
        Image.fromarray(picture).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(files[3], exif=exif, quality=95)
    files[4].write_bytes(files[0].read_bytes()[:200])
    recipe = Recipe(3, 16, 16, "crop", 20)
    images, sizes, failures = GpuJpegs(recipe, torch.device("cpu"), 2).begin([str(path) for path in files])()
    assert [number for number, _ in failures] == [4]
    for number, path in enumerate(files[:4]):
        wanted = torch.from_numpy(decode(str(path), recipe)[0].copy())
        assert (images[number].int() - wanted.int()).abs().max() <= 2, path


def test_only_jpegs_that_nvjpeg_reads_alike_are_handed_to_it(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    image, kinds = Image.new("RGB", (20, 20)), {}
    for name, mode, options in [
        ("plain", "RGB", {}),
        ("progressive", "RGB", {"progressive": True}),
        ("grey", "L", {}),
        ("inks", "CMYK", {}),
        ("turned", "RGB", {"exif": exif}),
    ]:
        image.convert(mode).save(tmp_path / f"{name}.jpg", **options)
        kinds[name] = is_plain_jpeg((tmp_path / f"{name}.jpg").read_bytes())
    image.save(tmp_path / "other.png")
    assert kinds == {"plain": True, "progressive": True, "grey": True, "inks": False, "turned": False}
    assert not is_plain_jpeg((tmp_path / "other.png").read_bytes())
    assert not any(is_plain_jpeg((tmp_path / "plain.jpg").read_bytes()[:n]) for n in range(20))


def test_the_decoder_is_chosen_recorded_and_refused(tmp_path: Path) -> None:
    split, cpu = splits_of(photos(tmp_path / "data"), "stream")["train"], torch.device("cpu")
    assert with_decoder(Loading(), split, cpu, None).decode is Decoder.cpu
    assert with_decoder(Loading(), split, cpu, Decoder.cpu).decode is Decoder.cpu
    for loading, recorded in ((Loading(decode=Decoder.cuda), None), (Loading(), Decoder.cuda)):
        with pytest.raises(UsageError, match=r"loading\.decode=cpu"):
            with_decoder(loading, split, cpu, recorded)


@pytest.mark.gpu
@pytest.mark.parametrize("decode", ["cpu", "cuda"])
def test_a_stream_reaches_the_gpu_without_waiting_for_it(tmp_path: Path, decode: str) -> None:
    root = photos(tmp_path / "data", subsampling=0)  # of noise, two ways to bring back missing colours differ widely
    mapped, stream = splits_of(root, "mapped")["train"], splits_of(root, "stream", workers=2)["train"]
    loading = Loading(path=DataPath.stream, decode=Decoder(decode))
    loader = Loader(stream, 5, seed=3, shuffle=True, device="cuda", loading=loading)
    list(loader.batches(0))
    with no_waiting():
        found = [batch for batch, _ in loader.batches(2)]
    tolerance = 0 if decode == "cpu" else 3
    for one, other in zip(found, batches(mapped), strict=True):
        assert one["label"].tolist() == other["label"].tolist()
        assert (one["image"].cpu().int() - other["image"].int()).abs().max() <= tolerance
