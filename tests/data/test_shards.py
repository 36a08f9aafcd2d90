"""WebDataset shards: read by index as the library reads them in sequence; their order follows from (seed, epoch)."""

from __future__ import annotations

import gc
import gzip
import io
import json
import os
import shutil
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cnnlab.data import shard_index, shards
from cnnlab.data.loader import Loader
from cnnlab.data.shards import ShardSplit, WebDataset
from cnnlab.errors import DataError
from cnnlab.schema import DataPath, Loading

wds = pytest.importorskip("webdataset", reason="the extra `webdataset`")

PER_SHARD = 6


def write(folder: Path, name: str = "train", count: int = 5, kind: str = "cls", image: str = "png") -> str:
    """`count` shards by the library's own writer; sample n has the grey level 2n and the class n mod 3."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        with wds.TarWriter(str(folder / f"{name}-{number:04d}.tar")) as out:
            for n in range(number * PER_SHARD, (number + 1) * PER_SHARD):
                label = {"cls": n % 3, "json": {"label": n % 3, "caption": "grey"}}[kind]
                picture = np.full((12, 10, 3), 2 * n, np.uint8)
                out.write({"__key__": f"part.0/{n:05d}", image: picture, kind: label})
    return str(folder / f"{name}-{{0000..{count - 1:04d}}}.tar")


def dataset(pattern: str, tmp_path: Path, **settings: Any) -> WebDataset:
    given = {"size": 8, "resize": None, "val": 0.1, "test": 0.1, "cache": str(tmp_path / "cache")}
    return WebDataset(pattern, **{**given, "loading": Loading(workers=0), **settings})


def tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def picture(level: int, side: int = 8) -> bytes:
    out = io.BytesIO()
    Image.new("L", (side, side), level).save(out, "PNG")
    return out.getvalue()


def test_a_shards_name_may_hold_bytes_that_are_no_text(tmp_path: Path) -> None:
    members = {}
    for n in range(12):
        members |= {f"{n:04d}.png": picture(n), f"{n:04d}.cls": b"%d" % (n % 3)}
    name = os.fsdecode(b"caf\xe9.tar")
    tar(tmp_path / name, members)
    splits = dataset(str(tmp_path / name), tmp_path, val=0.25, test=0.25).load()
    assert sum(len(split) for split in splits.values()) == 12


def test_keys_may_have_dots_and_what_belongs_to_no_sample_is_told(tmp_path: Path) -> None:
    members = {}
    for n in range(30):
        members |= {f"cam{n % 3}.{n:04d}.png": picture(n), f"cam{n % 3}.{n:04d}.cls": b"%d" % (n % 3)}
    members |= {"7.png": picture(7), "7.seg.png": picture(8), "7.cls": b"1"}
    members |= {"lost.0001.txt": b"no image", "lost.0002.cls": b"2"}
    tar(tmp_path / "s.tar", members)
    for _ in range(2):  # from the remembered index, too
        data = dataset(str(tmp_path / "s.tar"), tmp_path)
        data.load()
        index = data._index
        assert index.keys == [*(f"cam{n % 3}.{n:04d}" for n in range(30)), "7"]
        assert index.label.tolist() == [*(n % 3 for n in range(30)), 1]
        told = f"data: 2 members without an image of the same key: not used ({tmp_path / 's.tar'}: lost.0001.txt)"
        assert data.findings.notices == [told]


def test_a_plain_key_hides_no_dotted_ones(tmp_path: Path) -> None:
    members = {"cam1.png": picture(1), "cam1.cls": b"1", "cam1.depth.png": picture(9)}
    for n in range(8):
        members |= {f"cam1.{n:04d}.png": picture(10 + n), f"cam1.{n:04d}.cls": b"%d" % (n % 2)}
    tar(tmp_path / "s.tar", members)
    index = shard_index.indexed([tmp_path / "s.tar"], "cls", str(tmp_path / "cache"))
    assert index.keys == ["cam1", *(f"cam1.{n:04d}" for n in range(8))] and not index.unused and not index.broken


def test_links_are_what_they_lead_to_inside_the_shard(tmp_path: Path) -> None:
    members = {}
    for n in range(10):
        members |= {f"a/{n}.png": picture(n), f"a/{n}.cls": b"%d" % (n % 2)}
    tar(tmp_path / "s.tar", members)
    with tarfile.open(tmp_path / "s.tar", "a") as archive:
        for name, kind, aim in [("b/x.png", tarfile.LNKTYPE, "a/3.png"), ("b/x.cls", tarfile.SYMTYPE, "../a/3.cls"),
                                ("b/y.png", tarfile.SYMTYPE, "x.png"), ("b/y.cls", tarfile.LNKTYPE, "a/2.cls"),
                                ("b/z.png", tarfile.SYMTYPE, "/data/z.png"), ("b/z.cls", tarfile.LNKTYPE, "a/2.cls"),
                                ("b/loop.png", tarfile.SYMTYPE, "loop.png")]:  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, aim
            archive.addfile(member)
    data = dataset(str(tmp_path / "s.tar"), tmp_path, on_error="skip")
    splits = data.load()
    assert data._index.keys[10:] == ["b/x", "b/y"] and data._index.label.tolist()[10:] == [1, 0]
    levels = torch.cat([split.fetch(torch.arange(len(split)))["image"][:, 0, 0, 0] for split in splits.values()])
    assert sorted(levels.tolist()) == sorted([*range(10), 3, 3])
    assert data.findings.left_out == [
        (f"{tmp_path}/s.tar: b/z.png", "a link to /data/z.png, which is not in the shard"),
        (f"{tmp_path}/s.tar: b/loop.png", "a link to b/loop.png, which is not in the shard"),
    ]
    assert any("1 member without an image" in told and "b/z.cls" in told for told in data.findings.notices)
    with pytest.raises(DataError, match=r"b/z\.png: a link to /data/z\.png"):
        dataset(str(tmp_path / "s.tar"), tmp_path).load()


@pytest.mark.parametrize("name", ["5.png", "cam.0001.png", "5.JPG"])
def test_an_image_without_its_label_is_refused_or_left_out_whatever_its_key(tmp_path: Path, name: str) -> None:
    members = {f"a/{n}.{kind}": b"0" if kind == "cls" else picture(n) for n in range(10) for kind in ("png", "cls")}
    tar(tmp_path / "s.tar", members | {name: picture(3)})
    with pytest.raises(DataError, match=rf"received 1 without:\n  .*s\.tar: {name}: no \.cls beside it"):
        dataset(str(tmp_path / "s.tar"), tmp_path).load()
    data = dataset(str(tmp_path / "s.tar"), tmp_path, on_error="skip")
    assert sum(map(len, data.load().values())) == 10
    assert [left for left, _ in data.findings.left_out] == [f"{tmp_path}/s.tar: {name}"]


def test_a_key_twice_in_a_shard_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    members = {f"{n}.{kind}": b"0" if kind == "cls" else picture(n) for n in range(10) for kind in ("png", "cls")}
    for more, told in (({"9.png": picture(0)}, r"received 9\.png twice"),
                       ({"3.png": picture(0), "3.cls": b"1"}, r"1 that are there again \(3\)")):  # fmt: skip
        tar(path, members)
        with tarfile.open(path, "a") as archive:
            for name, content in more.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        with pytest.raises(DataError, match=told):
            dataset(str(path), tmp_path).load()


def test_copies_in_other_shards_and_shards_of_two_splits_are_told(tmp_path: Path) -> None:
    """Not a key that comes again with another image, as where each shard counts from 0."""
    pattern = write(tmp_path / "a", count=2)
    copied = {"part.0/00003.png": picture(3), "part.0/00003.cls": b"0"}
    tar(tmp_path / "one.tar", copied | {"1.png": picture(200), "1.cls": b"1"})
    tar(tmp_path / "two.tar", copied | {"1.png": picture(201), "1.cls": b"1"})
    data = dataset(pattern, tmp_path, val_shards=str(tmp_path / "one.tar"), test_shards=str(tmp_path / "two.tar"))
    data.load()
    assert len(picture(200)) == len(picture(201))
    (told,) = [line for line in data.findings.notices if "no effect" not in line]
    assert told.startswith(f"data: 1 samples are in val and in test ({tmp_path}/one.tar: part.0/00003, at byte")
    (tmp_path / "link.tar").hardlink_to(tmp_path / "one.tar")
    with pytest.raises(DataError, match=r"each shard of train once, received .*link\.tar and .*one\.tar"):
        dataset(str(tmp_path / "[lo]*n*.tar"), tmp_path).load()
    data = dataset(pattern, tmp_path, val_shards=pattern, test_shards=str(tmp_path / "one.tar"))
    data.load()
    (told,) = [line for line in data.findings.notices if "no effect" not in line]
    assert told.startswith("data: 2 shards of train are those of val, too (train-0000.tar); the figures of val are not")


def test_names_of_classes_are_read_as_editors_save_them(tmp_path: Path) -> None:
    pattern = write(tmp_path, count=2)
    (tmp_path / "names.txt").write_bytes("\ufeffcat\r\nd\u00f6g\r\nemu\r\n".encode("utf-16-le"))
    assert dataset(pattern, tmp_path, classes=str(tmp_path / "names.txt")).spec().classes == ("cat", "d\u00f6g", "emu")
    for content, told in ((b"cat\ncat\nemu\n", "received cat twice"), (b"\xff\n", "expected text in UTF-8")):
        (tmp_path / "names.txt").write_bytes(content)
        with pytest.raises(DataError, match=told):
            dataset(pattern, tmp_path, classes=str(tmp_path / "names.txt")).spec()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("kind", "image"), [("cls", "png"), ("cls", "jpg"), ("json", "jpg")])
def test_samples_are_those_that_the_library_reads(tmp_path: Path, kind: str, image: str) -> None:
    pattern = write(tmp_path, kind=kind, image=image)
    data = dataset(pattern, tmp_path, label=kind)
    splits = data.load()
    assert data.spec().classes == ("0", "1", "2") and data.spec().size == (8, 8)
    assert sum(len(split) for split in splits.values()) == 30
    found = {}
    for split in splits.values():
        batch = split.fetch(torch.arange(len(split)))
        for level, label in zip(batch["image"][:, 0, 4, 4].tolist(), batch["label"].tolist()):
            found[level] = label
    reader = wds.WebDataset(pattern, shardshuffle=False, empty_check=False).decode("rgb8")
    wanted = {
        int(sample[image][6, 5, 0]): sample[kind]["label"] if kind == "json" else sample[kind] for sample in reader
    }
    assert found == wanted and len(found) == 30
    del reader
    gc.collect()  # the library leaves its last file to the collector


def test_shards_of_their_own_make_a_split_and_names_a_spec(tmp_path: Path) -> None:
    train, val = write(tmp_path / "a"), write(tmp_path / "a", "val", 2)
    (tmp_path / "names.txt").write_text("cat\ndog\nemu\nfox\n")
    data = dataset(train, tmp_path, val_shards=val, test_shards=str(tmp_path / "a/val-*1.tar"), classes=4)
    assert {name: len(split) for name, split in data.load().items()} == {"train": 30, "val": 12, "test": 6}
    assert not (tmp_path / "cache2").exists()
    named = dataset(train, tmp_path, classes=str(tmp_path / "names.txt"), cache=str(tmp_path / "cache2"))
    assert named.spec().classes == ("cat", "dog", "emu", "fox")
    assert not (tmp_path / "cache2").exists(), "names alone need no index"
    with pytest.raises(DataError, match=r"data\.classes"):
        dataset(train, tmp_path, classes=2).load()


def order_of(split: ShardSplit, epoch: int, seed: int = 0) -> list[int]:
    """The shard of each sample, in the order of an epoch."""
    positions = split.order(seed, epoch)
    assert sorted(positions.tolist()) == list(range(len(split)))
    return [int(split.sources.shard[row]) for row in split.rows[positions].tolist()]  # type: ignore[attr-defined]


def test_an_epoch_goes_through_the_shards_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "WINDOW", 2)
    split = dataset(write(tmp_path, count=5), tmp_path).load()["train"]
    assert isinstance(split, ShardSplit)
    first, second = order_of(split, 0), order_of(split, 1)
    assert first != second and first != order_of(split, 0, seed=1)
    assert first == order_of(split, 0)
    for order in (first, second):
        in_turn = list(dict.fromkeys(order))
        windows = [set(in_turn[at : at + 2]) for at in range(0, 5, 2)]
        last = {shard: len(order) - 1 - order[::-1].index(shard) for shard in in_turn}
        for before, after in pairwise(windows):
            assert max(last[shard] for shard in before) < min(order.index(shard) for shard in after)
    assert any(first[at] != first[at + 1] for at in range(4)), "the samples of a window are mixed"


def test_any_batch_follows_from_seed_epoch_and_number(tmp_path: Path) -> None:
    split = dataset(write(tmp_path), tmp_path).load()["train"]
    whole = [batch["image"] for batch, _ in Loader(split, 7, seed=1, shuffle=True).batches(3)]
    later = [batch["image"] for batch, _ in Loader(split, 7, seed=1, shuffle=True).batches(3, start=2)]
    assert len(whole) == 4 and all(map(torch.equal, whole[2:], later))
    ranks = [
        [b["index"] for b, _ in Loader(split, 7, seed=1, shuffle=True, rank=r, world=2).batches(3)] for r in (0, 1)
    ]
    order = Loader(split, 7, seed=1, shuffle=True).order(3)
    for number, batch in enumerate(order.split(7)):
        assert sorted(torch.cat([ranks[0][number], ranks[1][number]]).tolist()) == sorted(batch.tolist())
    # A position in the epoch is a shard and an offset in it, where the file begins.
    assert isinstance(split, ShardSplit)
    path, offset, size = split.sources.items([int(split.rows[order[14]])])[0]
    with open(path, "rb") as file:  # noqa: PTH123
        file.seek(int(offset))
        level = np.asarray(Image.open(io.BytesIO(file.read(int(size)))))[0, 0, 0]
    assert level == later[0][0, 0, 0, 0]


def test_the_index_is_made_once_for_a_shard_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = write(tmp_path)
    first = dataset(pattern, tmp_path).load()["train"]
    scanned: list[str] = []
    scan = shard_index._scanned
    monkeypatch.setattr(shard_index, "_scanned", lambda path, label: scanned.append(path.name) or scan(path, label))
    assert dataset(pattern, tmp_path).load()["train"].fingerprint == first.fingerprint and scanned == []
    os.utime(tmp_path / "train-0001.tar", (0, 0))
    stored = sorted((tmp_path / "cache" / "shards").iterdir())
    stored[0].write_bytes(b"PK damaged")
    assert dataset(pattern, tmp_path).load()["train"].fingerprint == first.fingerprint
    assert "train-0001.tar" in scanned and 1 <= len(scanned) <= 2
    assert not [path for path in (tmp_path / "cache" / "shards").iterdir() if path.suffix == ".tmp"]
    write(tmp_path, count=1, kind="json")
    with pytest.raises(DataError, match=r"data\.label"):
        dataset(pattern, tmp_path).load()


def test_an_index_that_cannot_be_written_is_read_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file in the way")
    pattern = write(tmp_path / "shards")
    for _ in range(2):
        caplog.clear()
        assert len(dataset(pattern, tmp_path, cache=str(tmp_path / "cache")).load()["train"]) > 0
        assert sum("read anew" in record.message for record in caplog.records) == 1


def test_a_broken_image_is_named_or_skipped(tmp_path: Path) -> None:
    pattern = write(tmp_path, count=2)
    with tarfile.open(tmp_path / "train-0000.tar", "a") as archive:
        for name, content in [("x/broken.jpg", b"\xff\xd8 no image"), ("x/broken.cls", b"1")]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(DataError, match=r"train-0000\.tar: x/broken, at byte"):
        for split in dataset(pattern, tmp_path).load().values():
            split.fetch(torch.arange(len(split)))
    data = dataset(pattern, tmp_path, on_error="skip")
    splits = data.load()
    assert [name.partition(", at")[0] for name, _ in data.findings.left_out] == [f"{tmp_path}/train-0000.tar: x/broken"]
    assert sum(len(split.fetch(torch.arange(len(split)))["label"]) for split in splits.values()) == 12


def test_shards_that_cannot_be_used_say_what_is_wanted(tmp_path: Path) -> None:
    pattern = write(tmp_path, count=2)
    shard = tmp_path / "train-0001.tar"
    with pytest.raises(DataError, match="received none for 1, the first .*0002"):
        dataset(pattern.replace("0001}", "0002}"), tmp_path).load()
    with pytest.raises(DataError, match="received none; type data.shards"):
        dataset(str(tmp_path / "no-*.tar"), tmp_path).load()
    with pytest.raises(DataError, match="copy them first"):
        dataset("https://example.org/train-{0..3}.tar", tmp_path).load()
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2 + 100])
    with pytest.raises(DataError, match="tar file that is whole"):
        dataset(pattern, tmp_path).load()
    with gzip.open(shard, "wb") as out, io.BytesIO(whole) as plain:
        shutil.copyfileobj(plain, out)
    with pytest.raises(DataError, match="uncompressed"):
        dataset(pattern, tmp_path).load()
    for content, label in ((b"cat", "cls"), (b"-1", "cls"), (json.dumps({"text": 1}).encode(), "json")):
        with tarfile.open(shard, "w") as archive:
            for name, data in (("a.png", b"never read"), (f"a.{label}", content)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        with pytest.raises(DataError, match="class number"):
            dataset(str(shard), tmp_path, label=label).load()


@pytest.mark.parametrize("label", [b"cat", b"-1", b"1e3", b"9" * 30, b"\xff", b"", b"123456789"])
def test_a_label_that_is_no_class_number_is_refused_or_left_out(tmp_path: Path, label: bytes) -> None:
    members = {
        f"{n}.{kind}": b"%d" % (n % 2) if kind == "cls" else picture(n) for n in range(10) for kind in ("png", "cls")
    }
    tar(tmp_path / "s.tar", members | {"x.png": picture(3), "x.cls": label})
    with pytest.raises(
        DataError, match=r"received 1 without:\n  .*x\.png: expected a class number in x\.cls, received b'"
    ):
        dataset(str(tmp_path / "s.tar"), tmp_path).load()
    data = dataset(str(tmp_path / "s.tar"), tmp_path, on_error="skip")
    assert data.spec().classes == ("0", "1") and sum(map(len, data.load().values())) == 10
    assert [name for name, _ in data.findings.left_out] == [f"{tmp_path}/s.tar: x.png"]


@pytest.mark.parametrize(
    "label", ['{"label": Infinity}', '{"label": 1.5}', '{"label": true}', "[" * 99999, "[1]", "{}"]
)
def test_a_json_label_that_is_no_class_number_is_refused(tmp_path: Path, label: str) -> None:
    tar(tmp_path / "s.tar", {"x.png": picture(3), "x.json": label.encode()})
    with pytest.raises(DataError, match="a value `label` that is a class number"):
        dataset(str(tmp_path / "s.tar"), tmp_path, label="json").load()


def test_only_streams(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"loading\.path=auto"):
        dataset("x.tar", tmp_path, loading=Loading(path=DataPath.mapped))


@pytest.mark.parametrize("name", ["a/b.c/000.seg.png", "000.jpg", "x/1.JPG", "x.y/001.cls"])
def test_keys_are_the_librarys(name: str) -> None:
    from webdataset.tariterators import base_plus_ext

    key, extension = base_plus_ext(name)
    assert shard_index.key_and_extension(name) == (key, extension.lower())
