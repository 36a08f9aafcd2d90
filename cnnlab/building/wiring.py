"""What must know of each other in a run: the observer and what it taps, the State that a checkpoint holds, the
listeners that write."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cnnlab.augment import Pipeline
from cnnlab.building.opened import recorded_recipe
from cnnlab.composing.experiment import Experiment
from cnnlab.data.pixels import Recipe
from cnnlab.machine.device import Placement
from cnnlab.machine.ranks import Ranks
from cnnlab.machine.resolved import Resolved
from cnnlab.observe.observer import Observer
from cnnlab.observe.taps import Taps
from cnnlab.protocols import Listener
from cnnlab.schema import StepKind
from cnnlab.sinks.usual import Unfailing
from cnnlab.train.origin import Origin, described
from cnnlab.train.recorder import Evidence, Progress, Recorder
from cnnlab.train.run import Run


def make_observer(
    experiment: Experiment,
    model: nn.Module,
    placement: Placement,
    ranks: Ranks,
    total_steps: int,
    only: frozenset[str] | None = None,
) -> Observer:
    """The probes, and the taps that they need.

    Args:
        only: names of the modules that run in training, where not all of them do.
    """
    stats = experiment.stats
    nodes = experiment.nodes("probe") if stats.enabled else {}
    probes = [node.make() for node in nodes.values()]
    needs = frozenset[str]().union(*(probe.needs for probe in probes))
    taps = None
    if needs & {"activations", "activation_gradients"}:
        taps = Taps(
            model,
            stats.samples,
            placement.device,
            gradients="activation_gradients" in needs,
            always=placement.step is not StepKind.eager,
            ranks=ranks,
            only=only,
        )
    return Observer(
        model,
        probes,
        taps,
        every=stats.every,
        total_steps=total_steps,
        max_records=stats.max_records,
        max_overhead=stats.max_overhead,
        device=placement.device,
    )


def wire(run: Run, pipeline: Pipeline, resolved: Resolved, data: dict[str, Any]) -> None:
    """Gives a run its State, by which it resumes, and those who write its records and evidence.

    Args:
        resolved: what a resumed run takes up unasked.
        data: see `data_of`.
    """
    own = run.folder if run.is_main else None
    recorder = Recorder(own)
    evidence = Evidence(own, len(run.loaders["train"].split), run.device, run.ranks, run.clock)
    run.origin = Origin(run.config, data, resolved, run.files, run.dir, run.experiment.data_place)
    parts: dict[str, Any] = {
        "origin": run.origin,
        "model": run.model,
        "optimizer": run.optimizer,
        "schedule": run.schedule,
        "scaler": run.step.scaler,
        **run.interventions.stateful(),
        "clock": run.clock,
        "totals": run.totals,
        "selection": run.selection,
        "taps": run.observer.taps,
        "observer": run.observer,
        "normalize": pipeline,
        "records": recorder,
        "evidence": evidence,
    }
    for name, part in parts.items():
        if part is not None and hasattr(part, "state_dict"):
            run.state.register(name, part)
    run.listeners = [recorder, evidence, Progress(), *(named_listeners(run.experiment) if run.is_main else ())]

    def receive(record: dict[str, Any]) -> None:
        run.tell("on_stats", {**run.place(record["step"]), **record})

    run.observer.receive = receive if run.is_main else None


def named_listeners(experiment: Experiment) -> list[Listener]:
    """Those that the experiment names; one that fails ends no run."""
    return [Unfailing(node.make(), f"`{node.where}`") for node in experiment.nodes("listener").values()]


def data_of(run: Run, class_counts: Tensor | None, recipe: Recipe | None) -> dict[str, Any]:
    """What a checkpoint keeps of the data, for whoever opens the network again.

    Args:
        class_counts: (classes,), as the loss weighs them.
    """
    spec, splits = run.spec, {name: loader.split for name, loader in run.loaders.items()}
    return described(
        {name: split.fingerprint for name, split in splits.items()},
        {name: len(split) for name, split in splits.items()},
        channels=spec.channels,
        size=list(spec.size),
        classes=list(spec.classes),
        mask_classes=list(spec.mask_classes),
        targets=sorted(spec.targets),
        class_counts=None if class_counts is None else class_counts.tolist(),
        recipe=recorded_recipe(recipe),
    )
