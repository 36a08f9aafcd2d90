"""Checks of whether an experiment can learn: a few samples by heart, and at its rate."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from cnnlab.diagnose.check_findings import Finding, Subject, Verdict
from cnnlab.protocols import Batch
from cnnlab.train.objective import Mode
from cnnlab.train.range_test import RangeTest, range_test
from cnnlab.train.run import Run

FIT_STEPS = 120
FIT_RATES = (1e-3, 1e-2, 3e-4)
"""Of Adam (Kingma & Ba 2015), tried in turn until one of them fits the few samples."""
FIT_SHARE = 0.2
"""Of the loss at the start that has to go away."""
RANGE_STEPS, RANGE_LOWEST, RANGE_HIGHEST = 50, 1e-6, 10.0
RATE_FACTOR = 10.0
"""Below the rates that the range test names from where on a rate is told to be small."""


def learns_by_heart(subject: Subject) -> Finding:
    """A few samples can be learned by heart (Karpathy 2019, "A recipe for training neural networks")."""
    run, batch = subject.run, subject.few
    objective = replace(run.objective(batch, mode=Mode.frozen), penalties=type(run.step.penalties)())
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in parameters]
    curves = []
    for rate in FIT_RATES:
        with torch.no_grad():
            for parameter, value in zip(parameters, start):
                parameter.copy_(value)
        curves.append(_fitted(run, replace(objective, mode=Mode.train), parameters, rate))
        if curves[-1][1] <= FIT_SHARE * curves[-1][0]:
            break
    before, after = min(curves, key=lambda curve: curve[1])
    told = f"{len(batch['index'])} samples: loss {before:.3g} to {after:.2g} in {FIT_STEPS} updates of Adam"
    if not after <= FIT_SHARE * before:
        floor = _least(subject, batch)
        if floor is not None and after - floor <= FIT_SHARE * max(before - floor, 1e-6):
            return Finding("learns by heart", Verdict.good, f"{told}, close to the least possible {floor:.2g}")
        return Finding(
            "learns by heart",
            Verdict.watch if after < 0.7 * before else Verdict.bad,
            told,
            "a network that cannot learn a few samples by heart learns nothing: see the loss, the labels, the signal "
            "(`cnnlab probe`), and whether most of it is frozen",
        )
    return Finding("learns by heart", Verdict.good, told)


def _fitted(run: Run, objective: Any, parameters: list[nn.Parameter], rate: float) -> tuple[float, float]:
    """The loss before and the least after, in training mode."""
    optimizer = torch.optim.Adam(parameters, lr=rate)
    first, least = math.nan, math.inf
    for _ in range(FIT_STEPS):
        value, gradient = objective.value_and_gradient()
        loss = float(value)
        first = loss if math.isnan(first) else first
        least = min(least, loss) if math.isfinite(loss) else least
        if least <= 0.1 * FIT_SHARE * first:
            break
        for parameter, slope in zip(parameters, gradient):
            parameter.grad = slope.to(parameter.dtype)
        optimizer.step()
    return first, least


def _least(subject: Subject, batch: Batch) -> float | None:
    """The least loss that there is, where labels are smoothed or mixed: that of outputs which are the targets."""
    run = subject.run
    label = batch.get("label")
    if label is None or run.task.needs != ("label",):
        return None
    shares = label if label.is_floating_point() else nn.functional.one_hot(label, run.spec.num_classes).float()
    least = math.inf
    for smoothing in (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3):
        target = shares * (1 - smoothing) + smoothing / run.spec.num_classes
        with torch.no_grad():
            loss = run.task.loss({"logits": target.clamp_min(1e-9).log()}, batch)["loss"].mean()
        least = min(least, float(loss))
    return least


def rate_in_range(subject: Subject) -> Finding | None:
    """The configured rate lies where the range test (Smith 2017) finds the loss to fall."""
    run = subject.run
    if run.experiment.finds_rate or getattr(run.step, "closure", False):
        return None
    curve = range_test(run, lowest=RANGE_LOWEST, highest=RANGE_HIGHEST, steps=RANGE_STEPS)
    return _judged(curve, float(run.optimizer.param_groups[0]["base_lr"]))


def _judged(curve: RangeTest, rate: float) -> Finding:
    name = "learning rate"
    found = {rule: value for rule, value in curve.suggestions().items() if value is not None}
    if not found:
        return Finding(
            name, Verdict.unknown, f"optim.lr={rate:g}; no rule reads a rate from {len(curve.losses)} updates"
        )
    low, high = min(found.values()), max([*found.values(), curve.limit or 0.0])
    told = f"optim.lr={rate:g}; the range test names {low:.2g} to {high:.2g}"
    best = found.get("valley", low)
    if rate > RATE_FACTOR * high:
        return Finding(name, Verdict.bad, told, f"the loss rises there: type optim.lr={best:.2g}, or a warm-up")
    if curve.limit is not None and rate > 3 * curve.limit:
        return Finding(name, Verdict.watch, told, f"the loss rises there without a warm-up: try optim.lr={best:.2g}")
    if rate < low / (3 * RATE_FACTOR):
        return Finding(name, Verdict.watch, told, f"training will be slow: try optim.lr={best:.2g}")
    return Finding(name, Verdict.good, told)
