"""`cnnlab bench`: measures one composed experiment, and says where its time goes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cnnlab.bench import process
from cnnlab.bench.arms import (
    TrainerArm,
    bare_loop,
    bare_loop_refusal,
    every_step_sampled,
    ordinary,
    without_data,
)
from cnnlab.bench.roofline import LayerTime, MachineRates, layer_times, measure_rates, synchronizer, update_bytes
from cnnlab.bench.rounds import Arm, Spread, Turn, interleave, rates, ratios
from cnnlab.composing.experiment import Experiment
from cnnlab.inspect.summary import calls
from cnnlab.machine.device import place
from cnnlab.observe.observer import Observer
from cnnlab.schema import StepKind
from cnnlab.train.run import Run

SCHEMA_VERSION = 1
FULL, SAMPLED, NO_STATS, NO_AUGMENT, NO_DATA, BARE = (
    "full",
    "every step sampled",
    "no statistics",
    "no augmentation",
    "no data",
    "bare loop",
)
"""`full` is what `cnnlab train` does. From `no statistics` on, each arm leaves out one thing more than the last one."""
TOP_LAYERS = 5

Progress = Callable[[str, int, int], None]


def bench(experiment: Experiment, *, rounds: int, seconds: float, progress: Progress) -> dict[str, Any]:
    """The figures of a checked experiment, as one JSON document.

    Args:
        rounds: turns of each arm.
        seconds: of a turn, about.
        progress: told what comes next, the turns done, and all turns.

    Raises what `build` raises, and `DivergedError` if the loss becomes non-finite.
    """
    with process.undisturbed(), tempfile.TemporaryDirectory(prefix="cnnlab-bench-") as folder, ExitStack() as stack:
        return _Bench(experiment, Path(folder), stack, progress).measured(rounds, seconds)


class _Bench:
    def __init__(self, experiment: Experiment, folder: Path, stack: ExitStack, progress: Progress):
        self.experiment = experiment
        self.folder = folder
        self.stack = stack
        self.progress = progress
        self.notices: list[str] = []
        self.placement = place(experiment.trainer, closure=bare_loop_refusal(experiment) is not None)
        self.device = self.placement.device
        self.synchronize = synchronizer(self.device)

    def measured(self, rounds: int, seconds: float) -> dict[str, Any]:
        process.reset_peak(self.device)
        run = self._build(FULL)
        full = self._arm(TrainerArm(FULL, run))
        start = self._start(full)
        full.run(2)
        self.synchronize()
        peak, of = process.peak_memory(self.device)
        arms = [full, *self._others(run)]
        turns = interleave(arms, rounds=rounds, seconds=seconds, synchronize=self.synchronize, progress=self.progress)
        cadence = steps_between_samples(run.observer)  # now that the run has tuned it
        step_seconds = Spread.of(turn.seconds_per_image for turn in turns[FULL]).median * run.batch_size
        self.progress("roofline", 1, 1)
        return {
            "schema_version": SCHEMA_VERSION,
            "overrides": list(self.experiment.overrides),
            "machine": process.machine(),
            "run": {"facts": run.facts, "batch_size": run.batch_size, "steps": run.total_steps},
            "rounds": rounds,
            "seconds_a_turn": seconds,
            "notices": [*run.notices, *self.notices],
            "arms": {name: _described(own) for name, own in turns.items()},
            "ratio_to_bare_loop": asdict(ratios(turns[FULL], turns[BARE])) if BARE in turns else None,
            "costs": costs(turns, cadence, run.total_steps),
            "start": {**start, "images_per_second": _from_start(start, run, turns[FULL])},
            "memory": {"peak_bytes": peak, "of": of},
            "roofline": self._roofline(run, step_seconds),
        }

    def _build(self, name: str, values: Mapping[str, Any] | None = None) -> Run:
        self.progress(f"building: {name}", 0, 1)
        return ordinary(self.experiment, self.folder / name.replace(" ", "-"), values or {})

    def _arm(self, arm: TrainerArm) -> TrainerArm:
        self.stack.callback(arm.close)
        return arm

    def _start(self, full: Arm) -> dict[str, Any]:
        """Seconds from the start of the process until the first update is done."""
        full.run(1)
        self.synchronize()
        age = process.age()
        return {"first_step_seconds": None if age is None else round(age, 3)}

    def _others(self, run: Run) -> list[Arm]:
        """The arms that there are for this config, beside the full one."""
        arms: list[Arm] = []
        # `auto` may choose by measuring, and all arms must take the step that the full run takes.
        without: dict[str, Any] = {"trainer.step": run.step.name} if run.step.name in StepKind.__members__ else {}
        if run.observer.probes:
            sampled = self._build(SAMPLED, {**without, **every_step_sampled(self.experiment)})
            arms.append(self._arm(TrainerArm(SAMPLED, sampled)))
            without["stats.enabled"] = False
            run = self._build(NO_STATS, without)
            arms.append(self._arm(TrainerArm(NO_STATS, run)))
        plain = run
        if self.experiment.nodes("augment"):
            without["augment"] = {}
            plain = self._build(NO_AUGMENT, without)
            arms.append(self._arm(TrainerArm(NO_AUGMENT, plain)))
        arms.append(self._arm(TrainerArm(NO_DATA, without_data(plain))))
        refusal = bare_loop_refusal(self.experiment)
        if refusal is None:
            arms.append(Arm(BARE, bare_loop(self.experiment, run, self.placement.dtype)))
        else:
            self.notices.append(f"there is no bare loop to compare with: {refusal}")
        return arms

    def _roofline(self, run: Run, step_seconds: float) -> dict[str, Any]:
        machine = measure_rates(self.device, self.placement.dtype)
        spec = next(iter(run.loaders["train"].images.batches(0)))[0]["image"].shape[1:]
        times = layer_times(
            calls(run.model, spec),
            machine,
            batch=run.batch_size,
            element_bytes=self.placement.dtype.itemsize,
            update=update_bytes(run.optimizer),
        )
        return roofline(times, machine, step_seconds)


def steps_between_samples(observer: Observer) -> int | None:
    """The shortest cadence of the run's probes, as it stands; `None` without probes."""
    cadences = [every for _, every in observer.probes]
    return min(cadences) * observer.cadence if cadences else None


