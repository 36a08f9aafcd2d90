"""Tries steps before a run begins: whether one works here, and whether compiling pays."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from cnnlab.errors import CnnlabError
from cnnlab.observe.taps import Taps
from cnnlab.protocols import Batch
from cnnlab.train.step import EagerStep

COMPILE_FROM = 30 * 60
"""Seconds that the rest of a run must take for a trial of `torch.compile`: it costs 10 to 90 s and may be in vain (on
two cores of an AVX512-BF16 CPU, compiled against eager: 0.74 to 1.2 times the rate)."""
MIN_STEPS = 1000
"""Steps below which a run is not even timed."""
MIN_GAIN = 1.03
_ROUNDS = 5


def refusal(step: EagerStep, batch: Batch, count: int) -> str | None:
    """Why a step cannot run this network here, in one line; `None` if it can."""
    try:
        step.rehearse(batch, count)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, CnnlabError, NotImplementedError) as error:
        return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return None


def compiled_if_it_pays(
    eager: EagerStep,
    make_compiled: Callable[[], EagerStep],
    first_batch: Callable[[], tuple[Batch, int]],
    steps: int,
    *,
    taps: Taps | None = None,
    compile_from: float = COMPILE_FROM,
) -> tuple[EagerStep, str | None]:
    """The faster of the two steps, and a line that says why, where compiling was considered.

    Args:
        first_batch: gives this process's part of a full batch, and the size of the whole.
        steps: that the run has to do.
        taps: of the network; closed between samples in the eager step, and left for the step that is chosen.
        compile_from: see `COMPILE_FROM`.
    """
    if steps < MIN_STEPS:
        return eager, None
    batch, count = first_batch()
    eager.rehearse(batch, count)
    if _seconds(eager, batch, count, rounds=2) * steps < compile_from:
        return eager, None
    began = time.perf_counter()
    compiled = make_compiled()
    with _open(taps):
        reason = refusal(compiled, batch, count)
        if reason is not None:
            return eager, f"step: eager, as torch.compile refuses this network ({reason})"
        cost = time.perf_counter() - began
        after = _seconds(compiled, batch, count)
    before = _seconds(eager, batch, count)
    figures = f"{1e3 * after:.0f} ms a batch compiled, {1e3 * before:.0f} ms eager; the trial took {cost:.0f} s"
    if before < MIN_GAIN * after:
        return eager, f"step: eager, as compiling does not pay here ({figures})"
    return compiled, f"step: compiled ({figures})"


@contextmanager
def _open(taps: Taps | None) -> Iterator[None]:
    """Keeps the taps open, as a compiled program needs them."""
    if taps is None:
        yield
        return
    taps.keep_open(True)
    try:
        yield
    finally:
        taps.keep_open(False)


def _seconds(step: EagerStep, batch: Batch, count: int, rounds: int = _ROUNDS) -> float:
    """Median time of a rehearsal."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        step.rehearse(batch, count)
        if step.device.type == "cuda":
            torch.cuda.synchronize(step.device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)
