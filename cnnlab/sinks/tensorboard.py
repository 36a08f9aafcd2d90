"""A run in TensorBoard: curves, per-layer statistics, pictures of depth over time, histograms, HPARAMS.

Importing this module is cheap; TensorBoard's protocol buffers are imported when a run starts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from cnnlab.protocols import Listener
from cnnlab.runs.folder import RunDir, flatten
from cnnlab.sinks.jsonl import read_records
from cnnlab.sinks.records import by_depth, current, evenly_spaced, figures, is_number, names_of, number

if TYPE_CHECKING:
    from cnnlab.sinks.events import EventFile
    from cnnlab.sinks.picture import History

_SHARES = ("dead", "zeros", "saturated")
"""Quantities in [0, 1], drawn on a linear scale."""
_SIGNED = ("mean",)


class TensorBoard(Listener):
    """Writes event files to `folder`, one a session of the run (a resumed run adds one).

    | tag | content |
    |---|---|
    | `{split}/{metric}`, `lr` | the metric records |
    | `activation_std/{layer}`, ... | the statistics, of at most `max_layers` layers |
    | `depth/activation_std`, ... | each as a picture: rows are all layers, columns the sampled steps |
    | `weight_histogram/{tensor}`, ... | histograms, where a record has them |
    | `samples/{name}` | sample pictures, as the network gets them |
    | `explain/{name}`, ... | what other listeners draw |

    Args:
        folder: where the event files go (`<run>/tensorboard`).
        max_layers: curves a statistic; a deeper network has evenly spaced layers drawn as curves.
        picture_every: statistics records between redrawings of the depth pictures, at least; the pauses grow
            with the run, so that a long run redraws some 20 to 40 times.
    """

    def __init__(self, folder: Path, *, max_layers: int = 32, picture_every: int = 20):
        if max_layers < 2:
            raise ValueError(f"expected max_layers of 2 or more, received {max_layers}")
        self.folder = Path(folder)
        self._max_layers = max_layers
        self._picture_every = picture_every
        self._events: EventFile | None = None
        self._early: list[tuple[int, list[Any]]] = []
        """What others draw before this listener is told of the start."""
        self._histories: dict[str, History] = {}
        self._taken = 0
        self._next_picture = picture_every
        self._drawn_at: int | None = None
        self._hparams: dict[str, Any] = {}
        self._began = 0.0
        self._columns: list[str] | None = None
        """The metrics of the HPARAMS page, once they are known."""
        self._grouped = False

    def on_start(self, run: Any) -> None:
        from cnnlab.sinks import events

        self._histories, self._taken, self._next_picture, self._drawn_at = {}, 0, self._picture_every, None
        # Earlier files, cut to the checkpoint, have the descriptions already: a reader is to see them once.
        going_on = run.resumed and any(self.folder.glob("*tfevents*"))
        self._columns, self._grouped, self._began = None, False, time.time()
        self._events = events.EventFile(self.folder, run.clock.step + 1 if run.resumed else 0)
        self._hparams = hyperparameters(run.config)
        if run.resumed and run.dir:
            self._remember(RunDir(run.dir), run.clock.step)
        if not going_on:
            self._events.add(run.clock.step, [events.layout(_layout(()))])
        events.write_hparams(self.folder, self._hparams, self._columns, self._began)
        early, self._early = self._early, []
        for step, values in early:
            self._add(step, values)

    def on_record(self, run: Any, record: dict[str, Any]) -> None:
        from cnnlab.sinks.events import scalar, write_hparams

        split, found = record["split"], figures(record)
        values = [scalar(f"{split}/{name}", value) for name, value in found.items()]
        if split == "train" and record.get("lr") is not None:
            values.append(scalar("lr", record["lr"]))
        self._add(record["step"], values)
        if split != "train" and self._columns is None and self._events is not None:
            self._columns = _columns(found)
            write_hparams(self.folder, self._hparams, self._columns, self._began)

    def on_stats(self, run: Any, record: dict[str, Any]) -> None:
        from cnnlab.sinks.events import layout

        quantities = by_depth(record)
        values = [*self._statistics(record, quantities), *_histograms(record, self._max_layers)]
        if not self._grouped:
            self._grouped = True
            values.append(layout(_layout(quantities)))
        self._add(record["step"], values)
        self._collect(record["step"], quantities)
        if self._taken >= self._next_picture and not run.finished():  # the run's end draws the last one
            self._draw(record["step"])

    def on_pictures(self, run: Any, pictures: Mapping[str, Tensor], step: int) -> None:
        self._show(pictures, step)

    def on_end(self, run: Any, error: BaseException | None) -> None:
        from cnnlab.sinks.events import hparams_session_end

        if self._events is None:
            return
        if run.clock.step != self._drawn_at:
            self._draw(run.clock.step)
        self._add(run.clock.step, [hparams_session_end(error is None, time.time())])
        self._events = None

    def pictures(self, pictures: Mapping[str, Tensor], step: int = 0) -> None:
        """Pictures (3, H, W) uint8 by name, to `samples/{name}`; small ones are enlarged by whole
        multiples."""
        self._show({f"samples/{name}": picture for name, picture in pictures.items()}, step)

    def _show(self, pictures: Mapping[str, Tensor], step: int) -> None:
        from cnnlab.sinks import events
        from cnnlab.sinks.picture import enlarged, png

        values = []
        for name, picture in pictures.items():
            pixels = enlarged(picture.detach().cpu().permute(1, 2, 0).numpy())
            values.append(events.image(name, png(pixels), pixels.shape[0], pixels.shape[1]))
        self._add(step, values)

    def _add(self, step: int, values: list[Any]) -> None:
        if self._events is None:
            self._early.append((step, values))
        else:
            self._events.add(step, values)

    def _statistics(
        self, record: Mapping[str, Any], quantities: Mapping[str, tuple[list[str], list[float]]]
    ) -> Iterator[Any]:
        from cnnlab.sinks.events import scalar

        for quantity, value in record.items():
            if is_number(value) and quantity not in ("step", "epoch"):
                yield scalar(quantity, value)
        for quantity, (names, numbers) in quantities.items():
            for position in evenly_spaced(len(names), self._max_layers):
                if not math.isnan(numbers[position]):
                    yield scalar(f"{_tag(quantity)}/{names[position]}", numbers[position])

    def _remember(self, folder: RunDir, step: int) -> None:
        """Takes up the depth pictures where the run stood: its statistics up to `step`."""
        described: dict[str, Any] = {}
        evaluated = next((r for r in read_records(folder.metrics) if r.get("split") != "train"), None)
        self._columns = None if evaluated is None else _columns(figures(evaluated))
        for record in current(read_records(folder.stats), folder.schema):
            described |= {key: record[key] for key in ("layers", "tensors") if key in record}
            if record.get("step", 0) <= step:
                self._collect(record["step"], by_depth({**described, **record}))
        self._next_picture = self._taken + self._picture_every
        self._grouped = self._taken > 0

    def _collect(self, step: int, quantities: Mapping[str, tuple[list[str], list[float]]]) -> None:
        from cnnlab.sinks.picture import History

        for quantity, (names, numbers) in quantities.items():
            history = self._histories.get(quantity)
            if history is None or history.names != names:
                history = self._histories[quantity] = History(names, log=_kind(quantity) not in _SHARES + _SIGNED)
            history.add(step, numbers)
        self._taken += 1

    def _draw(self, step: int) -> None:
        from cnnlab.sinks import events
        from cnnlab.sinks.picture import depth_picture, png

        values = []
        self._drawn_at = step
        for quantity, history in self._histories.items():
            if np.isnan(history.values()).all():
                continue  # does not apply to this network, as saturation does not to ReLU
            bounds = (0.0, 1.0) if _kind(quantity) in _SHARES else None
            drawn = depth_picture(quantity.replace("/", " ").replace("_", " "), history, bounds=bounds)
            values.append(events.image(f"depth/{_tag(quantity)}", png(drawn), drawn.shape[0], drawn.shape[1]))
        self._add(step, values)
        self._next_picture = max(self._taken + self._picture_every, math.ceil(1.15 * self._taken))


def _columns(found: Iterable[str]) -> list[str]:
    """The scalars that the HPARAMS page has as columns, of the metrics of an evaluation."""
    return ["train/loss", *(f"{which}/{name}" for which in ("val", "test") for name in found)]


def _tag(quantity: str) -> str:
    """`activation/std` -> `activation_std`: TensorBoard groups by what stands before the first slash."""
    return quantity.replace("/", "_")


def _kind(quantity: str) -> str:
    return quantity.rsplit("/", 1)[-1]


def _histograms(record: Mapping[str, Any], most: int) -> Iterator[Any]:
    """`histogram/weight: [[low, high, counts...], ...]`, one row a tensor, as TensorBoard histograms of equal bins.

    A row with a bound that is not finite (a gradient that overflowed) has no bins to draw.
    """
    from cnnlab.sinks.events import histogram

    for quantity, rows in record.items():
        if not quantity.startswith("histogram/"):
            continue
        names = names_of(record, _kind(quantity), len(rows))
        for position in evenly_spaced(len(rows), most):
            low, high, *counts = map(number, rows[position])
            if math.isfinite(low) and math.isfinite(high):
                width = (high - low) / len(counts) if high > low else 1 / len(counts)
                edges = [low + width * edge for edge in range(len(counts) + 1)]
                yield histogram(f"{_kind(quantity)}_histogram/{names[position]}", edges, counts)


def _layout(quantities: Any) -> dict[str, dict[str, list[str]]]:
    """The custom-scalars page: train and val in one chart, and one chart a statistic, grouped by what it is
    of."""
    page = {
        "training": {
            "loss": ["(train|val)/loss$"],
            "metrics": ["(train|val)/(?!(loss|data_loss|penalty)$|(data_loss|penalty)/)"],
            "loss parts": ["(train|val)/(data_loss|penalty)(/.*)?$"],
            "learning rate": ["lr$"],
        }
    }
    for quantity in quantities:
        family = quantity.rsplit("/", 1)[0].replace("_", " ")
        page.setdefault(family, {})[_kind(quantity)] = [f"{_tag(quantity)}/"]
    return page


def hyperparameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config, flat: `optim.lr`, `trainer.epochs`, ..., with a part's class as the part's own value
    (`model._target_: cnnlab.models.resnet.ResNet` -> `model: ResNet`)."""
    found = {}
    for key, value in flatten(config).items():
        if key.endswith("._target_"):
            found[key.removesuffix("._target_")] = str(value).rsplit(".", 1)[-1]
        elif not key.endswith("_partial_") and not key.startswith("hydra"):
            found[key] = value
    return found
