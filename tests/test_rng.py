"""Random numbers: uniform, independent by stream, and the same wherever and whenever they are drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cnnlab import rng

INDEX = torch.arange(20_000)


def test_the_numbers_of_a_seed_are_pinned():
    """Runs of earlier versions stay reproducible; a change here belongs under "numbers changed"."""
    assert rng.derive(0, "order", 3) == 554563163506081016
    drawn = rng.uniform(0, "augment/flip", 1, torch.tensor([0, 1, 1796]), 2)
    assert drawn.tolist() == [
        [0.8663417100906372, 0.7036395072937012],
        [0.2949879765510559, 0.37965643405914307],
        [0.5940583944320679, 0.2457824945449829],
    ]


@pytest.mark.parametrize("change", [{"seed": 1}, {"stream": "b"}, {"epoch": 1}])
def test_each_of_seed_stream_and_epoch_gives_other_numbers(change: dict[str, object]):
    base = {"seed": 0, "stream": "a", "epoch": 0}
    first, second = (rng.uniform(**arguments, index=INDEX, draws=1)[:, 0] for arguments in (base, base | change))
    correlation = np.corrcoef(first.numpy(), second.numpy())[0, 1]
    assert abs(correlation) < 4 / len(INDEX) ** 0.5


@pytest.mark.parametrize("index", [INDEX, INDEX * 1_000_003, 2**40 + INDEX])
def test_uniform_is_uniform(index: torch.Tensor):
    from scipy import stats

    drawn = rng.uniform(7, "augment/crop", 2, index, 3).double().numpy()
    assert drawn.min() >= 0
    assert drawn.max() < 1
    for column in drawn.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-4
        assert stats.chisquare(np.histogram(column, 64, (0, 1))[0]).pvalue > 1e-4


def test_neighbors_and_draws_of_one_sample_are_independent():
    from scipy import stats

    drawn = rng.uniform(0, "augment/crop", 0, INDEX, 2).numpy()
    for pairs in (drawn, np.stack([drawn[:-1, 0], drawn[1:, 0]], 1)):
        counts = np.histogram2d(pairs[:, 0], pairs[:, 1], 16, ((0, 1), (0, 1)))[0]
        assert stats.chisquare(counts.ravel()).pvalue > 1e-4


def test_the_low_bits_are_random_too():
    low = (rng.uniform(0, "x", 0, INDEX, 1)[:, 0] * 2**24).long() & 1
    assert abs(low.float().mean().item() - 0.5) < 4 * 0.5 / len(INDEX) ** 0.5


def test_a_samples_numbers_do_not_depend_on_the_batch_around_it():
    whole = rng.uniform(3, "s", 5, INDEX, 4)
    order = torch.randperm(len(INDEX), generator=torch.Generator().manual_seed(0))
    assert torch.equal(rng.uniform(3, "s", 5, order, 4), whole[order])
    assert torch.equal(rng.uniform(3, "s", 5, INDEX[17:18], 4), whole[17:18])
    assert torch.equal(rng.uniform(3, "s", 5, INDEX, 2), whole[:, :2])


def test_an_order_is_a_permutation_of_its_own_for_each_seed_and_epoch():
    orders = [rng.permutation(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(1000))
    for i, first in enumerate(orders):
        for second in orders[i + 1 :]:
            assert (first == second).sum() < 10
    assert torch.equal(rng.permutation(0, 1, 1000), orders[1])


def test_seeded_leaves_the_default_generator_as_it_was():
    before = torch.get_rng_state()
    with rng.seeded(0, "init", "a"):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(RuntimeError, match="stop"), rng.seeded(0, "init", "a"):
        assert torch.equal(torch.rand(3), first)
        raise RuntimeError("stop")
    assert torch.equal(torch.get_rng_state(), before)


def test_reseed_puts_the_default_generator_at_the_start_of_a_stream():
    rng.reseed(torch.device("cpu"), 0, "dropout", 4, 0, 0)
    first = torch.rand(5)
    torch.rand(100)
    rng.reseed(torch.device("cpu"), 0, "dropout", 4, 0, 0)
    assert torch.equal(torch.rand(5), first)
    rng.reseed(torch.device("cpu"), 0, "dropout", 5, 0, 0)
    assert not torch.equal(torch.rand(5), first)


def test_streams_with_glued_names_differ():
    assert rng.derive(0, "a", "b", 1) != rng.derive(0, "ab", 1) != rng.derive(0, "a", "b1")


def test_the_default_generators_are_afterwards_what_they_were():
    torch.manual_seed(5)
    first = torch.rand(3)
    torch.manual_seed(5)
    with rng.restored(torch.device("cpu")):
        rng.reseed(torch.device("cpu"), 0, "dropout", 1)
        torch.rand(7)
    assert torch.equal(torch.rand(3), first)
