"""The base of all tasks: what a network is to give, what is minimized, and what is told of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cnnlab.losses import PerSample, Weighted
from cnnlab.protocols import Batch, ConvNet, DataSpec, Loss, Outputs, Split
from cnnlab.tasks.pictures import picture_grid


class Task:
    """What is learned. A task of one's own states what differs; `losses` is the one method without a default.

    Of a batch and of the data's spec a task sees the targets that it `needs`; of a network's outputs it `reads` some
    (see `Outputs`). Where the network does not give them by itself, the head of `head=` does, and under `head=auto`
    that of `own_head`; the classifier stays where the task reads its logits and the head gives none.

    Args:
        loss: the experiment's (`loss=`), made for `class_names` and `class_counts`.
        spec: of the data, as this task sees it.
        weights: of the losses by name; 1 for those that are not named. The parts of a `Weighted` loss bring theirs.
    """

    needs: tuple[str, ...] = ("label",)
    """The targets that the data must have."""
    reads: tuple[str, ...] = ("logits",)
    """The outputs that a network, with its head, must give."""
    monitor: tuple[str, Literal["max", "min"]] = ("loss", "min")
    """The metric (as named by `metrics`, or `loss`) that chooses the best checkpoint, and its direction."""

    def __init__(self, loss: Loss, spec: DataSpec, weights: Mapping[str, float] | None = None):
        self.criterion = loss
        self.spec = spec
        self.weights = {**(loss.weights if isinstance(loss, Weighted) else {}), **(weights or {})}

    # ---- before a network is there ----

    @classmethod
    def class_names(cls, spec: DataSpec) -> tuple[str, ...]:
        """The classes that the loss tells apart."""
        return spec.classes

    @classmethod
    def class_counts(cls, spec: DataSpec, labels: Tensor | None) -> Tensor | None:
        """How many training samples of each class there are, (classes,) int64; `None` where nobody has counted.

        Args:
            labels: (N,) int64 of the training images, where they have such.
        """
        return None if labels is None else torch.bincount(labels, minlength=spec.num_classes)

    @classmethod
    def weighed_counts(cls, spec: DataSpec, split: Split) -> Tensor | None:
        """What balanced class weights are taken from, (classes,) int64: `class_counts`, or what must be counted for it.
        Asked only where the loss is weighed so.

        Args:
            split: the training set.
        """
        return cls.class_counts(spec, split.labels)

    def own_head(self, model: ConvNet) -> Mapping[str, Any] | None:
        """The config node of the head that `head=auto` puts on a network which does not give what the task reads;
        `None` where there is none to put."""
        return None

    def initial_bias(self) -> Tensor | None:
        """(classes,) that the classifier's bias should start from, if the loss asks for it (focal loss: its prior)."""
        loss = self.criterion
        return loss.initial_bias(loss.num_classes) if isinstance(loss, PerSample) else None

    def to(self, device: torch.device) -> None:
        """Moves the losses' own tensors (class weights)."""
        for value in vars(self).values():
            if isinstance(value, nn.Module):
                value.to(device)

    # ---- a batch ----

    def prepare(self, batch: Batch) -> Batch:
        """The batch with the targets in the form that `losses` reads."""
        return batch

    def criteria(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The experiment's loss as `main`, (N,); of a `Weighted` one each part by its name, before its weight."""
        loss = self.criterion
        return loss.apart(logits, target) if isinstance(loss, Weighted) else {"main": loss(logits, target)}

    def losses(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Each loss by its name, (N,), one value a sample; before its weight."""
        raise NotImplementedError(f"{type(self).__name__} implements losses")

    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """`loss` (N,), the weighted sum of `losses`, which is minimized; and where there are several, each of them."""
        parts = self.losses(outputs, batch)
        total: Tensor | None = None
        for name, part in parts.items():
            weight = self.weights.get(name, 1.0)
            weighted = part if weight == 1 else weight * part
            total = weighted if total is None else total + weighted
        assert total is not None, f"{type(self).__name__} has no loss"
        if len(parts) == 1:
            return {"loss": total}
        assert "loss" not in parts, "a part of the loss needs a name of its own"
        return {"loss": total, **parts}

    def measure(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Tensors that add up over batches and ranks (counts, sums, confusion matrices)."""
        return {}

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The metrics of the summed measures; rates in [0, 1]."""
        return {}

    def by_class(self, sums: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """What became of each class, as `cnnlab.tasks.metrics.by_class` describes it; nothing without classes."""
        return []

    def of_samples(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Figures of each sample, (N, ...) by name, for who looks at single ones: nothing, beside the loss, by itself.

        A task with classes tells `label`, `predicted` and `probability` (of the predicted class, under a softmax); with
        boxes or masks `iou` (N,) too, NaN where there is nothing to cover.
        """
        return {}

    # ---- test-time views ----

    def views(self, image: Tensor) -> list[tuple[float, Tensor]]:
        """The views (N, C, H, W) of a batch of images to evaluate, each with its weight; the weights sum to 1."""
        return [(1.0, image)]

    def merge(self, views: Sequence[tuple[float, Outputs]]) -> Outputs:
        """The outputs of the `views`, in their order, as one: the weighted mean. A task whose outputs have places
        moves them back first."""
        if len(views) == 1:
            return views[0][1]
        named = {name: [weight * outputs[name].float() for weight, outputs in views] for name in views[0][1]}
        return {name: torch.stack(weighted).sum(0) for name, weighted in named.items()}

    # ---- for people ----

    def predictions(self, outputs: Outputs) -> dict[str, Tensor]:
        """What the outputs say, named as the targets are: `label` (N,) int64 and its `probability` (N,) under a
        softmax, `mask` (N, H, W) int64, any other output as it is."""
        found: dict[str, Tensor] = {}
        for name, output in outputs.items():
            if name == "logits":
                found["probability"], found["label"] = output.float().softmax(1).max(1)
            elif name == "mask":
                found["mask"] = output.argmax(1)
            elif name != "aux":
                found[name] = output
        return found

    def answers(self, outputs: Outputs, top: int = 3) -> list[dict[str, Any]]:
        """What is told of each sample, in JSON values: of logits `class` and its `probability` under a softmax, and
        `top`, the classes of the highest logits with theirs; any other output of at most 16 values a sample as it is.

        Args:
            top: classes to name; no more than there are.
        """
        rows: list[dict[str, Any]] = [{} for _ in range(len(next(iter(outputs.values()))))]
        for name, output in self.predictions(outputs).items():
            if name not in ("label", "probability", "mask") and output[0].numel() <= 16:
                for row, value in zip(rows, output.tolist(), strict=True):
                    row[name] = value
        if "logits" not in outputs:
            return rows
        names, logits = self.class_names(self.spec), outputs["logits"].float()
        order = torch.sort(logits, dim=1, descending=True, stable=True).indices[:, : max(1, top)]
        sure = logits.softmax(1).gather(1, order)
        for row, classes, probabilities in zip(rows, order.tolist(), sure.tolist(), strict=True):
            named = [{"class": names[c], "probability": p} for c, p in zip(classes, probabilities, strict=True)]
            row |= {**named[0], "top": named}
        return [{**{name: row[name] for name in ("class", "probability", "top")}, **row} for row in rows]

    def pictures(self, batch: Batch, outputs: Outputs | None = None) -> dict[str, Tensor]:
        """Pictures (3, H, W) uint8 by name, of a batch as the network gets it: `inputs`; or, with the network's
        outputs, of what it makes of the batch beside the truth, `predictions` where the task draws them."""
        return {"inputs": picture_grid(batch["image"])} if outputs is None else {}
