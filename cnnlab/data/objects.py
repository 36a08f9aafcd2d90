"""The one object of each image: which one is taken of several, and where its box lies in what the network gets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from cnnlab.data.cache import decoded
from cnnlab.data.decode import Recipe, letterbox
from cnnlab.data.found import Findings, first_lines
from cnnlab.data.options import ObjectOptions
from cnnlab.data.sources import Listing
from cnnlab.data.splits import assemble, digest
from cnnlab.data.whole import as_seen
from cnnlab.errors import DataError
from cnnlab.protocols import DataSpec, Split

Box = tuple[float, float, float, float]
"""(x1, y1, x2, y2), in pixels of the annotated image, counted from 0 at its corner."""

_ALIKE = 0.02
"""By how much two aspect ratios may differ that rounding to pixels made of one."""


@dataclass(frozen=True)
class Taken:
    """An image's object: `size` is the (height, width) that its annotation says the image has, `others` how many more
    objects there are."""

    kind: str
    box: Box
    size: tuple[int, int] | None = None
    others: int = 0


def largest(objects: Sequence[tuple[str, Box]], size: tuple[int, int] | None, where: str) -> Taken:
    """The object whose box has the largest area inside the image; the first one of several such.

    Args:
        objects: class and box each.
        size: (height, width) of the image, where that is known.
        where: the annotation, in a message.

    Raises:
        DataError: there is none with a class and an area.
    """
    height, width = size or (math.inf, math.inf)

    def area(box: Box) -> float:
        x1, y1, x2, y2 = box
        if not all(map(math.isfinite, box)) or x2 <= x1 or y2 <= y1:
            return -1
        return max(0.0, min(x2, width) - max(x1, 0)) * max(0.0, min(y2, height) - max(y1, 0))

    areas = [area(box) if kind else -1 for kind, box in objects]
    best = max(areas, default=-1)
    if best < 0:
        nameless = sum(not kind for kind, _ in objects)
        flat = [box for kind, box in objects if kind]
        received = f"{len(objects)} objects and none such"
        if nameless:
            received += f", {nameless} of them without a name"
        if flat:
            received += f", the box {[round(side, 2) for side in flat[0]]} without an area"
        raise DataError(f"expected an object with a name and a box in {where}, received {received}")
    kind, box = objects[areas.index(best)]
    return Taken(kind, box, size, len(objects) - 1)


def fitted_boxes(boxes: Tensor, sizes: Tensor, recipe: Recipe) -> Tensor:
    """Boxes in [0, 1] of the fitted image, clipped to it.

    Args:
        boxes: (N, 4), (x1, y1, x2, y2) in pixels of the original.
        sizes: (N, 2) its height and width; (0, 0) where it could not be read.
    """
    fitted = []
    for (x1, y1, x2, y2), (height, width) in zip(boxes.tolist(), sizes.tolist()):
        height, width = max(1, height), max(1, width)
        left, top, new_width, new_height = 0, 0, recipe.width, recipe.height
        if recipe.fit == "letterbox":
            left, top, new_width, new_height = letterbox(height, width, recipe.height, recipe.width)
        xs = [(left + min(max(x / width, 0), 1) * new_width) / recipe.width for x in (x1, x2)]
        ys = [(top + min(max(y / height, 0), 1) * new_height) / recipe.height for y in (y1, y2)]
        lies = recipe.fit == "whole" and height > width
        fitted.append([ys[0], xs[0], ys[1], xs[1]] if lies else [xs[0], ys[0], xs[1], ys[1]])
    return torch.tensor(fitted, dtype=torch.float32).reshape(-1, 4)


@dataclass
class _Tally:
    """Names of the images of which something is to be told."""

    clipped: list[str] = field(default_factory=list)
    scaled: list[str] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)

    def in_pixels(self, name: str, taken: Taken, height: int, width: int) -> Box:
        """The box in pixels of the image's file, and what there is to say of it."""
        x1, y1, x2, y2 = taken.box
        if taken.size is not None and taken.size != (height, width):
            high, wide = taken.size
            if abs(high * width / (wide * height) - 1) > _ALIKE:
                self.problems.append(
                    (name, f"its annotation is of an image of {wide}x{high} pixels, and the image has {width}x{height}")
                )
                return taken.box
            self.scaled.append(name)
            across, down = width / wide, height / high
            x1, y1, x2, y2 = x1 * across, y1 * down, x2 * across, y2 * down
        if min(x2, width) <= max(x1, 0) or min(y2, height) <= max(y1, 0):
            sides = [round(side, 2) for side in taken.box]
            self.problems.append((name, f"its box {sides} does not lie in the image of {width}x{height} pixels"))
        elif x1 < 0 or y1 < 0 or x2 > width or y2 > height:
            self.clipped.append(name)
        return x1, y1, x2, y2

    def tell(self, findings: Findings) -> None:
        if self.clipped:
            findings.notices.append(
                f"data: {len(self.clipped):,} boxes reach beyond their images and are cut off there ({self.clipped[0]})"
            )
        if self.scaled:
            findings.notices.append(
                f"data: {len(self.scaled):,} images have another size than their annotation says, in the same "
                f"proportions; their boxes are scaled alike ({self.scaled[0]})"
            )


