"""The files of each split in a run folder, and what is said of how they differ."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

from cnnlab.runs import data_files

FILES = {
    "train": {"a/0.png": 10, "a/1.png": 11, "b/\udce9 \n2.png": 12},
    "val": {"a/3.png": 13},
    "test": {"b/4.png": 14},
}


def test_what_is_written_is_read(tmp_path: Path):
    assert data_files.read(tmp_path) is None
    assert data_files.write(tmp_path, FILES)
    assert data_files.read(tmp_path) == FILES
    assert data_files.compared(FILES, FILES) == ""


def test_nothing_is_written_of_no_files_nor_of_very_many(tmp_path: Path):
    assert not data_files.write(tmp_path, {})
    many = {"train": {str(number): 1 for number in range(data_files.MOST_FILES + 1)}}
    assert not data_files.write(tmp_path, many)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content", [b"", b"no gzip", zlib.compress(b"{}"), b"bomb", b"[1]", b'{"train":[["a"]]}', b"[" * 9999]
)
def test_a_damaged_record_explains_nothing(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data_files, "_MOST_BYTES", 1 << 20)
    packer = zlib.compressobj(wbits=31)
    if content == b"bomb":
        content = b"[" + b" " * (1 << 21) + b"]"
    if content.startswith((b"[", b"{")):
        content = packer.compress(content) + packer.flush()
    (tmp_path / data_files.NAME).write_bytes(content)
    assert data_files.read(tmp_path) is None


def test_what_is_gone_new_moved_or_replaced_is_named():
    now = {
        "train": {"a/0.png": 10, "b/4.png": 14},
        "val": {"a/3.png": 99, "a/1.png": 11},
        "test": {"new.png": 1, "a/0.png": 10},
    }
    assert data_files.compared(FILES, now) == (
        "files: 1 gone (b/\udce9 \n2.png), 1 new (new.png), 1 of train now in test (a/0.png), 1 of train now in val "
        "(a/1.png), 1 more in another split, 1 of another length (a/3.png)"
    )


def test_of_many_the_first_are_named():
    before = {"train": {f"{number}.png": 1 for number in range(5)}}
    assert data_files.compared(before, {"train": {"0.png": 1}}) == "files: 4 gone (1.png, 2.png, 3.png, ...)"
