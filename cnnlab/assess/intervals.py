"""Intervals of rates: how far a figure of so many samples can be from what more of them would give."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from cnnlab import rng

CONFIDENCE = 0.95
DRAWS = 1000
"""Resamples of a bootstrap."""
Interval = tuple[float, float]


def wilson(successes: float, trials: float, confidence: float = CONFIDENCE) -> Interval:
    """The score interval of a binomial rate (Wilson 1927, JASA 22, 209-212): all p whose standard error, as p itself
    has it, is within z of the observed rate. Without trials (0, 1)."""
    if trials <= 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (successes + z * z / 2) / (trials + z * z)
    half = z / (trials + z * z) * math.sqrt(successes * (trials - successes) / trials + z * z / 4)
    low = 0.0 if successes == 0 else centre - half
    return low, 1.0 if successes == trials else centre + half


def f1_interval(correct: float, target: float, predicted: float, confidence: float = CONFIDENCE) -> Interval:
    """Of F1 = 2 J / (1 + J), where J is the share, of the samples that are of the class or taken for it, that are both:
    a binomial rate, whose Wilson interval is mapped (Lam, Gopal & Qian 2023, arXiv 2309.14621, "Wilson indirect")."""
    low, high = wilson(correct, target + predicted - correct, confidence)
    return 2 * low / (1 + low), 2 * high / (1 + high)


def class_intervals(confusion: Tensor) -> list[dict[str, Interval]]:
    """Of each class the intervals of `recall`, `precision` and `f1`, from counts of independent samples.

    Args:
        confusion: (classes, classes) counts, rows the target.
    """
    matrix = confusion.double().cpu()
    counts = torch.stack([matrix.diagonal(), matrix.sum(1), matrix.sum(0)], 1).tolist()
    return [
        {
            "recall": wilson(correct, target),
            "precision": wilson(correct, predicted),
            "f1": f1_interval(correct, target, predicted),
        }
        for correct, target, predicted in counts
    ]


def bootstrapped(
    per_image: Mapping[str, Tensor], statistic: Callable[[dict[str, Tensor]], Tensor], *, draws: int = DRAWS
) -> list[Interval]:
    """Percentile intervals over images drawn with replacement (Efron 1979), of what is not one trial an image: the
    pixels of an image go together.

    Args:
        per_image: sums of each image, (N, ...) by name.
        statistic: from the sums over the drawn images (draws, ...), by name, to (draws, figures).
    """
    count = len(next(iter(per_image.values())))
    generator = rng.generator(0, "eval/bootstrap")
    weights = torch.zeros(draws, count, dtype=torch.float64)
    for row in weights:
        chosen = torch.randint(count, (count,), generator=generator)
        row += torch.bincount(chosen, minlength=count)
    sums = {
        name: (weights @ values.double().cpu().reshape(count, -1)).reshape(draws, *values.shape[1:])
        for name, values in per_image.items()
    }
    found = statistic(sums)
    rank = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)
    return [tuple(torch.nanquantile(column, rank).tolist()) for column in found.T]


def iou_intervals(samples: Mapping[str, Tensor]) -> tuple[Interval, list[Interval]]:
    """Of the mean IoU and of each class's, over images.

    Args:
        samples: `intersection` and `union`, (N, classes) pixels.
    """

    def ious(sums: Mapping[str, Tensor]) -> Tensor:
        each = sums["intersection"] / sums["union"]  # NaN where a class is in none of the drawn images
        return torch.cat([each.nanmean(1, keepdim=True), each], 1)

    mean, *classes = bootstrapped({name: samples[name] for name in ("intersection", "union")}, ious)
    return mean, classes


def of_figures(figures: Mapping[str, float], split: str, samples: Mapping[str, Tensor]) -> dict[str, Interval]:
    """Of the figures for which the samples tell one: `accuracy` and `accuracy_at_iou_50` are rates of samples;
    `mean_iou` is drawn again over images.

    Args:
        figures: by name, `test/accuracy`.
        samples: see `Task.of_samples`.
    """
    found: dict[str, Interval] = {}
    if {"label", "predicted"} <= samples.keys():
        right = samples["label"] == samples["predicted"]
        found["accuracy"] = wilson(int(right.sum()), len(right))
        if "iou" in samples:
            there = samples["iou"].isfinite()
            covered = right & (samples["iou"] >= 0.5)
            found["accuracy_at_iou_50"] = wilson(int(covered[there].sum()), int(there.sum()))
            sums = {"iou": samples["iou"].nan_to_num(), "count": there.double()}
            found["mean_iou"] = bootstrapped(sums, lambda drawn: (drawn["iou"] / drawn["count"])[:, None])[0]
    elif {"intersection", "union"} <= samples.keys():
        found["mean_iou"] = iou_intervals(samples)[0]
    return {f"{split}/{name}": pair for name, pair in found.items() if f"{split}/{name}" in figures}


def by_class(
    rows: Sequence[Mapping[str, Any]], confusion: Tensor | None, samples: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """`Task.by_class`'s rows with `recall_interval`, `precision_interval` and `f1_interval`, of masks `iou_interval`;
    `None` where the rate is."""
    intervals: Sequence[Mapping[str, Interval]] = []
    if {"intersection", "union"} <= samples.keys():
        intervals = [{"iou": pair} for pair in iou_intervals(samples)[1]]
    elif confusion is not None and {"label", "predicted"} <= samples.keys():
        intervals = class_intervals(confusion)
    if len(intervals) != len(rows):
        return [dict(row) for row in rows]
    return [
        {**row, **{f"{name}_interval": list(pair) if row.get(name) is not None else None for name, pair in own.items()}}
        for row, own in zip(rows, intervals, strict=True)
    ]
