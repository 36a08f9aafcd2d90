"""Cutting, thinning and unbalancing, and the split that serves rows of shared tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cnnlab.data.splits import (
    TensorSplit,
    assemble,
    digest,
    limited,
    long_tailed,
    partitioned,
    require_fractions,
    stratified,
)
from cnnlab.errors import DataError


def uneven_labels() -> torch.Tensor:
    counts = torch.tensor([97, 41, 13, 5, 200, 1, 33])
    labels = torch.arange(len(counts)).repeat_interleave(counts)
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))]


@pytest.mark.parametrize("fractions", [(0.7, 0.1, 0.2), (0.9, 0.1), (1.0,), (0.37, 0.63), (0.25,) * 4])
def test_stratified_covers_all_and_keeps_each_class_within_one_sample(fractions: tuple[float, ...]) -> None:
    labels = uneven_labels()
    parts = stratified(labels, fractions, seed=0)
    assert torch.cat(parts).sort().values.tolist() == list(range(len(labels)))
    for part, fraction in zip(parts, fractions):
        for label in range(7):
            wanted = fraction * int((labels == label).sum())
            assert abs(int((labels[part] == label).sum()) - wanted) < 1


def test_stratified_roundings_cancel_over_many_small_classes() -> None:
    labels = torch.arange(1000).repeat(4)
    train, val, test = stratified(labels, (0.7, 0.1, 0.2), seed=0)
    assert abs(len(val) - 400) <= 5 and abs(len(test) - 800) <= 5 and abs(len(train) - 2800) <= 5


def test_stratified_is_exact_where_it_can_be() -> None:
    parts = stratified(torch.arange(10).repeat(5000), (0.7, 0.1, 0.2), seed=5)
    assert [len(part) for part in parts] == [35_000, 5_000, 10_000]


def test_stratified_depends_on_the_seed_only() -> None:
    labels = uneven_labels()
    first, again, other = (stratified(labels, (0.5, 0.5), seed=s)[1] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_stratified_refuses_fractions_that_are_no_partition() -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        stratified(torch.zeros(4, dtype=torch.int64), (0.5, 0.6), seed=0)


@pytest.mark.parametrize("limit", [1, 7, 70, 389, 390, 10_000])
def test_limited_keeps_the_count(limit: int) -> None:
    labels = uneven_labels()
    kept = limited(labels, limit, seed=0)
    assert len(kept) == min(limit, len(labels))
    assert len(kept.unique()) == len(kept)


def test_limited_fraction_is_stratified() -> None:
    labels = torch.arange(10).repeat(100)
    assert torch.bincount(labels[limited(labels, 0.05, seed=0)]).tolist() == [5] * 10
    assert len(limited(labels, 1.0, seed=0)) == 1000


def test_long_tailed_gives_the_published_profile() -> None:
    """CIFAR-10-LT with ratio 100 has 12,406 images (Cao et al. 2019, LDAM-DRW; Cui et al. 2019)."""
    labels = torch.arange(10).repeat(5000)
    counts = torch.bincount(labels[long_tailed(labels, 100, 10, seed=0)]).tolist()
    assert counts == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert sum(counts) == 12_406


def test_long_tailed_keeps_at_least_one_and_at_most_all() -> None:
    labels = torch.tensor([0] * 10 + [1] * 2 + [2] * 10)
    assert torch.bincount(labels[long_tailed(labels, 1000, 3, seed=0)]).tolist() == [10, 1, 1]
    assert torch.bincount(labels[long_tailed(labels, 1, 3, seed=0)]).tolist() == [10, 2, 10]


def test_partitioned_thins_only_train_and_keeps_given_splits() -> None:
    labels = torch.arange(4).repeat(100)
    given = {"train": torch.arange(0, 300), "test": torch.arange(300, 400)}
    common: Any = {"val": 0.1, "test": 0.5, "seed": 0}
    whole = partitioned(given, labels, 4, limit=None, imbalance=None, **common)
    thin = partitioned(given, labels, 4, limit=30, imbalance=10.0, **common)
    assert {name: len(rows) for name, rows in whole.items()} == {"train": 270, "val": 30, "test": 100}
    assert len(thin["train"]) == 30 and set(thin["train"].tolist()) <= set(whole["train"].tolist())
    assert torch.equal(thin["val"], whole["val"]) and torch.equal(thin["test"], given["test"])
    counts = torch.bincount(labels[thin["train"]])
    assert counts[0] > counts[1] > counts[2] >= counts[3]


def test_imbalance_needs_labels() -> None:
    with pytest.raises(ValueError, match=r"data\.imbalance=null"):
        partitioned({"train": torch.arange(9)}, None, 2, val=0.2, test=0.2, limit=None, imbalance=2.0, seed=0)


def test_require_fractions() -> None:
    require_fractions(0.4, 0.5)
    with pytest.raises(ValueError, match="smaller fractions"):
        require_fractions(0.5, 0.5)


def example() -> TensorSplit:
    images = torch.arange(5 * 12, dtype=torch.uint8).view(5, 3, 2, 2)
    targets = {"label": torch.tensor([3, 1, 2, 0, 4], dtype=torch.uint8), "box": torch.rand(5, 4)}
    return TensorSplit(images, targets, "abc", torch.tensor([4, 0, 2]))


def test_tensor_split_reaches_its_own_rows() -> None:
    split = example()
    batch = split.fetch(torch.tensor([2, 0]))
    assert len(split) == 3 and split.labels is not None and split.labels.tolist() == [4, 3, 2]
    assert batch["index"].tolist() == [2, 0]
    assert batch["label"].tolist() == [2, 4] and batch["label"].dtype == torch.int64
    assert torch.equal(batch["image"], split.images[[2, 4]]) and batch["image"].dtype == torch.uint8
    assert torch.equal(batch["box"], split.targets["box"][[2, 4]])
    assert split.nbytes == 3 * (12 + 1 + 16)


def test_moving_a_split_copies_only_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cnnlab.data.splits._COPY_BYTES", 24)  # two images a piece
    split = example()
    moved = split.to(torch.device("cpu"))
    assert len(moved.images) == 3 and moved.fingerprint == split.fingerprint
    here, there = split.fetch(torch.arange(3)), moved.fetch(torch.arange(3))
    assert all(torch.equal(here[name], there[name]) for name in here)


@pytest.mark.gpu
def test_a_split_on_the_device_takes_indices_of_the_cpu() -> None:
    moved = example().to(torch.device("cuda"))
    batch = moved.fetch(torch.tensor([1]))
    assert all(tensor.is_cuda for tensor in batch.values())
    assert moved.labels is not None and moved.labels.device.type == "cpu"


def test_tensor_split_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="uint8"):
        TensorSplit(torch.zeros(2, 3, 4, 4), {}, "")
    with pytest.raises(ValueError, match="rows of `label`"):
        TensorSplit(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), {"label": torch.zeros(3)}, "")


def test_assemble_refuses_an_empty_split() -> None:
    images = torch.zeros(2, 1, 1, 1, dtype=torch.uint8)
    with pytest.raises(DataError, match=r"none in val \(train 2, val 0\)"):
        assemble(images, {}, "", {"train": torch.arange(2), "val": torch.arange(0)})


def test_digest_tells_contents_apart() -> None:
    a = torch.arange(6)
    names = {digest(a), digest(a.view(2, 3)), digest(a.float()), digest(a + 1), digest(a, 1), digest("1", a)}
    assert len(names) == 6 and digest(a.clone()) in names
