"""What is found in folders: each file once, nothing hidden, and a word on whatever is not used."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from image_files import make_folder, save_plain

from cnnlab.data.folder import ImageFolder
from cnnlab.data.found import Walk, class_names
from cnnlab.errors import DataError


def folder(root: Path, **settings: Any) -> ImageFolder:
    given = {"size": 8, "cache": str(root.parent / "cache"), "val": 0.2, "test": 0.2, "workers": 0}
    return ImageFolder(str(root), **{**given, **settings})


def samples(data: ImageFolder) -> dict[str, int]:
    return {name: len(split) for name, split in data.load().items()}


def names(root: Path, kind: str) -> list[str]:
    return list(Walk(root).images(root / kind))


def told(data: ImageFolder) -> str:
    data.load()
    return "\n".join(data.findings.notices)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "data", {"a": 10, "b": 10})


def test_nothing_below_a_hidden_folder_is_read(root: Path):
    for place in (".ipynb_checkpoints", ".git/x", "__MACOSX", "@eaDir", "sub/.hidden"):
        save_plain(root / "a" / place / "0-checkpoint.png")
    for name in ("._000.png", ".DS_Store", "Thumbs.db"):
        (root / "a" / name).write_bytes(b"\0\5\x16\7")
    data = folder(root)
    assert sum(samples(data).values()) == 20
    assert data.findings.notices == [f"data: not used of {root}: 1 .db (a/Thumbs.db), 7 hidden (a/.DS_Store)"]


def test_a_loop_of_links_multiplies_nothing(root: Path):
    (root / "a" / "loop").symlink_to(".")
    (root / "a" / "deep").mkdir()
    (root / "a" / "deep" / "back").symlink_to("..")
    (root / "a" / "deep" / "self").symlink_to(root / "a" / "deep")
    data = folder(root)
    assert sum(samples(data).values()) == 20
    assert data.findings.notices == [f"data: not used of {root}: 3 linked again (a/deep/back)"]


@pytest.mark.parametrize("name, target", [("a/up", ".."), ("a/sub/up", "../.."), ("a/far", "../../.."), ("c", ".")])
def test_a_link_to_a_folder_around_it_is_refused_by_name(root: Path, name: str, target: str):
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).symlink_to(target)
    with pytest.raises(DataError, match=f"received {name} -> .*remove it"):
        folder(root, on_error="skip").load()


def test_class_folders_may_be_links_to_elsewhere(root: Path, tmp_path: Path):
    make_folder(tmp_path / "elsewhere", {"c": 5, "sub": 3})
    (root / "c").symlink_to(tmp_path / "elsewhere" / "c")
    (root / "a" / "more").symlink_to(tmp_path / "elsewhere" / "sub")
    data = folder(root)
    assert sum(samples(data).values()) == 28 and data.findings.notices == []
    (tmp_path / "elsewhere" / "c" / "up").symlink_to("..")
    with pytest.raises(DataError, match="received c/up"):
        data.load()


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_file_with_several_names_is_one_and_keeps_its_own(root: Path, link: Any):
    for name in ("000a.png", "zzz.png"):
        link(root / "a" / "003.png", root / "a" / name)
    found = names(root, "a")
    assert len(found) == 10 and ("a/003.png" in found) == (link is os.symlink)
    assert "2 linked again (a/" in told(folder(root))


def test_a_link_to_a_folder_that_is_read_is_read_once_under_its_own_name(root: Path):
    make_folder(root / "a", {"zoo": 2})
    (root / "a" / "again").symlink_to("zoo")
    assert names(root, "a")[-2:] == ["a/zoo/000.png", "a/zoo/001.png"] and len(names(root, "a")) == 12


@pytest.mark.parametrize("name, target", [("b/x.png", "../a/001.png"), ("b/more", "../a"), ("c", "a")])
def test_an_image_of_two_classes_is_refused_with_both_names(root: Path, name: str, target: str):
    (root / name).symlink_to(target)
    with pytest.raises(DataError, match=r"in two \(by links\), as a/0\d\d\.png and (b/x|b/more/000|c/000)"):
        folder(root).load()


def test_files_that_two_splits_share_are_told(tmp_path: Path):
    root = tmp_path / "data"
    make_folder(root / "train", {"a": 9, "b": 9})
    make_folder(root / "val", {"a": 2, "b": 2})
    for n in range(3):
        (root / "val" / "a" / f"t{n}.png").symlink_to(f"../../train/a/00{n}.png")
    (root / "test").symlink_to("val")
    text = told(folder(root))
    assert "3 files are in train and in val, by links (train/a/000.png, val/a/t0.png)" in text
    assert "4 files are in val and in test" in text and "3 files are in train and in test" in text


def test_what_is_no_file_is_passed_over_and_not_waited_for(root: Path):
    os.mkfifo(root / "a" / "pipe.jpg")
    (root / "b" / "null.png").symlink_to("/dev/null")
    assert "2 pipe or device (a/pipe.jpg)" in told(folder(root))


def test_other_files_are_counted_by_kind(root: Path):
    for name in ("a/x.heic", "a/y.HEIC", "b/labels.csv", "README", "loose.jpg"):
        (root / name).write_text("")
    assert folder(root).load() and told(folder(root)) == (
        f"data: not used of {root}: 1 .csv (b/labels.csv), 2 .heic (a/x.heic), 1 in no class folder (loose.jpg), "
        "1 without a suffix (README)"
    )


@pytest.mark.parametrize("name", ["a/gone.png", "a/gone", "a/itself.png"])
def test_a_link_that_leads_nowhere_is_an_unreadable_file(root: Path, name: str):
    (root / name).symlink_to("itself.png" if "itself" in name else "/nowhere/at/all")
    with pytest.raises(DataError, match=rf"received 1 that cannot be:\n  {name}: .*\n.*data\.on_error=skip"):
        folder(root).load()
    data = folder(root, on_error="skip")
    assert sum(samples(data).values()) == 20
    assert [file for file, _ in data.findings.left_out] == [
        name
    ] and "cannot be read, and is left out" in data.findings.notices[0]


def test_a_class_whose_link_leads_nowhere_does_not_vanish(root: Path):
    (root / "c").symlink_to("/mnt/not/there")
    assert folder(root).spec().classes == ("a", "b", "c")
    for on_error, told in (("raise", r"received 1 that cannot be:\n  c: "), ("skip", "received none in .*c; put some")):
        with pytest.raises(DataError, match=told):
            folder(root, on_error=on_error).load()


def test_a_folder_that_may_not_be_read_is_refused_or_left_out(root: Path, monkeypatch: pytest.MonkeyPatch):
    make_folder(root / "a", {"secret": 2})
    scan = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"a/secret: .*Permission denied"):
        folder(root).load()
    data = folder(root, on_error="skip")
    assert sum(samples(data).values()) == 20 and data.findings.left_out[0][0] == "a/secret"


def test_all_left_out_files_are_recorded(root: Path):
    for n in range(9):
        (root / "a" / f"broken{n}.png").write_text("")
    (root / "b" / "gone.png").symlink_to("nowhere")
    data = folder(root, on_error="skip")
    data.load()
    assert [file for file, _ in data.findings.left_out] == ["b/gone.png", *(f"a/broken{n}.png" for n in range(9))]
    assert all(reason for _, reason in data.findings.left_out)


# ---- splits and classes by their folders' names ----


@pytest.mark.parametrize("first, second", [("Val", "valid"), ("train", "Training"), ("test", "testing")])
def test_two_folders_for_one_split_are_refused_with_both_names(tmp_path: Path, first: str, second: str):
    for name in {"train", first, second}:
        make_folder(tmp_path / "data" / name, {"a": 5, "b": 5})
    with pytest.raises(DataError) as caught:
        folder(tmp_path / "data").spec()
    assert f" {first}" in str(caught.value) and f" {second}" in str(caught.value)


def test_folders_that_mean_no_split_are_told(tmp_path: Path):
    for name in ("train", "dev", "cat"):
        make_folder(tmp_path / "data" / name, {"a": 5, "b": 5})
    (notice,) = told(folder(tmp_path / "data")).split("\n")
    assert notice.startswith("data: cat, dev beside train in ") and "not used" in notice


def test_splits_without_train_are_classes_only_where_that_can_be_meant(tmp_path: Path):
    make_folder(tmp_path / "one", {"test": 5, "other": 5})
    assert "test in " in told(folder(tmp_path / "one")) and "taken for a class" in told(folder(tmp_path / "one"))
    make_folder(tmp_path / "two", {"test": 5, "val": 5, "trian": 5})
    with pytest.raises(DataError, match="expected a folder `train` beside"):
        folder(tmp_path / "two").spec()


def test_a_test_folder_beside_val_as_test_is_told(tmp_path: Path):
    for name in ("train", "val", "test"):
        make_folder(tmp_path / "data" / name, {"a": 5, "b": 5})
    assert "test in " in told(folder(tmp_path / "data", val_as_test=True))


def test_classes_are_matched_as_they_look(tmp_path: Path):
    make_folder(tmp_path / "data" / "train", {"caf\u00e9": 5, "b": 5})
    make_folder(tmp_path / "data" / "val", {"cafe\u0301": 2, "b ": 3})
    data = folder(tmp_path / "data")
    assert data.spec().classes == ("b", "caf\u00e9")
    assert torch.bincount(data.load()["val"].labels).tolist() == [3, 2]  # type: ignore[arg-type]
    make_folder(tmp_path / "data" / "train", {"cafe\u0301": 5})
    with pytest.raises(DataError, match=r"'caf\\xe9'"):
        data.spec()


def test_classes_that_differ_in_case_are_two_and_a_likely_slip_is_named(tmp_path: Path):
    make_folder(tmp_path / "data" / "train", {"A": 5, "a": 5})
    assert folder(tmp_path / "data").spec().classes == ("A", "a")
    make_folder(tmp_path / "other" / "train", {"cat": 5, "dog": 5})
    make_folder(tmp_path / "other" / "val", {"Cat": 5})
    with pytest.raises(DataError, match=r"received Cat besides \(did you mean `cat`\?\)"):
        folder(tmp_path / "other").spec()


def test_a_split_that_lacks_a_class_is_told(tmp_path: Path):
    make_folder(tmp_path / "data" / "train", {"a": 5, "b": 5})
    make_folder(tmp_path / "data" / "val", {"a": 5})
    assert "no image of b in val" in told(folder(tmp_path / "data"))


def test_a_folder_in_a_folder_is_named(tmp_path: Path):
    make_folder(tmp_path / "data" / "photos", {"a": 5, "b": 5})
    with pytest.raises(DataError, match=r"type data\.root=.*photos if the classes are a, b"):
        folder(tmp_path / "data").spec()


# ---- names in a file ----


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_class_names_are_read_as_editors_save_them(tmp_path: Path, encoding: str):
    (tmp_path / "classes.txt").write_bytes("caf\u00e9\r\ndog\r\n\r\n".encode(encoding))
    assert class_names(tmp_path / "classes.txt") == ("caf\u00e9", "dog")


def test_class_names_that_cannot_be_used_are_refused(tmp_path: Path):
    path = tmp_path / "classes.txt"
    path.write_bytes("caf\u00e9\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"classes\.txt, line 1.*save the file as UTF-8"):
        class_names(path)
    path.write_text("cat\ndog\ncat \n")
    with pytest.raises(DataError, match="received cat twice"):
        class_names(path)
