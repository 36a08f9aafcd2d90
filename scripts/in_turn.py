"""Two loops over copies of one network, update by update in turn: the lab's, and one by hand that measures nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def rows(count: int, batch: int) -> Iterator[Tensor]:
    """The rows of shuffled full batches, for ever."""
    while True:
        yield from (index for index in torch.randperm(count).split(batch) if len(index) == batch)


def in_turn(
    told: Sequence[str], hand: Callable[[Any], Callable[[], None]], *, rounds: int, updates: int, title: str
) -> float:
    """Prints images/s of both in every round, and the median of their ratio (lab / by hand).

    Args:
        told: overrides, `trainer.step=eager` among them; one thread, which other processes disturb least.
        hand: makes the loop by hand of a run, whose network is its own: each call is one update of as many images.
        updates: of each in a round.
    """
    from cnnlab.building.builder import build
    from cnnlab.building.trial import checked
    from cnnlab.composing.composer import composer
    from cnnlab.train.loop import updates as updates_of

    with composer() as composed:
        run, twin = (
            build(checked(composed, [*told, "trainer.threads=1", "trainer.epochs=100000", "stats=off"]))
            for _ in range(2)
        )
    by_hand = hand(twin)

    def endless() -> Iterator[object]:
        while True:
            yield from updates_of(run)
            run.clock.close(run.steps_per_epoch)

    looks, ratios, images = endless(), [], run.batch_size * updates
    for number in range(rounds + 1):
        times = []
        for action in (by_hand, lambda: next(looks)):
            began = time.perf_counter()
            for _ in range(updates):
                action()
            times.append(time.perf_counter() - began)
        if number == 0:
            continue  # what is made on first use
        ratios.append(times[0] / times[1])
        print(f"by hand {images / times[0]:7.1f}  lab {images / times[1]:7.1f} images/s  {ratios[-1]:.3f}", flush=True)
    ratio = statistics.median(ratios)
    print(f"{title}: ratio {ratio:.3f} (median of {rounds}; {min(ratios):.3f} to {max(ratios):.3f})")
    return ratio
