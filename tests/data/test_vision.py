"""Torchvision's sets, read from small files of their own formats."""

from __future__ import annotations

import hashlib
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import datasets

from cnnlab.data.vision import TorchvisionSet
from cnnlab.errors import DataError


def dump(path: Path, content: dict[str, Any]) -> str:
    """A pickle as CIFAR's authors wrote theirs: protocol 2, dtypes with 0 and 1 for False and True."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = pickle.dumps(content, protocol=2).replace(b"\x89\x88\x87", b"K\x00K\x01\x87")
    path.write_bytes(stream)
    return hashlib.md5(stream).hexdigest()


def cifar_images(count: int, seed: int) -> np.ndarray:
    """(count, 3072) uint8, row-major planes R, G, B as in the files."""
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five training files of 20 and a test file of 30 images; torchvision's checksums are made to fit."""
    base = tmp_path / "cifar-10-batches-py"
    lists: dict[str, list[list[str]]] = {"train_list": [], "test_list": []}
    for number in range(6):
        name = f"data_batch_{number + 1}" if number < 5 else "test_batch"
        count = 20 if number < 5 else 30
        content = {"data": cifar_images(count, number), "labels": [n % 10 for n in range(count)]}
        part = "train_list" if number < 5 else "test_list"
        lists[part].append([name, dump(base / name, content)])
    for name, files in lists.items():
        monkeypatch.setattr(datasets.CIFAR10, name, files)
    names = list(TorchvisionSet("cifar10").spec().classes)
    meta = {**datasets.CIFAR10.meta, "md5": dump(base / "batches.meta", {"label_names": names})}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return tmp_path


def test_cifar10(cifar10: Path) -> None:
    data = TorchvisionSet("cifar10", root=str(cifar10), val=0.2)
    spec, splits = data.spec(), data.load()
    assert spec.size == (32, 32) and spec.channels == 3 and spec.classes[3] == "cat"
    assert {name: len(split) for name, split in splits.items()} == {"train": 80, "val": 20, "test": 30}
    test = splits["test"].fetch(torch.arange(30))
    assert torch.equal(test["image"], torch.from_numpy(cifar_images(30, 5)).view(30, 3, 32, 32))
    assert test["label"].tolist() == [n % 10 for n in range(30)]
    assert splits["val"].labels is not None
    assert torch.bincount(splits["val"].labels).tolist() == [2] * 10


def test_a_changed_file_is_refused(cifar10: Path) -> None:
    path = cifar10 / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"data\.download=true"):
        TorchvisionSet("cifar10", root=str(cifar10)).load()


def test_cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "cifar-100-python"
    for name, count, attribute in (("train", 200, "train_list"), ("test", 100, "test_list")):
        content = {"data": cifar_images(count, 0), "fine_labels": [n % 100 for n in range(count)]}
        monkeypatch.setattr(datasets.CIFAR100, attribute, [[name, dump(base / name, content)]])
    names = list(TorchvisionSet("cifar100").spec().classes)
    meta = {**datasets.CIFAR100.meta, "md5": dump(base / "meta", {"fine_label_names": names})}
    monkeypatch.setattr(datasets.CIFAR100, "meta", meta)
    splits = TorchvisionSet("cifar100", root=str(tmp_path), val=0.5, limit=50).load()
    assert {name: len(split) for name, split in splits.items()} == {"train": 50, "val": 100, "test": 100}


def test_class_names_are_unique_and_counted() -> None:
    for name, count in (("cifar10", 10), ("cifar100", 100), ("mnist", 10), ("fashion_mnist", 10)):
        assert len(set(TorchvisionSet(name).spec().classes)) == count  # type: ignore[arg-type]


def write_idx(path: Path, values: np.ndarray) -> None:
    """LeCun's IDX format: type 8 (unsigned byte), the number of axes, their lengths, the values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    path.write_bytes(header + values.tobytes())


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_formats(tmp_path: Path, name: str, folder: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 28, 28), dtype=np.uint8)
    labels = (np.arange(60) % 10).astype(np.uint8)
    for part, rows in (("train", slice(0, 40)), ("t10k", slice(40, 60))):
        write_idx(tmp_path / folder / "raw" / f"{part}-images-idx3-ubyte", pixels[rows])
        write_idx(tmp_path / folder / "raw" / f"{part}-labels-idx1-ubyte", labels[rows])
    data = TorchvisionSet(name, root=str(tmp_path), val=0.25)  # type: ignore[arg-type]
    splits = data.load()
    assert data.spec().channels == 1 and data.spec().size == (28, 28)
    assert {part: len(split) for part, split in splits.items()} == {"train": 30, "val": 10, "test": 20}
    test = splits["test"].fetch(torch.arange(20))
    assert torch.equal(test["image"][:, 0], torch.from_numpy(pixels[40:]))
    path = tmp_path / folder / "raw" / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match="ubyte"):
        data.load()


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion_mnist"])
def test_missing_files_say_where_they_belong(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError) as caught:
        TorchvisionSet(name, root=str(tmp_path)).load()  # type: ignore[arg-type]
    assert str(tmp_path) in str(caught.value) and "data.download=true" in str(caught.value)


def test_an_unreachable_network_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        print("Downloading")
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", unreachable)
    with pytest.raises(DataError, match="on a machine with a network"):
        TorchvisionSet("cifar10", root=str(tmp_path), download=True).load()
    assert capsys.readouterr().out == ""


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="cifar100"):
        TorchvisionSet("cifar1000")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name, of_7, kept",
    [("cifar10", 5_000, 45_000), ("cifar100", 500, 45_000), ("mnist", 6_265, 53_998), ("fashion_mnist", 6_000, 54_000)],
)
def test_how_many_train_is_known_before_a_file_is_there(name: str, of_7: int, kept: int) -> None:
    """60,000 training images of MNIST, 50,000 of CIFAR; in MNIST's of each class as LeCun's page counts them."""
    data = TorchvisionSet(name, root="nowhere")  # type: ignore[arg-type]
    assert data._set.labels().bincount()[7] == of_7
    assert abs(data.train_samples() - kept) <= 1
    assert TorchvisionSet(name, root="nowhere", limit=100).train_samples() == 100  # type: ignore[arg-type]
