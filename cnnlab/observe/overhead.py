"""What the statistics cost, measured on the running steps, and how rarely they must be taken to stay within it."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch

FREE_SECONDS = 1.0
"""What the statistics of a run may cost in any case."""
MIN_COSTS, MIN_STEPS = 1, 5
"""Sampled and other steps that must have been timed before anything is decided."""
END_SECONDS = 0.15
"""Kept for what follows the last step: the figures of the last sample and the last pictures."""
MAX_SLOWDOWN = 1 << 20
_WINDOW = 15
ONE_THREAD = 1 << 24
"""Elements up to which a tensor is looked at by one thread: some 5 ms. A mean of 131,072 of them takes 6 us in one
thread, and 8 ms in two where other work has the second core, as each parallel operation waits for it."""


class Aside:
    """What is done beside the run's own work: in one thread, on the clock of the host. Not to be nested, and not for
    what is compiled."""

    def __init__(self, device: torch.device):
        self.seconds = 0.0
        self._on_cpu = device.type == "cpu"

    @contextmanager
    def __call__(self, elements: int = 0) -> Iterator[None]:
        """
        Args:
            elements: of the largest tensor that is looked at; see `ONE_THREAD`.
        """
        began, threads = time.perf_counter(), torch.get_num_threads()
        alone = self._on_cpu and threads > 1 and elements <= ONE_THREAD
        if alone:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            if alone:
                torch.set_num_threads(threads)
            self.seconds += time.perf_counter() - began


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

    A sample costs what its step takes longer than the median of the other steps, and what handing its figures over
    takes (`charge`: files, TensorBoard, pictures, the imports of a first use). All samples of a run together, from the
    first on, may cost the share `limit` of its steps, or `FREE_SECONDS` if that is more. The factor is a power of two,
    and follows the measurements both ways. A stated cadence of one step leaves none to compare with, and is kept.

    Args:
        limit: largest share of a run's time, or `None` for any.
        make_mark: gives the present moment, on the device.
        now: gives it on the host, in seconds.
    """

    def __init__(
        self, limit: float | None, make_mark: Callable[[], Mark], now: Callable[[], float] = time.perf_counter
    ):
        self.limit = limit
        self.slowdown = 1
        self.charged = 0.0
        """Seconds that handing figures over took, in all."""
        self._make_mark = make_mark
        self._now = now
        self._begun: tuple[bool, Mark] | None = None
        self._marks: deque[tuple[bool, Mark, Mark]] = deque(maxlen=256)
        self._idle: deque[float] = deque(maxlen=4 * _WINDOW)
        self._sampled: deque[float] = deque(maxlen=_WINDOW)
        self._first = True  # a run's first step loads and allocates

    def end(self) -> bool:
        """At the end of a step, before figures are handed over. Whether a sample's cost became known."""
        if self._begun is not None:
            self._marks.append((*self._begun, self._make_mark()))
            self._begun = None
        return self._read()

    def begin(self, sampled: bool) -> None:
        """At the beginning of a step."""
        self._begun = sampled, self._make_mark()

    def pause(self) -> None:
        """Something other than a step comes next: the last step is not timed."""
        self._begun = None

    def charge(self, seconds: float) -> None:
        self.charged += seconds

    @contextmanager
    def charging(self) -> Iterator[None]:
        """What is done for the statistics outside of a step counts, too."""
        began = self._now()
        try:
            yield
        finally:
            self.charge(self._now() - began)

    def may_begin(self) -> bool:
        """Whether a sample may be taken while none has been timed: when it can be compared, and none is awaited."""
        waiting = any(sampled for sampled, _, _ in self._marks)
        return self.limit is None or bool(self._sampled) or (len(self._idle) >= MIN_STEPS and not waiting)

    @property
    def step_seconds(self) -> float | None:
        """Median time of a step without a sample; `None` while too few are known."""
        return statistics.median(self._idle) if len(self._idle) >= MIN_STEPS else None

    @property
    def sample_seconds(self) -> float | None:
        """Median cost of a sample in its step; `None` while too few are known."""
        step = self.step_seconds
        if step is None or len(self._sampled) < MIN_COSTS:
            return None
        return max(0.0, statistics.median(self._sampled) - step)

    def spent(self, samples: int) -> float | None:
        """Seconds that so many samples have cost until now."""
        each = self.sample_seconds
        return None if each is None else samples * each + self.charged

    def decide(self, total_steps: int, taken: int, whole: Callable[[int], int], coming: Callable[[int], int]) -> None:
        """Sets `slowdown`, once enough is known. To be called when a sample's cost became known.

        Args:
            total_steps: of the run.
            taken: samples until now.
            whole: how many the whole run has at a slowdown.
            coming: how many are still to come at a slowdown.
        """
        step, sample, spent = self.step_seconds, self.sample_seconds, self.spent(taken)
        if self.limit is None or step is None or sample is None or spent is None:
            return
        allowed = max(self.limit * step * total_steps, FREE_SECONDS) - END_SECONDS
        each = sample + self.charged / max(1, taken)
        wanted = 1
        while wanted < MAX_SLOWDOWN and (whole(wanted) * each > allowed or coming(wanted) * each > allowed - spent):
            wanted *= 2
        if wanted > self.slowdown or whole(wanted) * each <= 0.8 * allowed:  # not to and fro
            self.slowdown = wanted

    def _read(self) -> bool:
        """Takes the times of the steps that are over."""
        known = False
        while self._marks and self._marks[0][2].ready():
            sampled, begin, end = self._marks.popleft()
            if not sampled:
                self._idle.append(begin.seconds_until(end))
            elif not self._first:
                self._sampled.append(begin.seconds_until(end))
                known = True
            self._first = False
        return known

    def state_dict(self) -> dict[str, Any]:
        return {"slowdown": self.slowdown, "charged": self.charged}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.slowdown, self.charged = state["slowdown"], state.get("charged", 0.0)