@dataclass(eq=False)
class Boxed(ObjectOptions):
    """What the sets with a class and a box an image share."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._recipe = self.recipe(3, self.size, self.size, self.fit)
        self._told = Findings()
        self._unusable: dict[str, str] = {}

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        """Their names in the order of the labels. Raises `DataError` for annotations that cannot be used."""
        raise NotImplementedError(f"{type(self).__name__} names its classes")

    def spec(self) -> DataSpec:
        """Reads the annotations, where they alone name the classes, but no image. Raises `DataError`."""
        size = (self._recipe.height, self._recipe.width)
        return DataSpec(3, size, self._classes, targets=frozenset({"label", "box"}))

    def boxed(
        self,
        root: Path,
        files: Sequence[str],
        ids: Sequence[str],
        parts: Mapping[str, Tensor],
        taken: Sequence[Taken],
        labels: Tensor,
        recipe: Recipe,
    ) -> dict[str, Split]:
        """The splits with `label` and `box`. What there is to say of the boxes goes to `findings`.

        Args:
            root: folder that `files` are relative to.
            ids: of the images, in messages.
            parts: rows by split.
            taken: each image's object.
            labels: (N,) int64.
            recipe: how the network sees a file.

        Raises:
            DataError: a box outside its image, or an annotation of another image than the file, unless they are left
                out.
        """
        several = [name for name, one in zip(ids, taken, strict=True) if one.others]
        if several:
            self.findings.notices.append(
                f"data: {len(several):,} of {len(ids):,} images have several objects; the largest of each is taken "
                f"({several[0]})"
            )
        splits: dict[str, Split] = {}
        tally = _Tally()
        for used, rows, stored in self.by_recipe(parts, len(ids), recipe, self.whole(recipe)):
            listing = Listing(root, [files[row] for row in used.tolist()])
            names, objects = [ids[row] for row in used.tolist()], [taken[row] for row in used.tolist()]
            splits |= self._stored(listing, names, rows, objects, labels[used], recipe, stored, tally)
        tally.tell(self.findings)
        return splits

    def _stored(
        self,
        listing: Listing,
        ids: Sequence[str],
        parts: dict[str, Tensor],
        taken: Sequence[Taken],
        labels: Tensor,
        seen: Recipe,
        stored: Recipe,
        tally: _Tally,
    ) -> dict[str, Split]:
        store = decoded(listing, stored, **self.decoding)
        self.findings.leave_out(listing, store.failures)
        parts = store.readable(parts)
        pixels = torch.zeros(len(ids), 4, dtype=torch.float64)
        before = len(tally.problems)
        for row in sorted(row for rows in parts.values() for row in rows.tolist()):
            height, width = store.sizes[row].tolist()
            pixels[row] = torch.tensor(tally.in_pixels(ids[row], taken[row], height, width), dtype=torch.float64)
        parts = self._without(tally.problems[before:], ids, parts)
        boxes = fitted_boxes(pixels, store.sizes, stored)
        self.findings.record(parts, listing)
        source, targets = digest(store.fingerprint, labels, boxes), {"label": labels, "box": boxes}
        return assemble(store.images, *as_seen(targets, source, store.sizes, seen, stored), parts, mapped=True)

    def _without(
        self, problems: Sequence[tuple[str, str]], ids: Sequence[str], parts: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The rows of each split without those of which there is a problem."""
        if not problems:
            return parts
        if self.on_error == "raise":
            lines = "\n".join(f"  {line}" for line in first_lines([f"{name}: {why}" for name, why in problems]))
            raise DataError(
                f"expected boxes that lie in their images, received {len(problems)} that do not:\n{lines}\n"
                "mend their annotations, or type data.on_error=skip to leave those images out"
            )
        self.findings.left_out += problems
        name, why = problems[0]
        self.findings.notices.append(f"data: {len(problems):,} images are left out for their boxes ({name}: {why})")
        gone = {name for name, _ in problems}
        bad = torch.tensor([row for row, name in enumerate(ids) if name in gone])
        return {split: rows[~torch.isin(rows, bad)] for split, rows in parts.items()}


def labels_of(names: Sequence[str], taken: Sequence[Taken], classes: Sequence[str], where: Mapping[str, str]) -> Tensor:
    """(N,) int64, the classes' numbers.

    Args:
        where: the annotation of each image, in a message.

    Raises:
        DataError: an object of another class.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    for name, one in zip(names, taken, strict=True):
        if one.kind not in numbers:
            raise DataError(
                f"expected an object of {', '.join(classes)} in {where[name]}, received {one.kind!r}; repair it, or "
                "complete data.classes"
            )
    return torch.tensor([numbers[one.kind] for one in taken], dtype=torch.int64)
