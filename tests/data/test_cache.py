"""The decoded cache: hits, invalidation, interruption, damage, and builders at once."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from image_files import GREEN, make_folder, save_plain

from cnnlab.data import cache, places
from cnnlab.data.cache import Store, decoded
from cnnlab.data.decode import Recipe
from cnnlab.data.places import cache_folder
from cnnlab.data.pool import DecodingPool
from cnnlab.data.sources import Listing
from cnnlab.errors import DataError

RECIPE = Recipe(3, 8, 8, "crop", 8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "data", {"a": 9})


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*.png"))


def build(root: Path, workers: int | None = 0, recipe: Recipe = RECIPE) -> Store:
    return decoded(
        Listing(root, files(root)), recipe, on_error="raise", cache=str(root.parent / "cache"), workers=workers
    )


def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(cache, "decode_chunk", fail)


def test_a_second_load_decodes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(root)
    no_decoding(monkeypatch)
    second = build(root)
    assert torch.equal(first.images, second.images) and first.fingerprint == second.fingerprint
    assert first.sizes.tolist() == second.sizes.tolist()
    assert first.sizes[:3].tolist() == [[14, 12], [15, 13], [16, 14]]


def test_changed_files_and_recipes_are_other_entries(root: Path) -> None:
    first = build(root)
    save_plain(root / "a" / "000.png", GREEN)
    changed = build(root)
    assert changed.fingerprint != first.fingerprint and changed.images[0, 1, 0, 0] == GREEN[1]
    assert build(root, recipe=Recipe(1, 8, 8, "crop", 8)).images.shape == (9, 1, 8, 8)
    assert len(list((root.parent / "cache").iterdir())) == 3


def test_the_fingerprint_names_the_pixels_not_the_times(root: Path) -> None:
    first = build(root)
    os.utime(root / "a" / "000.png", (0, 0))
    assert build(root).fingerprint == first.fingerprint


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_decode_the_same(root: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    here = build(root)
    monkeypatch.setattr(cache, "_CHUNK_FILES", 2)
    os.utime(root / "a" / "000.png", (0, 0))
    assert torch.equal(build(root, workers=workers).images, here.images)


def test_a_dead_decoding_process_is_a_data_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(DataError, match="decoding process died"):
        build(root, workers=1)
    assert not list((root.parent / "cache").iterdir())


def test_an_interrupted_build_leaves_nothing_that_counts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = cache.decode_chunk

    def interrupted(paths: list[str], recipe: Recipe) -> object:
        if any("004" in path for path in paths):
            raise KeyboardInterrupt
        return whole(paths, recipe)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_CHUNK_FILES", 2)
        patch.setattr(cache, "decode_chunk", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(root)
    assert not list((root.parent / "cache").iterdir())
    assert len(build(root).images) == 9


def test_a_killed_builders_leftover_is_removed_in_time(root: Path) -> None:
    old, young = (root.parent / "cache" / f"{name}.tmp" for name in ("old", "young"))
    old.mkdir(parents=True)
    young.mkdir()
    os.utime(old, (time.time() - 200_000,) * 2)
    build(root)
    assert young.exists() and not old.exists()


DAMAGES = ["truncate", "remove", "garble", "empty", "flip", "flip_sizes", "flip_meta", "folder", "file", "deep", "list"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_built_again(root: Path, damage: str) -> None:
    first = build(root)
    images = first.images.clone()  # it is mapped, and what is mapped is damaged now
    (entry,) = (root.parent / "cache").iterdir()
    if damage in ("flip", "flip_sizes", "flip_meta"):
        path = entry / {"flip": "images.npy", "flip_sizes": "sizes.npy", "flip_meta": "meta.json"}[damage]
        content = bytearray(path.read_bytes())
        content[-30] ^= 1
        path.write_bytes(content)
    elif damage == "empty":
        (entry / "images.npy").write_bytes(b"")
    elif damage == "folder":
        (entry / "sizes.npy").unlink()
        (entry / "sizes.npy").mkdir()
    elif damage == "file":
        shutil.rmtree(entry)
        entry.write_text("in the way")
    elif damage == "deep":
        (entry / "meta.json").write_text("[" * 100_000)
    elif damage == "list":
        (entry / "meta.json").write_text("[1]")
    elif damage == "truncate":
        os.truncate(entry / "images.npy", 300)
    elif damage == "remove":
        (entry / "sizes.npy").unlink()
    else:
        (entry / "meta.json").write_text("{")
    again = build(root)
    assert torch.equal(again.images, images) and again.fingerprint == first.fingerprint
    assert torch.equal(again.sizes, first.sizes) and [path.name for path in (root.parent / "cache").iterdir()] == [
        entry.name
    ]


def test_builders_at_once_agree(root: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        stores = list(threads.map(lambda _: build(root), range(4)))
    assert {store.fingerprint for store in stores} == {stores[0].fingerprint}
    assert all(torch.equal(store.images, stores[0].images) for store in stores)
    assert len(list((root.parent / "cache").iterdir())) == 1


def test_builders_at_once_over_a_damaged_entry_agree(root: Path) -> None:
    first = build(root)
    (entry,) = (root.parent / "cache").iterdir()
    for _ in range(4):
        with (entry / "images.npy").open("r+b") as file:
            file.truncate(200)
        with ThreadPoolExecutor(3) as threads:
            stores = list(threads.map(lambda _: build(root), range(3)))
        assert all(torch.equal(store.images, first.images) for store in stores)
        assert [path.name for path in entry.parent.iterdir()] == [entry.name]


def test_a_build_gives_a_frozen_decoder_up(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = DecodingPool.ask

    def frozen(pool: DecodingPool, *arguments: Any) -> Any:
        future = ask(pool, *arguments)
        os.kill(pool.pids[0], signal.SIGSTOP)
        return future

    monkeypatch.setattr(DecodingPool, "ask", frozen)
    monkeypatch.setattr("cnnlab.data.pool._START", 0.2)
    with pytest.raises(DataError, match=r"loading\.patience"):
        listing = Listing(root, files(root))
        decoded(listing, RECIPE, on_error="raise", cache=str(root.parent / "cache"), workers=1, patience=0.2)


def test_without_a_home_the_cache_is_a_folder_of_ones_own_and_looking_makes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nobody(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nobody)
    monkeypatch.setattr(places.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(places.tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("CNNLAB_CACHE", raising=False)
    places._without_a_home.cache_clear()
    assert places.known_cache() is None and not list(tmp_path.iterdir()) and not caplog.records
    folder = cache_folder(None)
    assert folder == places.known_cache() == cache_folder(None) and folder.stat().st_mode & 0o777 == 0o700
    assert len(caplog.records) == 1
    folder.chmod(0o777)  # anybody could put something there
    places._without_a_home.cache_clear()
    assert places.known_cache() is None and cache_folder(None) != folder
    places._without_a_home.cache_clear()


def test_a_full_disk_is_refused_before_decoding(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_decoding(monkeypatch)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(DataError, match=r"data\.cache=FOLDER") as caught:
        build(root)
    expected, received = re.findall(r"(?:expected|received) ([\d,]+)", str(caught.value))
    assert int(expected.replace(",", "")) > int(received) == 10  # sizes that differ are told so that they differ


def test_an_unwritable_cache_says_what_to_set(root: Path) -> None:
    (root.parent / "cache").write_text("a file in the way")
    with pytest.raises(DataError, match="CNNLAB_CACHE"):
        build(root)


def test_a_vanished_file_is_named(root: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png"):
        Listing(root, ["gone.png"])


def test_cache_folder_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CNNLAB_CACHE", "/from/environment")
    assert cache_folder("/given") == Path("/given")
    assert cache_folder(None) == Path("/from/environment")
    monkeypatch.delenv("CNNLAB_CACHE")
    assert cache_folder(None) == Path.home() / ".cache" / "cnnlab"


def test_decoding_processes_load_no_torch() -> None:
    code = "import sys, cnnlab.data.decode; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
