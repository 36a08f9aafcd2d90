"""The range test: real updates at rates that grow from one to the next, and what their losses suggest.

Smith 2017, "Cyclical learning rates for training neural networks", section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cnnlab.composing.rates import HIGHEST, LOWEST, RULE, RULES, STEPS, require_rule
from cnnlab.errors import DivergedError, UsageError
from cnnlab.inspect.untouched import kept, untouched
from cnnlab.observe.observer import Observer
from cnnlab.protocols import Listener, Schedule, StepResult
from cnnlab.runs.checkpoint import State
from cnnlab.train.checkpointer import Checkpointer
from cnnlab.train.guard import UNGUARDED
from cnnlab.train.loop import updates
from cnnlab.train.run import Run
from cnnlab.train.state import Clock
from cnnlab.train.steps.captured import CapturedStep
from cnnlab.train.steps.compiled import CompiledStep
from cnnlab.train.steps.eager import EagerStep

TIMES = 4.0
"""The test ends where the loss is as many times its least, and above its start."""
WIDTH = 0.03
"""Standard deviation of the smoothing kernel, as a part of the steps."""
SMALLEST_FALL = 0.02
"""Part of its start by which the loss must fall, for a suggestion: what falls less has learned nothing."""
ERRORS = 3.0
"""Standard errors by which it must, too."""
VALLEY = 0.1
"""Part of its whole fall by which the loss has begun to fall."""
MIN_STEPS = 10


@dataclass(frozen=True)
class RangeTest:
    """The curve of a range test.

    `losses[i]` is what update i minimized (the mean loss of its batch and the penalty), before it was made at
    `rates[i]`. A loss that is not finite ends the curve and is not in it.
    """

    rates: list[float]
    losses: list[float]
    planned: int
    """Updates that it would have been, had the loss not risen before."""
    non_finite: bool = False
    smoothed: list[float] = field(init=False)
    """The losses by local linear regression on log(rate) (Cleveland 1979) with a Gaussian kernel: unlike a moving
    average, it does not lag behind."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "smoothed", smoothed(self.losses, _width(self.planned)))

    @property
    def start(self) -> float:
        """The loss at rates that change nothing: the mean of the first tenth."""
        first = self.losses[: max(1, self.planned // 10)]
        return sum(first) / len(first) if first else math.nan

    @property
    def lowest(self) -> int | None:
        """Where the smoothed loss is least; `None` where it has not fallen by more than the batches differ."""
        if not self.smoothed:
            return None
        at = min(range(len(self.smoothed)), key=self.smoothed.__getitem__)
        apart = [(self.losses[i] - self.smoothed[i]) ** 2 for i in range(at + 1)]
        noise = math.sqrt(sum(apart) / len(apart))
        # Variances of a mean of n, and of a Gaussian kernel's weighted mean, 1 / (2·√π·width).
        error = noise * math.sqrt(1 / max(1, self.planned // 10) + 1 / (2 * math.sqrt(math.pi) * _width(self.planned)))
        return at if self.smoothed[at] < self.start - max(SMALLEST_FALL * abs(self.start), ERRORS * error) else None

    @property
    def limit(self) -> float | None:
        """The first rate past the least loss from which the loss is above its start; `None` where there is none."""
        begin = self.lowest or 0
        above = next((i for i in range(begin, len(self.losses)) if self.smoothed[i] > self.start), None)
        if above is not None:
            return self.rates[above]
        return self.rates[-1] if self.non_finite and self.rates else None

    def suggestions(self) -> dict[str, float | None]:
        """The rate of each of the `RULES`; `None` where the curve has not what the rule asks for."""
        low = self.lowest
        if low is None:
            return dict.fromkeys(RULES)
        logs = [math.log(rate) for rate in self.rates]
        top = self.start - VALLEY * (self.start - self.smoothed[low])
        first = max((i for i in range(low) if self.smoothed[i] >= top), default=0)
        slopes = {
            i: (self.smoothed[i + 1] - self.smoothed[i - 1]) / (logs[i + 1] - logs[i - 1])
            for i in range(max(first, 1), low)  # before the fall, batches that happen to be easier are no slope
        }
        limit = self.limit
        return {
            "valley": math.exp((logs[first] + logs[low]) / 2),
            "steep": self.rates[min(slopes, key=lambda i: slopes[i])] if slopes else self.rates[low],
            "minimum": self.rates[low] / 10,
            "limit": None if limit is None else limit / 3,
        }

    def described(self) -> dict[str, Any]:
        """Plain values: `suggestions` by rule, `limit`, `non_finite`, and the curve as `lr`, `loss`, `smoothed`."""
        return {
            "suggestions": self.suggestions(),
            "limit": self.limit,
            "non_finite": self.non_finite,
            "lr": self.rates,
            "loss": self.losses,
            "smoothed": self.smoothed,
        }

    def suggestion(self, rule: str = RULE) -> float:
        """The rate that a rule suggests, to three digits. Raises `UsageError` where the curve gives none."""
        require_rule(rule)
        found = self.suggestions()[rule]
        if found is None:
            reached = f" up to {self.rates[-1]:.2g}" if self.rates else ""
            reason = "the loss does not fall at any rate" if self.lowest is None else "the loss does not rise again"
            raise UsageError(
                f"the range test suggests no rate by the rule `{rule}`: {reason}{reached} in {len(self.rates)} steps; "
                "look at its curve (cnnlab lr-find), or type optim.lr=NUMBER"
            )
        return float(f"{found:.3g}")


def _width(steps: int) -> float:
    """Of the kernel, in updates."""
    return max(1.0, WIDTH * steps)


def smoothed(values: Sequence[float], width: float) -> list[float]:
    """Local linear regression of evenly spaced values, at each of their places, with a Gaussian kernel whose standard
    deviation is `width` places."""
    if not values:
        return []
    y = torch.tensor(values, dtype=torch.float64)
    place = torch.arange(len(values), dtype=torch.float64)
    apart = place[None] - place[:, None]
    weight = torch.exp(-0.5 * (apart / width) ** 2)
    s0, s1, s2 = (torch.sum(weight * apart**power, 1) for power in range(3))
    t0, t1 = weight @ y, torch.sum(weight * apart * y[None], 1)
    whole = s0 * s2 - s1 * s1
    fitted = torch.where(whole > 1e-12 * s0 * s2, (s2 * t0 - s1 * t1) / whole.clamp_min(1e-300), t0 / s0)
    return fitted.tolist()


def range_test(
    run: Run,
    *,
    lowest: float = LOWEST,
    highest: float = HIGHEST,
    steps: int = STEPS,
    progress: Callable[[int, float, float], None] | None = None,
) -> RangeTest:
    """Makes up to `steps` of the run's own updates from where it stands, the rate of the base group growing by one
    factor from each to the next, and takes them all back: weights, buffers, optimizer, averages, gradients, modes and
    generators are afterwards what they were, bit for bit, also after an interruption. No listener is told.

    The groups keep their proportions (`lr_scale`); the run's schedule has no say. A compiled or captured run is
    tested eagerly.

    Args:
        lowest, highest: rates of the first and the last update.
        progress: called after each update with its number, rate and loss.

    Raises `UsageError` for a range that is none.
    """
    if not 0 < lowest < highest < math.inf:
        raise UsageError(f"expected 0 < lowest < highest, received a range test from {lowest:g} to {highest:g}")
    if steps < MIN_STEPS:
        raise UsageError(f"expected a range test of at least {MIN_STEPS} steps, received {steps}")
    curve = _Curve(lowest, highest, steps, run, progress)
    with unchanged(run), _unguarded(run.step):
        trial = _trial(run, curve)
        try:
            while not (curve.ended or trial.finished()):
                for _ in updates(trial):
                    if curve.ended:
                        break
                trial.clock.close(trial.steps_per_epoch)
        except DivergedError:
            curve.non_finite = True
    return RangeTest(curve.rates, curve.losses, steps, curve.non_finite)


class _Curve(Listener, Schedule):
    """The schedule of the test and its memory."""

    def __init__(
        self,
        lowest: float,
        highest: float,
        steps: int,
        run: Run,
        progress: Callable[[int, float, float], None] | None,
    ):
        self.lowest, self.growth = lowest, (highest / lowest) ** (1 / (steps - 1))
        self.start, self.steps = run.clock.step, steps
        self.base = float(run.optimizer.param_groups[0]["base_lr"])
        if self.base <= 0:
            raise UsageError("expected optim.lr > 0, from which the groups' proportions follow, received 0")
        self.progress = progress
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.ended = self.non_finite = False
        self._mean = self._least = math.nan

    def rate(self, step: int) -> float:
        return self.lowest * self.growth ** (step - self.start)

    def factor(self, step: int, total: int) -> float:
        return self.rate(step) / self.base

    def on_step(self, run: Any, result: StepResult) -> None:
        terms = [result.sums[name] for name in ("data_loss", "penalty") if name in result.sums]
        total, count = torch.stack(terms).sum(), result.sums["count"].clone()
        run.ranks.sum_([total, count])
        loss, rate = float(total / count), self.rate(run.clock.step - 1)
        if not math.isfinite(loss):
            self.ended = self.non_finite = True
            return
        self.rates.append(rate)
        self.losses.append(loss)
        self._mean = loss if math.isnan(self._mean) else 0.7 * self._mean + 0.3 * loss
        self._least = min(self._least, self._mean) if len(self.losses) > 1 else self._mean
        first = self.losses[: max(1, self.steps // 10)]
        self.ended = self._mean > max(TIMES * self._least, sum(first) / len(first))
        if self.progress is not None:
            self.progress(len(self.losses), rate, loss)


def _trial(run: Run, curve: _Curve) -> Run:
    """The same parts as a run that tells nobody, saves nothing, and ends with the curve."""
    clock = Clock()
    clock.load_state_dict(run.clock.state_dict())
    if clock.batch >= run.steps_per_epoch:
        clock.close(run.steps_per_epoch)
    silent = Observer(run.model, [], None, every=None, total_steps=curve.steps, max_records=1)
    return replace(
        run,
        folder=None,
        step=_eager(run.step),
        schedule=curve,
        observer=silent,
        listeners=[curve],
        clock=clock,
        state=State(),
        total_steps=curve.start + curve.steps,
        patience=None,
        checkpointer=Checkpointer(enabled=False, minutes=math.inf),
    )


def _eager(step: EagerStep) -> EagerStep:
    """A step that leaves no program behind: a graph that is captured later finds all where it was."""
    if not isinstance(step, CapturedStep | CompiledStep):
        return step
    return EagerStep(
        step.evaluator,
        step.optimizer,
        step.parameters,
        seed=step.seed,
        ranks=step.ranks,
        penalties=step.penalties,
        interventions=step.interventions,
        scaler=step.scaler,
        accumulate=step.accumulate,
        clip_norm=step.clip_norm,
    )


@contextmanager
def _unguarded(step: EagerStep) -> Iterator[None]:
    """Every update of the test happens, and is taken back."""
    guard, step.guard = step.guard, UNGUARDED
    try:
        yield
    finally:
        step.guard = guard


@contextmanager
def unchanged(run: Run) -> Iterator[None]:
    """Puts back what updates change, after the block: in place, so that nothing has to be found anew."""
    model, optimizer = run.model, run.optimizer
    gradients = [p.grad for p in model.parameters() if p.grad is not None]  # which a captured step writes in place
    optimized = _Kept([optimizer.state, optimizer.param_groups])
    stateful: dict[str, Any] = {**run.interventions.stateful(), "scaler": run.step.scaler, "taps": run.observer.taps}
    parts = [(part, deepcopy(part.state_dict())) for part in stateful.values() if hasattr(part, "state_dict")]
    with untouched(model), kept([*model.parameters(), *gradients]):
        try:
            yield
        finally:
            with torch.no_grad():
                optimized.restore()
            for part, state in parts:
                part.load_state_dict(state)


class _Kept:
    """Nested dicts and lists as they are now, the tensors in them with their values."""

    def __init__(self, root: Any):
        self._values: dict[int, Tensor] = {}
        self._now = self._read(root)

    def _read(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self._values:
                self._values[id(value)] = value.detach().clone()
            return value, self._values[id(value)]
        if isinstance(value, dict):
            return value, {key: self._read(item) for key, item in value.items()}
        if isinstance(value, list):
            return value, [self._read(item) for item in value]
        return (value, None) if isinstance(value, tuple) else (deepcopy(value), None)

    def restore(self) -> None:
        self._written(self._now)

    def _written(self, pair: Any) -> Any:
        value, now = pair
        if isinstance(value, Tensor):
            value.detach().copy_(now)
        elif isinstance(now, dict):
            items = {key: self._written(item) for key, item in now.items()}
            value.clear()
            value.update(items)
        elif isinstance(now, list):
            value[:] = [self._written(item) for item in now]
        return value
