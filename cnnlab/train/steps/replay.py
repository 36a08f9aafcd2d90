"""An update that was not finite, once more and eagerly: which layer made it so, and of which samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from cnnlab import rng
from cnnlab.inspect.untouched import untouched
from cnnlab.observe.suspect import LOSS, Suspect, Trace, finite, floats, rows_of, values_of
from cnnlab.protocols import Batch
from cnnlab.train.forward import NO_PENALTIES, minimized, pieces
from cnnlab.train.steps.eager import EagerStep


@dataclass(frozen=True)
class Located:
    """Where an update stops being finite.

    `phase`: `input`, `weights`, `forward`, `loss`, `penalty`, `backward`, `sum` (of gradients that are finite one by
    one) or `none` (it does not happen again). `layer`, `kind`, `what`, `values`: see `Suspect`; under `weights`,
    `layer` names the first of them. `samples`: positions in the split of those that are concerned, empty where none are
    told apart; `rows`: the same as positions in this rank's part of the batch. `piece`: the micro-batch. `loss`: of
    this rank's part.
    """

    phase: str
    layer: str = ""
    kind: str = ""
    what: str = ""
    values: str = ""
    samples: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    piece: int = 0
    rank: int = 0
    loss: float = 0.0

    def record(self) -> dict[str, Any]:
        """Plain values, for `run.json` and bundles."""
        return {**asdict(self), "samples": list(self.samples), "rows": list(self.rows)}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Located:
        """From `record`. Raises `TypeError` for what is none."""
        return cls(**{**record, "samples": tuple(record["samples"]), "rows": tuple(record["rows"])})

    def sentence(self) -> str:
        """What it found, for people."""
        where = f"{self.layer} ({self.kind})" if self.kind else self.layer
        of = _listed(self.samples)
        told = {
            "input": f"the images of {of} are {self.values} before the network sees them",
            "weights": f"the weights are {self.values} before the update: {where}; the one before it made them so",
            "forward": f"{where}: {self.what}; {self.values}, for {of}",
            "loss": f"the loss is {self.values} for {of}; the network's outputs are finite",
            "penalty": f"the penalty {where} is {self.values}",
            "backward": f"{where}: {self.what}; {self.values}, for {of}",
            "sum": f"the gradient of {where} is {self.values}, and those of its parts are finite",
            "none": "once more and eagerly, loss and gradients are finite",
        }
        return told[self.phase]


ORDER = ("input", "weights", "forward", "loss", "penalty", "backward", "sum", "none")
"""What comes first in an update."""


def _listed(samples: Sequence[int]) -> str:
    if not samples:
        return "no sample in particular"
    shown = ", ".join(map(str, samples[:5]))
    more = f" and {len(samples) - 5} more" if len(samples) > 5 else ""
    return f"sample{'s' * (len(samples) > 1)} {shown}{more}"


def locate(step: EagerStep, batch: Batch, count: int, number: int) -> Located:
    """Runs update `number` up to its gradients, eagerly, with the weights as they stand; nothing of it is left.

    Args:
        batch: this rank's part, before the interventions, as the loader gives it.
        count: samples of the whole batch.

    Each rank finds what its own part does, and all of them return what comes first.
    """
    found = _Replay(step, batch, count, number).run()
    records: list[Mapping[str, Any]] = step.ranks.collect(found.record())
    return min(map(Located.of, records), key=lambda one: (one.piece, ORDER.index(one.phase)))


class _Replay:
    def __init__(self, step: EagerStep, batch: Batch, count: int, number: int):
        self.step = step
        self.batch = step.interventions.batch(dict(batch), number)
        self.count = count
        self.number = number

    def run(self) -> Located:
        with untouched(self.step.model), torch.enable_grad():
            return self._look()

    def _look(self) -> Located:
        model, size = self.step.model, len(self.batch["index"])
        wrong = [name for name, t in [*model.named_parameters(), *model.named_buffers()] if not finite(floats(t))]
        if wrong:
            tensors = dict([*model.named_parameters(), *model.named_buffers()])
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            return self._found("weights", Suspect(wrong[0] + more, "", "", values_of([tensors[wrong[0]]])))
        inputs = floats(self.batch)
        if not finite(inputs):
            return self._found("input", Suspect("", "", "", values_of(inputs), rows_of(inputs, size)))
        start = 0
        for index, piece in enumerate(pieces(self.batch, self.step.accumulate)):
            if (found := self._piece(index, piece, start)) is not None:
                return found
            start += len(piece["index"])
        for name, p in model.named_parameters():
            if p.grad is not None and not finite([p.grad]):
                return self._found("sum", Suspect(name, "", "", values_of([p.grad])))
        return self._found("none", Suspect("", "", "", ""))

    def _piece(self, index: int, piece: Batch, start: int) -> Located | None:
        step = self.step
        rng.reseed(step.device, step.seed, "dropout", self.number, index, step.ranks.rank)
        first = index == 0 and step.ranks.is_main
        penalties = step.penalties if first else NO_PENALTIES
        with Trace(step.model, len(piece["index"])) as trace:
            total, losses, sums = minimized(step.evaluator, piece, self.count, penalties, step.weights)
            loss = float(losses.sum()) / max(1, len(losses))
            if trace.found is not None:
                return self._found("forward", trace.found, index, start, loss)
            if not finite([losses]):
                suspect = Suspect(LOSS, "", "", values_of([losses]), rows_of([losses], len(losses)))
                return self._found("loss", suspect, index, start, loss)
            if not finite([total]):
                return self._found("penalty", self._penalty(sums), index, start, loss)
            trace.backward(total if step.scaler is None else step.scaler.scale(total))
            return None if trace.found is None else self._found("backward", trace.found, index, start, loss)

    @staticmethod
    def _penalty(sums: Mapping[str, Tensor]) -> Suspect:
        """The first term of the penalties that is not finite."""
        terms = {name: value for name, value in sums.items() if name.startswith("penalty") and not finite([value])}
        name = max(terms, key=len, default="")
        return Suspect(name.removeprefix("penalty/"), "", "", values_of([*terms.values()]))

    def _found(self, phase: str, suspect: Suspect, piece: int = 0, start: int = 0, loss: float = 0.0) -> Located:
        rows = tuple(start + row for row in suspect.rows)
        samples = tuple(int(i) for i in self.batch["index"][list(rows)].tolist()) if rows else ()
        return Located(
            phase,
            suspect.layer or ("" if phase in ("input", "none") else "the network"),
            suspect.kind,
            suspect.what,
            suspect.values,
            samples,
            rows,
            piece,
            self.step.ranks.rank,
            loss,
        )
