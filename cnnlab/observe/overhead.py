"""What the statistics cost, measured on the running steps, and how rarely they must be taken to stay within it."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

FREE_SECONDS = 1.0
"""What the statistics of a run may cost in any case."""
MIN_COSTS, MIN_STEPS = 3, 5
"""Sampled and other steps that must have been timed before anything is decided."""
MAX_SLOWDOWN = 1 << 20
_WINDOW = 15


class Mark(Protocol):
    """A moment on the device."""

    def ready(self) -> bool: ...

    def seconds_until(self, later: Any) -> float: ...


class _HostMark:
    """Now, where the device computes while the host waits."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def ready(self) -> bool:
        return True

    def seconds_until(self, later: _HostMark) -> float:
        return later._at - self._at


class _CudaMark:
    """When the GPU gets here; asked for only after it did, so nobody waits."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def ready(self) -> bool:
        return self._event.query()

    def seconds_until(self, later: _CudaMark) -> float:
        return self._event.elapsed_time(later._event) / 1e3


def mark_for(device: torch.device) -> Callable[[], Mark]:
    return _CudaMark if device.type == "cuda" else _HostMark


class Overhead:
    """Times steps with and without a sample, and says by which factor the cadence must be slower.

    A sample's cost is what its step and the one after it (in which the figures are written) take longer than the
    median of the other steps. All samples of a run together may cost the share `limit` of its steps, or
    `FREE_SECONDS` if that is more. The factor is a power of two, and follows the measurements both ways. A cadence of
    one or two steps leaves none to compare with, and is kept.

    Args:
        limit: largest share of a run's time, or `None` for any.
        make_mark: gives the present moment.
    """

    def __init__(self, limit: float | None, make_mark: Callable[[], Mark]):
        self.limit = limit
        self.slowdown = 1
        self._make_mark = make_mark
        self._marks: deque[tuple[bool, Mark]] = deque(maxlen=256)
        self._idle: deque[float] = deque(maxlen=4 * _WINDOW)
        self._sampled: deque[float] = deque(maxlen=_WINDOW)
        """Sampled steps, each together with the one after it."""
        self._first = True  # a run's first step loads and allocates

    def begin(self, sampled: bool) -> None:
        """At the beginning of a step."""
        self._marks.append((sampled, self._make_mark()))
        self._read()

    def pause(self) -> None:
        """Something other than a step comes next: the last step is not timed."""
        self._marks.clear()

    @property
    def step_seconds(self) -> float | None:
        """Median time of a step without a sample; `None` while too few are known."""
        return statistics.median(self._idle) if len(self._idle) >= MIN_STEPS else None

    @property
    def sample_seconds(self) -> float | None:
        """Median cost of a sample; `None` while too few are known."""
        step = self.step_seconds
        if step is None or len(self._sampled) < MIN_COSTS:
            return None
        return max(0.0, statistics.median(self._sampled) - 2 * step)

    def decide(self, total_steps: int, samples: Callable[[int], int]) -> None:
        """Sets `slowdown`, once enough is known. To be called once a sample.

        Args:
            total_steps: of the run.
            samples: how many the whole run has at a slowdown.
        """
        step, sample = self.step_seconds, self.sample_seconds
        if self.limit is None or step is None or sample is None:
            return
        allowed = max(self.limit * step * total_steps, FREE_SECONDS)
        wanted = 1
        while wanted < MAX_SLOWDOWN and samples(wanted) * sample > allowed:
            wanted *= 2
        if wanted > self.slowdown or samples(wanted) * sample <= 0.8 * allowed:  # not to and fro
            self.slowdown = wanted

    def _read(self) -> None:
        """Takes the times of the steps that are over."""
        while len(self._marks) >= 3 and self._marks[2][1].ready():
            (sampled, begin), (next_sampled, middle), (_, end) = (self._marks[i] for i in range(3))
            this, following = begin.seconds_until(middle), middle.seconds_until(end)
            self._marks.popleft()
            if sampled and not next_sampled:
                if not self._first:
                    self._sampled.append(this + following)
                self._marks.popleft()  # the step in which the figures were written is no idle one
            elif not sampled:
                self._idle.append(this)
            self._first = False

    def state_dict(self) -> dict[str, Any]:
        return {"slowdown": self.slowdown}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.slowdown = state["slowdown"]