def _described(turns: Sequence[Turn]) -> dict[str, Any]:
    return {
        "images_per_second": asdict(rates(turns)),
        "step_seconds": asdict(Spread.of(turn.seconds / turn.steps for turn in turns)),
        "turns": [asdict(turn) for turn in turns],
    }


def _from_start(start: dict[str, Any], run: Run, turns: Sequence[Turn]) -> float | None:
    """Images a second of the whole training of the composed run, its start included, evaluation left out."""
    first = start["first_step_seconds"]
    if first is None:
        return None
    images = run.total_steps * run.batch_size
    return round(images / (first + images / rates(turns).median), 1)


# ---- what the turns say ----


@dataclass(frozen=True)
class StatisticsCost:
    """What one round says of the statistics.

    `sampled_step` is what sampling adds to a step, in steps without statistics; `idle` what the taps and the
    observer add to a step that is not sampled, and `overhead` what both add at the cadence, as shares of one.
    """

    sampled_step: float
    idle: float
    overhead: float


def statistics_cost(full: Turn, sampled: Turn, without: Turn, cadence: int) -> StatisticsCost:
    """From one round's turns with statistics at the run's cadence, at every step, and without.

    A turn is short, so it holds a sampled step more or less than its share. With n of its k steps sampled it took
    (k - n) idle steps and n sampled ones; the turn that samples every step tells how long the latter are.
    """
    step, sampled_step = without.seconds / without.steps, sampled.seconds / sampled.steps
    unsampled = full.steps - full.sampled
    idle_step = (full.seconds - full.sampled * sampled_step) / unsampled if unsampled else step
    added = sampled_step - idle_step
    return StatisticsCost(added / step, idle_step / step - 1, (idle_step + added / cadence) / step - 1)


def costs(turns: dict[str, list[Turn]], cadence: int | None, total_steps: int) -> dict[str, Any]:
    """What each part of the run costs, from turns of one round each; `None` for what the run does not have.

    Augmentation and data are shares of the full run's time an image. The statistics are as in `StatisticsCost`;
    where probes have cadences of their own, `overhead` counts all of them at the shortest (an upper bound).
    `measured` is what the full arm itself lost, sampled steps as they fell, and `run_seconds` what sampling takes of a
    run of `total_steps`.
    """
    found: dict[str, Any] = {"statistics": None, "augmentation": None, "data": None}
    if NO_STATS in turns and cadence is not None:
        each = [
            statistics_cost(full, sampled, without, cadence)
            for full, sampled, without in zip(turns[FULL], turns[SAMPLED], turns[NO_STATS], strict=True)
        ]
        names = ("sampled_step", "idle", "overhead")
        found["statistics"] = {
            "every": cadence,
            **{name: asdict(Spread.of(getattr(cost, name) for cost in each)) for name in names},
            "measured": _share(turns, FULL, NO_STATS, NO_STATS),
            "run_seconds": _sampling_seconds(each, turns[NO_STATS], total_steps / cadence),
        }
    before = NO_STATS if NO_STATS in turns else FULL
    if NO_AUGMENT in turns:
        found["augmentation"] = _share(turns, before, NO_AUGMENT, FULL)
        before = NO_AUGMENT
    found["data"] = _share(turns, before, NO_DATA, FULL)
    return found


def _sampling_seconds(each: Sequence[StatisticsCost], without: Sequence[Turn], samples: float) -> float:
    step = Spread.of(turn.seconds / turn.steps for turn in without).median
    return Spread.of(cost.sampled_step for cost in each).median * step * samples


def _share(turns: dict[str, list[Turn]], with_it: str, without: str, of: str) -> dict[str, float]:
    """(time with - time without) / time of, an image, round by round."""
    rows = zip(turns[with_it], turns[without], turns[of], strict=True)
    return asdict(Spread.of((a.seconds_per_image - b.seconds_per_image) / c.seconds_per_image for a, b, c in rows))


def roofline(times: Sequence[LayerTime], machine: MachineRates, step_seconds: float) -> dict[str, Any]:
    """The least time of a step, the share of it in the measured one, and the layers that make most of it."""
    least = sum(entry.seconds for entry in times)
    top = sorted(times, key=lambda entry: entry.seconds, reverse=True)[:TOP_LAYERS]
    return {
        "matmul_flops_per_second": machine.flops,
        "copy_bytes_per_second": machine.bytes,
        "flops": sum(entry.flops for entry in times),
        "bytes": sum(entry.bytes for entry in times),
        "least_step_seconds": least,
        "step_seconds": step_seconds,
        "share": least / step_seconds,
        "flops_per_second": sum(entry.flops for entry in times) / step_seconds,
        "top": [{**asdict(entry), "share": entry.seconds / least} for entry in top],
    }


__all__ = ["bench", "costs", "roofline", "statistics_cost"]
