"""`cnnlab summary`: what an experiment would train, before it does: the network layer by layer, the optimizer's
parameter groups, the learning rate over the run. Nothing is trained and no image is read."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from cnnlab.composing.composer import composer
from cnnlab.composing.experiment import Experiment
from cnnlab.composing.idle import idle
from cnnlab.terminal import one_line, say
from cnnlab.verbs.arguments import answer, checked_experiment, override_parser, parse

HELP = """cnnlab summary: shows what an experiment would train.

Usage: cnnlab summary [OVERRIDES] [--json] [--config-dir DIR]

Per layer: output shape, kernel, stride, padding, parameters, multiply-adds (1 multiply-add = 2 FLOP), receptive
field, memory of the activations that training keeps; then the parameter groups and the learning rate.

examples:
  cnnlab summary model=resnet50 data=shapes data.size=224
  cnnlab summary model=vgg data=cifar10
  cnnlab summary optim=adamw groups.layer_decay=0.9
  cnnlab summary schedule=one_cycle
  cnnlab summary --json
"""
MAX_ROWS = 200
"""Layers shown before the middle of a deeper network is left out; --json has them all."""
POINTS = 60
"""Columns of the drawing of a schedule."""
ASSUMED_STEPS = 1000
"""Updates an epoch of data whose samples cannot be counted before it is read."""
_BLOCKS = " ▁▂▃▄▅▆▇█"


def main(arguments: Sequence[str]) -> int:
    args = parse(arguments, override_parser("summary"))
    if args.help and not args.overrides:
        say(HELP.rstrip())
        return 0
    with composer(args.config_dirs, args.config_name, args.trust) as open_composer:
        if args.help or args.show:
            return answer(open_composer, args)
        composed = checked_experiment(open_composer, args)
    from cnnlab.inspect.summary import to_json

    described = _describe(composed)
    if args.json:
        document = {
            "network": to_json(described["network"]),
            "groups": described["groups"],
            "schedule": described["schedule"],
        }
        say(json.dumps(document))
    else:
        _show(described)
    return 0


def _describe(experiment: Experiment) -> dict[str, Any]:
    import torch

    from cnnlab.building.assemble import make_network, make_optimizer, make_task, spec_for_task, task_class
    from cnnlab.inspect import meta
    from cnnlab.inspect.summary import summarize

    data = experiment.node("data").make()
    spec = spec_for_task(experiment, data.spec())
    task = make_task(experiment, spec, torch.ones(len(task_class(experiment).class_names(spec))))
    model = meta.made(lambda: make_network(experiment, spec, task))
    optimizer = make_optimizer(experiment, model)
    groups = [
        {
            "name": group.get("name", "all"),
            "tensors": len(group["params"]),
            "parameters": sum(p.numel() for p in group["params"]),
            "lr": float(group["base_lr"]) * group.get("lr_scale", 1.0),
            "weight_decay": group.get("weight_decay"),
            "decoupled_decay": group.get("decoupled_decay"),
        }
        for group in optimizer.param_groups
    ]
    return {
        "network": summarize(model, (spec.channels, *spec.size), batch=experiment.trainer.batch_size),
        "notes": [*getattr(model, "notes", []), *idle(experiment)],
        "optimizer": type(optimizer).__name__,
        "groups": groups,
        "schedule": _rates(experiment, optimizer.param_groups[0]["base_lr"], _steps_per_epoch(experiment, data, model)),
    }


def _steps_per_epoch(experiment: Experiment, data: Any, model: Any) -> int | None:
    """Updates an epoch, as a run in one process has them; `None` where the samples are not known unread."""
    from cnnlab.building.feeding import too_few

    if not hasattr(data, "train_samples"):
        return None
    trainer, samples = experiment.trainer, data.train_samples()
    batch_size = min(trainer.batch_size, samples)
    whole, rest = divmod(samples, max(1, batch_size))
    return max(1, whole + (rest > 0 and not trainer.drop_last and not too_few(model, rest, trainer.accumulate)))


def _rates(experiment: Experiment, base: float, known: int | None) -> dict[str, Any]:
    """The base group's rate at evenly spaced updates of the run, by epoch.

    Args:
        known: updates an epoch; `None` assumes a length.
    """
    schedule, trainer = experiment.node("schedule").make(), experiment.trainer
    steps = ASSUMED_STEPS if known is None else known
    total = trainer.epochs * steps
    if trainer.max_steps is not None:
        total = min(total, trainer.max_steps)
    schedule.resolve(steps, total, trainer.batch_size)
    at = [round(i * (total - 1) / (POINTS - 1)) for i in range(POINTS)]
    return {
        "epoch": [step / steps for step in at],
        "lr": [base * schedule.factor(step, total) for step in at],
        "steps": total,
        "steps_per_epoch": steps,
        "assumed": known is None,
        "notices": schedule.notices(total),
    }


def _show(described: dict[str, Any]) -> None:
    from rich.table import Table

    from cnnlab.inspect.summary import to_table
    from cnnlab.sinks.drawing import Drawing

    console = Drawing(sys.stdout, elsewhere=140)
    console.print(to_table(described["network"], max_rows=MAX_ROWS))
    for note in described["notes"]:
        console.print(f"  {one_line(note)}")
    table = Table(title=f"{described['optimizer']}: parameter groups", title_justify="left")
    for heading in ("group", "tensors", "parameters", "lr", "weight decay"):
        table.add_column(heading, justify="left" if heading == "group" else "right")
    for group in described["groups"]:
        decay = "" if group["weight_decay"] is None else f"{group['weight_decay']:g}"
        if group["decoupled_decay"] is not None:
            decay = f"{group['decoupled_decay']:g}, decoupled"
        table.add_row(
            console.plain(group["name"]), f"{group['tensors']:,}", f"{group['parameters']:,}", f"{group['lr']:g}", decay
        )
    console.print(table)
    schedule = described["schedule"]
    console.print(_length(schedule))
    for line in draw(schedule["lr"], schedule["steps"] / schedule["steps_per_epoch"]):
        console.print(line)
    for notice in schedule["notices"]:
        console.print(f"  {one_line(notice)}")


def _length(schedule: dict[str, Any]) -> str:
    told = f"Learning rate by epoch: {schedule['steps']:,} updates, {schedule['steps_per_epoch']:,} an epoch"
    return told + ", a number that is assumed: this data is not counted unread" * schedule["assumed"]


def draw(values: Sequence[float], epochs: float, height: int = 8) -> list[str]:
    """A curve in block characters, `height` lines high, with its largest and smallest value at the side.

    Args:
        epochs: the length of the curve.
    """
    low, high = 0.0, max(values) or 1.0
    eighths = [round((value - low) / (high - low) * height * 8) for value in values]
    lines = []
    for row in range(height - 1, -1, -1):
        label = f"{high:>10.3g}" if row == height - 1 else f"{low:>10.3g}" if row == 0 else " " * 10
        cells = "".join(_BLOCKS[max(0, min(8, level - 8 * row))] for level in eighths)
        lines.append(f"{label} │{cells}")
    end = f"{round(epochs, 2):g} epoch{'s' * (epochs != 1)}"
    return [*lines, " " * 11 + "└" + "─" * len(values), f"{'0':>13}{end:>{len(values) - 1}}"]
