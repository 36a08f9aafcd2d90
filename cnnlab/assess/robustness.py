"""How a trained network's metric falls when its images are corrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from cnnlab.assess.corruptions import CORRUPTIONS, STRENGTHS
from cnnlab.augment.photos import from_photos
from cnnlab.building.evaluation import OpenedData, loader_of
from cnnlab.building.opened import Opened
from cnnlab.data.loader import spread
from cnnlab.machine.ranks import Ranks
from cnnlab.protocols import VIEW, Batch
from cnnlab.train.run import describe_sums
from cnnlab.train.state import Totals

USUAL = 2_000
"""Samples, unless more are asked for: each is evaluated 26 times."""
Tell = Callable[[str, int, int], None]


def robustness(
    network: Opened, split: str, data: OpenedData, *, samples: int | None = None, tell: Tell = lambda *_: None
) -> dict[str, Any]:
    """The task's metric of the split's images as they are, and with each corruption at each strength.

    Args:
        samples: at most, from all over the split; `None` takes `USUAL`.
        tell: is told what is done, how much of it, and of how much.

    Returns:
        for JSON: `metric`, `samples`, `clean`; of each corruption `values` by strength, their `mean`, the `formula`, or
        why it was `left_out`; and `mean`, that of the means.
    """
    loader = loader_of(network, split, data)
    index = spread(loader.length, USUAL if samples is None else samples)
    totals: dict[str, list[Totals]] = {name: [] for name in CORRUPTIONS}
    clean, left_out = Totals(Ranks(), network.device), dict[str, str]()
    done = 0
    with torch.no_grad():
        for part in index.split(loader.batch_size):
            raw = loader.raw(part)
            clean.add(_sums(network, loader.transform, raw))
            seen = _seen(network, raw)
            for name in [name for name in CORRUPTIONS if name not in left_out]:
                sums = totals[name] or [Totals(Ranks(), network.device) for _ in range(STRENGTHS)]
                totals[name] = sums
                try:
                    for strength, corrupted in _corrupted(name, seen):
                        sums[strength].add(_sums(network, loader.transform, corrupted))
                except ValueError as error:
                    left_out[name] = str(error)
            done += len(part)
            tell(f"{len(CORRUPTIONS)} corruptions", done, len(index))
    metric, side = network.task.monitor[0], min(network.spec.size)

    def figure(total: Totals) -> float:
        return describe_sums(network.task, total.take())[metric]

    rows: dict[str, dict[str, Any]] = {}
    for name, corruption in CORRUPTIONS.items():
        if name in left_out:
            rows[name] = {"left_out": left_out[name], "formula": corruption.formula(side)}
            continue
        values = [figure(total) for total in totals[name]]
        rows[name] = {"values": values, "mean": sum(values) / len(values), "formula": corruption.formula(side)}
    means = [row["mean"] for row in rows.values() if "mean" in row]
    return {
        "metric": f"{split}/{metric}",
        "samples": len(index),
        "clean": figure(clean),
        "corruptions": rows,
        "mean": sum(means) / len(means),
    }


def _sums(network: Opened, transform: Any, raw: Batch) -> dict[str, Tensor]:
    return network.forward(transform(raw, 0))[1]


def _seen(network: Opened, raw: Batch) -> Batch:
    """The images as the network sees them, (N, C, H, W) uint8."""
    batch = from_photos(raw, None, None, network.spec.size) if VIEW in raw else raw
    image = batch["image"]
    if image.dtype != torch.uint8:
        image = (image * 255).round().clamp(0, 255).to(torch.uint8)
    return {**batch, "image": image}


def _corrupted(name: str, batch: Batch) -> Iterator[tuple[int, Batch]]:
    for strength in range(STRENGTHS):
        yield strength, CORRUPTIONS[name].apply(batch, strength)
