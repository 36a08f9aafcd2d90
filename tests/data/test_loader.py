"""Batches by position: order, resume, ranks, and what reaches the device."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from cnnlab import rng
from cnnlab.data.loader import Loader, one_ahead
from cnnlab.data.splits import TensorSplit
from cnnlab.errors import DataError
from cnnlab.protocols import Batch


def numbered(length: int) -> TensorSplit:
    """A split whose label is the position."""
    images = torch.zeros(length, 1, 2, 2, dtype=torch.uint8)
    return TensorSplit(images, {"label": torch.arange(length)}, "numbered")


def served(loader: Loader, epoch: int = 0, start: int = 0) -> list[list[int]]:
    return [batch["label"].tolist() for batch, _ in loader.batches(epoch, start)]


def test_batches_follow_the_epochs_permutation() -> None:
    loader = Loader(numbered(23), 5, seed=7, shuffle=True)
    for epoch in (0, 3):
        order = rng.permutation(7, epoch, 23).tolist()
        assert served(loader, epoch) == [order[b : b + 5] for b in range(0, 23, 5)]
    assert loader.steps == 5
    assert served(loader, 0) != served(loader, 1)


def test_evaluation_keeps_the_order() -> None:
    assert served(Loader(numbered(5), 2, seed=7, shuffle=False)) == [[0, 1], [2, 3], [4]]


def test_a_resumed_epoch_serves_what_was_left() -> None:
    loader = Loader(numbered(23), 5, seed=0, shuffle=True)
    for start in range(6):
        assert served(loader, 2, start) == served(loader, 2)[start:]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_partition_every_batch(world: int) -> None:
    whole = served(Loader(numbered(21), 5, seed=1, shuffle=True))
    ranks = [Loader(numbered(21), 5, seed=1, shuffle=True, rank=r, world=world) for r in range(world)]
    parts = [list(loader.batches(0)) for loader in ranks]
    for b, wanted in enumerate(whole):
        labels = [part[b][0]["label"].tolist() for part in parts]
        assert sorted(label for part in labels for label in part) == sorted(wanted)
        assert {part[b][1] for part in parts} == {len(wanted)}
    # 21 = 4 * 5 + 1: on more than one rank the last batch leaves some without a sample, and is served still.
    assert [len(part[-1][0]["label"]) for part in parts] == [1] + [0] * (world - 1)
    assert parts[-1][-1][0]["image"].shape[1:] == (1, 2, 2)


def test_drop_last_serves_full_batches_only() -> None:
    loader = Loader(numbered(23), 5, seed=0, shuffle=True, drop_last=True)
    assert loader.steps == 4 and [len(labels) for labels in served(loader)] == [5] * 4


def test_a_loader_without_a_batch_is_refused() -> None:
    with pytest.raises(DataError, match=r"trainer\.drop_last=false"):
        Loader(numbered(3), 5, seed=0, shuffle=True, drop_last=True)
    with pytest.raises(ValueError, match="rank"):
        Loader(numbered(3), 5, seed=0, shuffle=True, rank=2, world=2)


def test_transform_gets_the_batch_and_the_epoch() -> None:
    seen: list[int] = []

    def transform(batch: Batch, epoch: int) -> Batch:
        seen.append(epoch)
        return {**batch, "image": batch["image"].float() + epoch}

    loader = Loader(numbered(4), 2, seed=0, shuffle=True, transform=transform)
    images: list[Tensor] = [batch["image"] for batch, _ in loader.batches(9)]
    assert seen == [9, 9] and all(image.dtype == torch.float32 and (image == 9).all() for image in images)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_one_ahead_fetches_the_next_part_meanwhile_and_keeps_the_order(count: int) -> None:
    begun = [threading.Event() for _ in range(count)]

    def fetch(part: Tensor) -> Batch:
        begun[int(part)].set()
        return {"index": part}

    for position, batch in enumerate(one_ahead(fetch, list(torch.arange(count)))):
        assert int(batch["index"]) == position
        assert all(event.wait(5) for event in begun[position : position + 2])
        assert not any(event.is_set() for event in begun[position + 2 :])


def test_one_ahead_hands_on_what_went_wrong() -> None:
    def fail(part: Tensor) -> Batch:
        raise DataError("gone")

    with pytest.raises(DataError, match="gone"):
        list(one_ahead(fail, [torch.arange(1)]))


def test_describe_is_one_line() -> None:
    line = Loader(numbered(2048), 64, seed=0, shuffle=True).describe()
    assert line == "2,048 samples (0.0 MiB), 32 batches of 64, gathered by the CPU"


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.25, 0.0])
def test_both_ways_to_the_gpu_serve_the_same(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    monkeypatch.setattr("cnnlab.data.loader._RESIDENT_SHARE", share)
    loader = Loader(numbered(23), 5, seed=3, shuffle=True, device="cuda")
    assert loader.resident == (share > 0)
    batches = list(loader.batches(1, start=1))
    assert all(tensor.is_cuda for batch, _ in batches for tensor in batch.values())
    wanted = served(Loader(numbered(23), 5, seed=3, shuffle=True), 1, start=1)
    assert [batch["label"].tolist() for batch, _ in batches] == wanted
