"""How the sinks read the records that the loop hands out. Loads no torch.

A metric record has `step`, `epoch`, `split`, `lr` and the split's figures. A statistics record has `step`,
`epoch`, `layers` and `tensors` (names in depth order), scalars, and lists with one value a layer or one a
tensor.

`step` is the number of updates done, in both: a statistics record's figures are of the update that made it `step`.
`epoch` counts from 1 and is that of this update; an evaluation at an epoch's end has the same as the training record
there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

_BOOKKEEPING = frozenset({"step", "epoch", "split", "lr"})
_LOSS_PARTS = frozenset({"data_loss", "penalty"})


def is_loss_part(name: str) -> bool:
    """Whether a figure, `val/data_loss` or `data_loss/aux`, is a part of a `loss`; the console leaves these to the
    files."""
    return not _LOSS_PARTS.isdisjoint(name.split("/"))


def current(records: Iterable[Mapping[str, Any]], schema: int) -> Iterator[dict[str, Any]]:
    """The records of one file of a run folder of version `schema` (see `cnnlab.runs.folder.SCHEMA_VERSION`), as
    this version has them. An evaluation's penalty, which version 1 did not compute, is null."""
    epoch = None
    for record in records:
        if schema > 1:
            yield dict(record)
        elif "split" not in record:
            yield {**record, "step": record["step"] + 1, "epoch": record["epoch"] + 1}
        elif record["split"] == "train":
            epoch = record["epoch"] + 1
            yield {**record, "epoch": epoch}
        else:
            yield {**record, "epoch": record["epoch"] if epoch is None else epoch, "penalty": None}


def as_first_version(record: Mapping[str, Any], epochs_done: int) -> dict[str, Any]:
    """A record of this version as version 1 had it, for a run that was begun so."""
    if record.get("split") in (None, "train"):
        begun = record["epoch"] - 1
        return {**record, "epoch": begun, **({} if "split" in record else {"step": record["step"] - 1})}
    return {**record, "epoch": epochs_done}


def number(value: Any) -> float:
    """The value as a float; null (what a JSON file has for a non-finite number) is NaN."""
    return math.nan if value is None else float(value)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def figures(record: Mapping[str, Any]) -> dict[str, float]:
    """A metric record's loss, loss parts and metrics, in the record's order."""
    return {
        key: number(value)
        for key, value in record.items()
        if key not in _BOOKKEEPING and (value is None or is_number(value))
    }


def names_of(record: Mapping[str, Any], quantity: str, length: int) -> list[str]:
    """What the values of a quantity belong to: layers for `activation...`, parameter tensors for the rest.

    A list of another length than these has its values numbered.
    """
    layers, tensors = record.get("layers", ()), record.get("tensors", ())
    first, second = (layers, tensors) if quantity.startswith("activation") else (tensors, layers)
    for names in (first, second):
        if len(names) == length:
            return list(names)
    return [str(position) for position in range(length)]


def by_depth(record: Mapping[str, Any]) -> dict[str, tuple[list[str], list[float]]]:
    """The quantities with one value a layer or tensor: names and values, in depth order."""
    found = {}
    for quantity, values in record.items():
        if quantity in ("layers", "tensors") or not isinstance(values, list) or not values:
            continue
        if all(value is None or is_number(value) for value in values):
            found[quantity] = (names_of(record, quantity, len(values)), [number(value) for value in values])
    return found


def evenly_spaced(length: int, most: int) -> Sequence[int]:
    """At most `most` positions of `length`, the first and the last among them."""
    if length <= most:
        return range(length)
    return [round(position * (length - 1) / (most - 1)) for position in range(most)]
