"""Arms measured side by side: interleaved in rounds, warmed up apart, with medians and spread.

A shared machine's speed drifts by more than the differences that matter here, so no arm is measured in one piece: each
gets a short turn a round, the order rotates from round to round, and what is compared is compared within a round.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

WARM_UP_STEPS = 3
"""Updates that are never timed: allocations, a compilation, the capture of a CUDA graph."""


@dataclass(frozen=True)
class Update:
    """What one update did: its `images`, and whether the statistics were `sampled` at it."""

    images: int
    sampled: bool = False


@dataclass(frozen=True)
class Turn:
    """An arm's part of a round: `steps` updates on `images` images, `sampled` of them with statistics."""

    steps: int
    images: int
    seconds: float
    sampled: int = 0

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    @property
    def seconds_per_image(self) -> float:
        return self.seconds / self.images


class Arm:
    """One way of training that can do a few updates when it is asked to, and waits in between.

    Args:
        name: as it is reported.
        updates: does one update each time that it is asked for the next; never ends.
    """

    def __init__(self, name: str, updates: Iterable[Update]):
        self.name = name
        self._updates = iter(updates)

    def run(self, steps: int) -> tuple[int, int]:
        """Does `steps` updates; returns how many images they saw, and how many of them were sampled."""
        images = sampled = 0
        for _ in range(steps):
            update = next(self._updates)
            images += update.images
            sampled += update.sampled
        return images, sampled

    def close(self) -> None:
        """Lets go of what the arm holds: threads, worker processes, open files."""
        close = getattr(self._updates, "close", None)
        if close is not None:
            close()


class _Workers:
    """The worker processes that an arm started: they run in its turns only.

    Unstopped, they would fill their queues in the others' turns: time taken from those, and batches for nothing here.
    """

    def __init__(self) -> None:
        self._before = {child.pid for child in multiprocessing.active_children()}
        self._own: list[int] = []

    def note(self) -> None:
        """Claims the processes that came into being since this object did."""
        pids = [child.pid for child in multiprocessing.active_children()]
        self._own = [pid for pid in pids if pid is not None and pid not in self._before]

    def stop(self) -> None:
        self._send("SIGSTOP")

    def go_on(self) -> None:
        self._send("SIGCONT")

    def _send(self, name: str) -> None:
        number = getattr(signal, name, None)
        if number is None:  # Windows has neither
            return
        for pid in self._own:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue


@dataclass
class _Entry:
    arm: Arm
    workers: _Workers
    steps: int


def interleave(
    arms: Sequence[Arm],
    *,
    rounds: int,
    seconds: float,
    synchronize: Callable[[], None] = lambda: None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, list[Turn]]:
    """The turns of each arm, one a round.

    Args:
        rounds: turns of each arm.
        seconds: length of a turn, about; at least one update.
        synchronize: waits for the device, before and after each turn.
        progress: told what is done next, how many turns are done, and how many there are.
        now: a clock in seconds.
    """
    total = len(arms) * rounds
    entries: list[_Entry] = []
    turns: dict[str, list[Turn]] = {arm.name: [] for arm in arms}
    try:
        for arm in arms:
            progress(f"warm-up: {arm.name}", 0, total)
            workers = _Workers()
            entries.append(_Entry(arm, workers, 1))
            entries[-1].steps = _calibrated(arm, seconds, synchronize, now)
            workers.note()
            workers.stop()
        for number in range(rounds):
            first = number % len(entries)
            for entry in [*entries[first:], *entries[:first]]:
                done = sum(map(len, turns.values()))
                progress(f"round {number + 1} of {rounds}: {entry.arm.name}", done, total)
                turns[entry.arm.name].append(_turn(entry, synchronize, now))
        progress("done", total, total)
    finally:
        for entry in entries:
            entry.workers.go_on()
    return turns


def _calibrated(arm: Arm, seconds: float, synchronize: Callable[[], None], now: Callable[[], float]) -> int:
    """Warms the arm up; returns how many updates take about `seconds`."""
    arm.run(WARM_UP_STEPS)
    synchronize()
    steps, began = 0, now()
    while True:
        arm.run(1)
        synchronize()
        steps += 1
        passed = now() - began
        if passed >= seconds / 4 or steps >= 50:
            return max(1, round(seconds * steps / max(passed, 1e-9)))


def _turn(entry: _Entry, synchronize: Callable[[], None], now: Callable[[], float]) -> Turn:
    entry.workers.go_on()
    synchronize()
    began = now()
    images, sampled = entry.arm.run(entry.steps)
    synchronize()
    passed = now() - began
    entry.workers.stop()
    return Turn(entry.steps, images, max(passed, 1e-9), sampled)


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        known = sorted(values)
        if len(known) == 1:
            return cls(known[0], known[0], known[0])
        low, median, high = statistics.quantiles(known, n=4, method="inclusive")
        return cls(median, low, high)


def rates(turns: Iterable[Turn]) -> Spread:
    """Images a second."""
    return Spread.of(turn.images_per_second for turn in turns)


def ratios(turns: Sequence[Turn], others: Sequence[Turn]) -> Spread:
    """How many times as fast as the others, round by round."""
    return Spread.of(a.images_per_second / b.images_per_second for a, b in zip(turns, others, strict=True))


def endless(cycle: Callable[[int], Iterable[Update]]) -> Iterator[Update]:
    """The updates of epoch 0, 1, 2, ... and so on."""
    epoch = 0
    while True:
        yield from cycle(epoch)
        epoch += 1
