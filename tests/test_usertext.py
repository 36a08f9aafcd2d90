"""Text that users wrote, in whatever encoding their editor saved it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cnnlab.composing.composer import composer
from cnnlab.errors import ConfigError, DataError, UsageError
from cnnlab.usertext import read_text

TEXT = "Käfer\nBär 日本\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_what_can_be_read(tmp_path: Path, encoding: str, end: str):
    path = tmp_path / "classes.txt"
    path.write_bytes(TEXT.replace("\n", end).encode(encoding))
    assert read_text(path, DataError) == TEXT


def test_big_endian(tmp_path: Path):
    path = tmp_path / "classes.txt"
    path.write_bytes(b"\xfe\xff" + TEXT.encode("utf-16-be"))
    assert read_text(path, DataError) == TEXT


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("ab\nKäfer\n".encode("latin-1"), "line 2: expected text in UTF-8, received the byte 0xe4"),
        ("ab\n".encode("utf-16-le"), "line 1: expected text, received a zero byte"),
        (b"\xff\xfea", "expected text in UTF-16"),
        (b"a\n\x00", "line 2: expected text, received a zero byte"),
    ],
)
@pytest.mark.parametrize("error", [DataError, UsageError])
def test_what_cannot(tmp_path: Path, content: bytes, said: str, error: type):
    path = tmp_path / "classes.txt"
    path.write_bytes(content)
    with pytest.raises(error) as caught:
        read_text(path, error)
    message = str(caught.value)
    assert str(path) in message
    assert said in message
    assert "codec" not in message


def test_no_file(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path, said in [(tmp_path, "a folder"), (tmp_path / "pipe", "pipe"), (tmp_path / "none", "cannot be read")]:
        with pytest.raises(DataError, match=f"{path}: expected a text file, .*{said}"):
            read_text(path, DataError)


MINE = "# @package _global_\n# Käfer\nseed: 7\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_users_yaml_keeps_its_package(tmp_path: Path, encoding: str):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_bytes(MINE.replace("\n", "\r\n").encode(encoding))
    with composer([tmp_path]) as own:
        config = own.compose(["experiment=mine"]).config
    assert config["seed"] == 7
    assert "experiment" not in config


def test_a_users_yaml_in_another_encoding(tmp_path: Path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_bytes(MINE.encode("latin-1"))
    with composer([tmp_path]) as own, pytest.raises(ConfigError) as caught:
        own.compose(["experiment=mine"])
    assert "mine.yaml, line 2: expected text in UTF-8, received the byte 0xe4" in str(caught.value)


def test_a_yaml_in_a_search_path_of_the_users(tmp_path: Path):
    """Hydra makes its sources anew when `hydra.searchpath` is given."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_bytes(MINE.encode("utf-8-sig"))
    with composer() as own:
        config = own.compose([f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"]).config
    assert config["seed"] == 7
