"""Batches by position: order, resume, ranks, and what reaches the device."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch
from lab_runs import no_waiting
from torch import Tensor

from cnnlab import rng
from cnnlab.data.ahead import NotAwaited, ahead
from cnnlab.data.loader import Loader
from cnnlab.data.splits import TensorSplit
from cnnlab.errors import DataError, UsageError
from cnnlab.protocols import Batch
from cnnlab.schema import DataPath, Loading


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


@pytest.mark.parametrize("neighbours", [0, 1])
@pytest.mark.parametrize(("rank", "world"), [(0, 1), (0, 2), (1, 2), (2, 3)])
def test_the_first_batch_is_fetched_once_whoever_looks_at_it(rank: int, world: int, neighbours: int) -> None:
    """Whole, and this rank's part of it, before training serves it; whatever they do to it, that one is unharmed."""

    class Counted(TensorSplit):
        fetched: list[int] = []

        def fetch(self, index: Tensor) -> Batch:
            self.fetched.append(len(index))
            return super().fetch(index)

    def loader(split: TensorSplit) -> Loader:
        return Loader(split, 7, seed=1, shuffle=True, rank=rank, world=world, neighbours=neighbours)

    plain = numbered(21)
    split = Counted(plain.images, plain.targets, "counted")
    Counted.fetched = []
    expected, looked = list(loader(plain).batches(0)), loader(split)
    whole, count = looked.alone().first()
    own, _ = looked.first()
    assert count == len(whole["label"]) == 7
    assert own["label"].tolist() == expected[0][0]["label"].tolist()
    for tensor in (*whole.values(), *own.values()):
        tensor.zero_()
    assert Counted.fetched == [7]
    assert served(looked) == [batch["label"].tolist() for batch, _ in expected]
    assert len(Counted.fetched) == 3, "and the two others"
    assert served(looked) == [batch["label"].tolist() for batch, _ in expected], "it is not kept"
    assert len(Counted.fetched) == 6


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


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 6])
def test_parts_are_fetched_so_far_ahead_and_no_further_in_order(count: int, depth: int) -> None:
    fetched = [threading.Event() for _ in range(count)]

    def begin(part: Tensor) -> Callable[[], int]:
        def fetch() -> int:
            fetched[int(part)].set()
            return int(part)

        return fetch

    for position, number in enumerate(ahead(begin, list(torch.arange(count)), depth)):
        assert number == position
        assert all(event.wait(5) for event in fetched[position : position + depth + 1])
        assert not any(event.is_set() for event in fetched[position + depth + 1 :])


def test_what_went_wrong_is_handed_on() -> None:
    def begin(part: Tensor) -> Callable[[], Batch]:
        def fail() -> Batch:
            raise DataError("gone")

        return fail

    with pytest.raises(DataError, match="gone"):
        list(ahead(begin, [torch.arange(1)], 2))


def test_a_caller_that_stops_early_drops_what_was_asked_for() -> None:
    begun: list[int] = []

    def begin(part: Tensor) -> Callable[[], int]:
        begun.append(int(part))
        return lambda: int(part)

    batches = ahead(begin, list(torch.arange(100)), 2)
    assert next(batches) == 0
    batches.close()  # type: ignore[attr-defined]
    assert begun == [0, 1, 2]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("cnnlab-fetch")]


def test_who_wants_to_stop_does_not_wait_for_a_batch_that_does_not_come() -> None:
    never, asked = threading.Event(), []

    def begin(part: torch.Tensor) -> Callable[[], int]:
        return (lambda: 1) if part == 0 else lambda: int(never.wait(30))

    served = ahead(begin, torch.arange(2), 0, lambda: asked)
    assert next(served) == 1, "what has come is served, whoever wants to stop"
    asked.append("stop")
    began = time.monotonic()
    with pytest.raises(NotAwaited):
        next(served)
    assert time.monotonic() - began < 5
    never.set()


def test_describe_is_one_line() -> None:
    line = Loader(numbered(2048), 64, seed=0, shuffle=True).describe()
    assert line == "2,048 samples, 32 batches of 64, resident (in memory, 0.0 MiB)"


def file_backed(length: int) -> TensorSplit:
    """As `numbered`, but as if its images were a memory-mapped file."""
    split = numbered(length)
    return TensorSplit(split.images, split.targets, "file", mapped=True)


def test_the_path_follows_the_sizes_and_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    def path(split: TensorSplit, wanted: str = "auto") -> tuple[str, bool]:
        loader = Loader(split, 5, seed=0, shuffle=True, loading=Loading(path=DataPath(wanted)))
        assert served(loader) == served(Loader(numbered(23), 5, seed=0, shuffle=True))
        return loader.path.value, "2 batches ahead" in loader.describe()

    assert path(numbered(23)) == ("resident", False)
    assert path(file_backed(23)) == ("mapped", False)
    assert path(file_backed(23), "resident") == ("resident", False)
    monkeypatch.setattr("cnnlab.data.splits.free_memory", lambda device: 100)
    assert path(file_backed(23)) == ("mapped", True), "files larger than the memory are read ahead"
    with pytest.raises(UsageError, match=r"loading\.path=mapped"):
        path(file_backed(23), "resident")


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["resident", "mapped"])
def test_both_ways_to_the_gpu_serve_the_same_without_waiting_for_it(path: str) -> None:
    loader = Loader(numbered(23), 5, seed=3, shuffle=True, device="cuda", loading=Loading(path=DataPath(path)))
    assert loader.path.value == path
    list(loader.batches(0))  # the allocators' first blocks
    with no_waiting():
        batches = list(loader.batches(1, start=1))
    assert all(tensor.is_cuda for batch, _ in batches for tensor in batch.values())
    wanted = served(Loader(numbered(23), 5, seed=3, shuffle=True), 1, start=1)
    assert [batch["label"].tolist() for batch, _ in batches] == wanted


@pytest.mark.gpu
def test_a_batch_is_not_overwritten_while_kernels_read_it() -> None:
    loader = Loader(numbered(600), 3, seed=3, shuffle=True, device="cuda", loading=Loading(path=DataPath.mapped))
    busy = torch.ones(2048, 2048, device="cuda")
    sums = []
    for batch, _ in loader.batches(0):
        for _ in range(4):
            busy = busy @ busy * 1e-4  # the kernels lag behind the copies
        sums.append(batch["label"] + busy[0, :1].long() * 0)
        del batch
    assert torch.cat(sums).tolist() == loader.order(0).tolist()


def test_a_users_split_that_only_fetches_is_served_as_ours_are() -> None:
    class Plain:
        fingerprint, labels = "plain", None

        def __len__(self) -> int:
            return 23

        def fetch(self, index: Tensor) -> Batch:
            return numbered(23).fetch(index)

    loader = Loader(Plain(), 5, seed=3, shuffle=True)
    assert loader.route() == "mapped"
    assert served(loader, 1) == served(Loader(numbered(23), 5, seed=3, shuffle=True), 1)
