"""Tries steps before a run begins: whether one works here, and whether compiling pays."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from cnnlab.errors import CnnlabError
from cnnlab.observe.taps import Taps
from cnnlab.protocols import Batch
from cnnlab.train.steps.eager import EagerStep

TRIAL_SHARE = 1 / 60
"""Part of a run that a trial of `torch.compile` may take, since it may be in vain: on two cores of an AVX512-BF16 CPU,
compiled against eager, 0.74 to 1.2 times the rate."""
COMPILE_SECONDS, COMPILE_SECONDS_A_LAYER = 10.0, 0.3
"""What compiling took there: 14 s for a ResNet-8, 23 s for a ResNet-20, 88 s for an Inception of 260 modules."""
MIN_STEPS = 1000
"""Steps below which a run is not even timed."""
MIN_GAIN = 1.03
"""By which compiled must be faster in three of four turns."""
_ROUNDS = 8


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
    share: float = TRIAL_SHARE,
) -> tuple[EagerStep, str | None]:
    """The faster of the two steps, and a line that says why, where compiling was considered.

    Args:
        first_batch: gives this process's part of a full batch, and the size of the whole.
        steps: that the run has to do.
        taps: of the network; closed between samples in the eager step, and left for the step that is chosen.
        share: see `TRIAL_SHARE`.
    """
    if steps < MIN_STEPS:
        return eager, None
    batch, count = first_batch()
    eager.rehearse(batch, count)
    run_seconds = steps * min(_seconds(eager, batch, count) for _ in range(2))
    if compile_seconds(eager.model) > share * run_seconds:
        return eager, None
    began = time.perf_counter()
    compiled = make_compiled()
    with _open(taps):
        reason = refusal(compiled, batch, count)
    if reason is not None:
        return eager, f"step: eager, as torch.compile refuses this network ({reason})"
    before, after = [], []
    for _ in range(_ROUNDS):  # in turn, so that the machine's other work slows both
        before.append(_seconds(eager, batch, count))
        with _open(taps):
            after.append(_seconds(compiled, batch, count))
    gains = [one / other for one, other in zip(before, after, strict=True)]
    figures = (
        f"{1e3 * statistics.median(after):.0f} ms a batch compiled, {1e3 * statistics.median(before):.0f} ms eager; "
        f"the trial took {time.perf_counter() - began:.0f} s"
    )
    if statistics.quantiles(gains, n=4)[0] < MIN_GAIN:
        return eager, f"step: eager, as compiling does not pay here ({figures})"
    return compiled, f"step: compiled ({figures})"


def compile_seconds(model: nn.Module) -> float:
    """What compiling it takes, roughly."""
    return COMPILE_SECONDS + COMPILE_SECONDS_A_LAYER * sum(not any(module.children()) for module in model.modules())


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


def _seconds(step: EagerStep, batch: Batch, count: int) -> float:
    """Time of a rehearsal."""
    began = time.perf_counter()
    step.rehearse(batch, count)
    return time.perf_counter() - began
