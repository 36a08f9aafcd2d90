"""Learning-rate schedules: the rate of each update as a multiple of the base rate.

A schedule is a pure function of the step and of the number of steps (only `Plateau` remembers), so a
resumed run continues it, and a run that is resumed with more epochs stretches it, without any replay.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from cnnlab.protocols import Schedule
from cnnlab.schema import Beside, Duration, DurationText, NonNegative, NonNegativeInt, Positive, Probability, Range

Decay = Annotated[float, Range(above=0, high=1)]
Start = Annotated[Probability, Beside("warmup")]


class Warmed(Schedule):
    """Linear warm-up, followed by the curve that a subclass states.

    Args:
        warmup: length of the warm-up, a `Duration` text such as `"5 %"`, `"2 epochs"` or `"500 steps"`. One that is
            longer than the run is followed as far as the run goes, and `notices` says so.
        warmup_start: factor at step 0; the factor reaches the curve's first value at the end of the warm-up.

    Raises:
        ValueError: no duration, or more than 100 % of the run.
    """

    def __init__(self, *, warmup: DurationText | None = None, warmup_start: Start = 0.01):
        self.warmup = None if warmup is None else _inside("warmup", Duration.parse(warmup))
        self.warmup_start = warmup_start
        self._steps_per_epoch: int | None = None
        self._batch_size: int | None = None

    def resolve(self, steps_per_epoch: int, total_steps: int, batch_size: int) -> None:
        if steps_per_epoch < 1 or total_steps < 1 or batch_size < 1:
            raise ValueError(
                "expected at least one step, one step per epoch and one sample a batch, received "
                f"{total_steps}, {steps_per_epoch}, {batch_size}"
            )
        self._steps_per_epoch = steps_per_epoch
        self._batch_size = batch_size

    def factor(self, step: int, total: int) -> float:
        warmup = self._warmup_steps(total)
        if step < warmup:
            target = self._curve(0, max(total - warmup, 1), step, total)
            return target * (self.warmup_start + (1 - self.warmup_start) * step / warmup)
        # A step at or past the end (an evaluation after the last update) keeps the last value.
        return self._curve(min(step, max(total, warmup)) - warmup, max(total - warmup, 1), step, total)

    def _curve(self, step: int, length: int, absolute: int, total: int) -> float:
        """The factor `step` updates after the warm-up, of `length` that follow it; `absolute` counts from 0, of
        `total`."""
        raise NotImplementedError(f"{type(self).__name__} implements _curve")

    def notices(self, total: int) -> list[str]:
        """What of the typed lengths does not come about in a run of `total` steps; `resolve` comes first."""
        warmup = self._warmup_steps(total)
        if warmup < total or warmup == 0:
            return []
        return [
            f"schedule: this run of {total:,} steps ends within the warm-up of {warmup:,}, at "
            f'{self.factor(total - 1, total):.2g} times optim.lr; type a longer run, or schedule.warmup="5 %"'
        ]

    def _warmup_steps(self, total: int) -> int:
        return 0 if self.warmup is None else self._steps(self.warmup, total)

    def _steps(self, duration: Duration, total: int) -> int:
        if duration.unit in ("epoch", "example") and self._steps_per_epoch is None:
            raise RuntimeError(f"a schedule in {duration.unit}s needs resolve() before factor()")
        return duration.steps(
            steps_per_epoch=self._steps_per_epoch or 1, total_steps=total, batch_size=self._batch_size or 1
        )


class Constant(Warmed):
    """The base rate throughout."""

    def _curve(self, step: int, length: int, absolute: int, total: int) -> float:
        return 1.0


class Step(Warmed):
    """Multiplies the rate by `gamma` at each milestone (He et al. 2016, section 3.4 and 4.2).

    Args:
        milestones: points of the run, counted from its start (the warm-up included): `Duration` texts, or
            numbers in [0, 1], fractions of the run.
        gamma: factor at each milestone.
    """

    def __init__(
        self,
        milestones: tuple[str | float, ...] = ("50 %", "75 %"),
        gamma: Decay = 0.1,
        *,
        warmup: DurationText | None = None,
        warmup_start: Start = 0.01,
    ):
        super().__init__(warmup=warmup, warmup_start=warmup_start)
        self.milestones = tuple(_milestone(milestone) for milestone in milestones)
        self.gamma = gamma

    def _curve(self, step: int, length: int, absolute: int, total: int) -> float:
        return self.gamma ** sum(absolute >= self._steps(milestone, total) for milestone in self.milestones)

    def notices(self, total: int) -> list[str]:
        at = [self._steps(milestone, total) for milestone in self.milestones]
        late = [f"{step:,}" for step in at if step >= total]
        beyond = (
            f"schedule: {len(late)} of {len(at)} milestones (step {', '.join(late)}) come after this run of {total:,}"
        )
        return [*super().notices(total), *([f"{beyond} steps, so that the rate does not fall there"] if late else [])]


def _inside(name: str, duration: Duration) -> Duration:
    """Raises `ValueError` for more than the whole run."""
    if duration.unit == "%" and duration.amount > 100:
        raise ValueError(
            f"expected {name} of at most 100 % of the run, received {duration.amount:g} %; "
            'a length that does not depend on the run is written "500 steps" or "2 epochs"'
        )
    return duration


def _milestone(value: str | float) -> Duration:
    if isinstance(value, str):
        return _inside("a milestone", Duration.parse(value))
    if not 0 <= value <= 1:
        raise ValueError(
            f"expected a milestone in [0, 1] (a fraction of the run), received {value!r}; "
            f'a number of steps is written "{value:g} steps"'
        )
    return Duration(100 * value, "%")


class Exponential(Warmed):
    """Multiplies the rate by `gamma` once every `every`: γ^(t/every).

    Args:
        gamma: factor for each interval.
        every: length of an interval, a `Duration` text.
        staircase: whether the rate falls at the ends of the intervals (as Inception's did) or at each step.
    """

    def __init__(
        self,
        gamma: Decay = 0.94,
        every: DurationText = "2 epochs",
        staircase: bool = True,
        *,
        warmup: DurationText | None = None,
        warmup_start: Start = 0.01,
    ):
        super().__init__(warmup=warmup, warmup_start=warmup_start)
        self.gamma = gamma
        self.every = _inside("every", Duration.parse(every))
        if self.every.amount == 0:
            raise ValueError(
                f'expected every to be longer than nothing, received {every!r}; type schedule.every="1 step"'
            )
        self.staircase = staircase

    def _curve(self, step: int, length: int, absolute: int, total: int) -> float:
        intervals = step / max(1, self._steps(self.every, total))
        return self.gamma ** (math.floor(intervals) if self.staircase else intervals)

    def notices(self, total: int) -> list[str]:
        every, left = self._steps(self.every, total), total - self._warmup_steps(total)
        found = super().notices(total)
        if self.staircase and left <= every and not found:
            found.append(
                f"schedule: an interval of {every:,} steps is longer than this run, so that the rate does not fall"
            )
        if every < 1:
            found.append("schedule: `every` is less than a step here; the rate falls once a step")
        return found


class Cosine(Warmed):
    """final + (1 - final)(1 + cos(πt/T))/2 (Loshchilov & Hutter 2017, "SGDR", equation 5, one period).

    Args:
        final: factor at the end of the run.
    """

    def __init__(
        self,
        final: Probability = 0.0,
        *,
        warmup: DurationText | None = "5 %",
        warmup_start: Start = 0.01,
    ):
        super().__init__(warmup=warmup, warmup_start=warmup_start)
        self.final = final

    def _curve(self, step: int, length: int, absolute: int, total: int) -> float:
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * step / length)) / 2


class Polynomial(Warmed):
    """final + (1 - final)(1 - t/T)^power (Chen et al. 2018, "DeepLab", section 4.1).

    Args:
        power: 1 is a straight line.
        final: factor at the end of the run.
    """

    def __init__(
        self,
        power: Positive = 0.9,
        final: Probability = 0.0,
        *,
        warmup: DurationText | None = None,
        warmup_start: Start = 0.01,
    ):
        super().__init__(warmup=warmup, warmup_start=warmup_start)
        self.power = power
        self.final = final

    def _curve(self, step: int, length: int, absolute: int, total: int) -> float:
        return self.final + (1 - self.final) * (1 - step / length) ** self.power


class OneCycle(Warmed):
    """Up to the base rate, then down far below where it began (Smith 2018, "A disciplined approach",
    section 4).

    It is its own warm-up. The base rate is the largest one; momentum is left alone.

    Args:
        peak_at: where in the run the factor is 1.
        start: factor at step 0.
        final: factor at the last step.
        anneal: shape of both slopes.
    """

    def __init__(
        self,
        peak_at: Annotated[float, Range(above=0, below=1)] = 0.3,
        start: Probability = 0.04,
        final: Probability = 4e-6,
        anneal: Literal["cosine", "linear"] = "cosine",
    ):
        super().__init__()
        self.peak_at = peak_at
        self.start = start
        self.final = final
        self.anneal = anneal

    def _curve(self, step: int, length: int, absolute: int, total: int) -> float:
        last = total - 1
        # In a run of a few steps the peak is not before the first one.
        peak = max(self.peak_at * total - 1, 0.0)
        if step <= peak:
            return self._between(self.start, 1.0, step / peak if peak else 1.0)
        return self._between(1.0, self.final, min(1.0, (step - peak) / (last - peak)))

    def _between(self, begin: float, end: float, share: float) -> float:
        if self.anneal == "linear":
            return begin + (end - begin) * share
        return end + (begin - end) * (1 + math.cos(math.pi * share)) / 2


class Plateau(Warmed):
    """Multiplies the rate by `decay` when the monitored metric stops getting better.

    Args:
        decay: factor at each plateau.
        patience: evaluations without a better value that are waited out.
        threshold: share by which a value must beat the best one to count as better.
        cooldown: evaluations after a fall that do not count against `patience`.
        min_factor: the factor never falls below it.
    """

    def __init__(
        self,
        decay: Annotated[float, Range(above=0, below=1)] = 0.1,
        patience: NonNegativeInt = 5,
        threshold: NonNegative = 1e-4,
        cooldown: NonNegativeInt = 0,
        min_factor: Probability = 1e-4,
        *,
        warmup: DurationText | None = None,
        warmup_start: Start = 0.01,
    ):
        super().__init__(warmup=warmup, warmup_start=warmup_start)
        self.decay = decay
        self.patience = patience
        self.threshold = threshold
        self.cooldown = cooldown
        self.min_factor = min_factor
        self._factor = 1.0
        self._best: float | None = None
        self._bad = 0
        self._cooling = 0

    def observe(self, value: float, better: Literal["max", "min"]) -> None:
        """Takes the monitored metric of one evaluation; a NaN counts as no better."""
        if self._is_better(value, better):
            self._best, self._bad = value, 0
        else:
            self._bad += 1
        if self._cooling > 0:
            self._cooling -= 1
            self._bad = 0
        if self._bad > self.patience:
            self._factor = max(self._factor * self.decay, self.min_factor)
            self._cooling, self._bad = self.cooldown, 0

    def _is_better(self, value: float, better: Literal["max", "min"]) -> bool:
        if self._best is None:
            return not math.isnan(value)
        margin = self.threshold * abs(self._best)
        return value > self._best + margin if better == "max" else value < self._best - margin

    def _curve(self, step: int, length: int, absolute: int, total: int) -> float:
        return self._factor

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self._factor, "best": self._best, "bad": self._bad, "cooling": self._cooling}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises `ValueError` for what no `Plateau` has given."""
        best, counts = state["best"], (state["bad"], state["cooling"])
        if best is not None and (type(best) not in (float, int) or math.isnan(best)):
            raise ValueError(f"expected a number as the best value, received {best!r}")
        if not 0 <= state["factor"] <= 1 or any(type(count) is not int or count < 0 for count in counts):
            raise ValueError(f"expected a factor of 0 to 1 and counts, received {state['factor']!r} and {counts}")
        self._factor, self._best = state["factor"], state["best"]
        self._bad, self._cooling = state["bad"], state["cooling"]
