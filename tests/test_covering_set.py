"""Composition holds: options of every group beside options of every other group train, or the check says why not.

Its own pieces are tested by themselves; the small set runs with every test, the whole one when asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from covering_set import Covering, Lab, Space, cover, data_files, pairs_of, refused_pairs, to_blame, whole_space

from cnnlab.composing.composer import composer

CHEAP = {
    "activation": ("relu", "prelu"),
    "augment": ("[standard]", "[mixup]"),
    "data": ("shapes", "folder"),
    "head": ("nearest", "linear", "box"),
    "init": ("lsuv",),
    "loss": ("focal", "dice"),
    "model": ("cnn", "mlp"),
    "norm": ("layer",),
    "normalize": ("zca", "pretrained"),
    "optim": ("lbfgs", "muon"),
    "probe": ("[activations]",),
    "regularization": ("[ema,max_norm,l1]",),
    "schedule": ("plateau", "one_cycle"),
    "stats": ("full",),
    "task": ("segmentation", "localization"),
    "trainer.precision": ("bf16",),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def space() -> Iterator[Space]:
    with data_files() as files, composer() as open_composer:
        yield whole_space(open_composer, files)


def test_rows_cover_every_pair_and_keep_apart_what_they_are_told_to() -> None:
    factors = {"a": ("1", "2", "3"), "b": ("1", "2", "3"), "c": ("1", "2"), "d": ("1", "2")}
    apart = [
        frozenset({("a", "1"), ("b", "2")}),
        frozenset({("c", "2")}),
        frozenset({("a", "2"), ("b", "3"), ("d", "1")}),
    ]
    covering = Covering(factors, seed=0)
    assert covering.total == 9 + 4 * 6 + 4
    for combination in apart:
        covering.avoid(combination)
    rows = []
    while covering.missing:
        _, row = covering.row()
        assert row is not None and row.keys() == factors.keys()
        rows.append(row)
        covering.drop(pairs_of(row))
    assert not any(combination <= row.items() for combination in apart for row in rows)
    covered = {pair for row in rows for pair in pairs_of(row)}
    allowed = {pair for pair in Covering(factors, 0).missing if not any(c <= pair for c in apart)}
    assert covered == allowed
    assert 9 <= len(rows) <= 14  # nine pairs of a and b, one of them kept apart


def test_a_pair_that_no_row_can_hold_is_told() -> None:
    covering = Covering({"a": ("1",), "b": ("1",), "c": ("1", "2")}, seed=0)
    for option in ("1", "2"):
        covering.avoid(frozenset({("a", "1"), ("b", "1"), ("c", option)}))
    assert covering.row()[1] is None


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_choices_to_blame_are_found(size: int) -> None:
    row = dict.fromkeys("abcdefg", "1")
    for culprits in itertools.combinations(row, size):
        blamed = to_blame(row, lambda choices, culprits=culprits: set(culprits) <= choices.keys())
        assert set(blamed) == set(culprits)


def test_every_group_is_a_factor(space: Space) -> None:
    with composer() as open_composer:
        listed = {group: open_composer.options(group) for group in open_composer.groups()}
    presets = {"debug", "experiment", "groups", "loading", "local", "paths", "trainer", "weights"}
    for group in listed.keys() - presets:
        options = {option.strip("[]") for option in space.factors[group]}
        assert set(listed[group]) <= options
        assert space.defaults[group] in space.factors[group]


@pytest.mark.slow
def test_a_small_covering_set_trains(space: Space) -> None:
    small = space.restricted(lambda factor, option: option in CHEAP.get(factor, ()))
    with composer() as open_composer:
        result = cover(Lab(open_composer, small), small)
    assert not result.failed and not result.missing
    assert result.trained_pairs + refused_pairs(result, small) == result.pairs
    refused = {tuple(sorted(combination)) for combination in result.refused}
    assert (("data", "digits"), ("task", "segmentation")) in refused
    assert all(reason for reason in result.refused.values())


@pytest.mark.slow
def test_the_whole_covering_set_trains(space: Space) -> None:
    with composer() as open_composer:
        result = cover(Lab(open_composer, space), space, seed=1)
    assert not result.failed and not result.missing
    assert result.trained_pairs + refused_pairs(result, space) == result.pairs
