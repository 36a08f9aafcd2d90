"""Images with boxes in the layout of Pascal VOC (Everingham et al. 2010)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import torch
from torch import Tensor

from cnnlab.data.cache import decoded
from cnnlab.data.decode import Recipe, letterbox
from cnnlab.data.formats import require_file
from cnnlab.data.found import Findings
from cnnlab.data.lists import Folder, kept, leave_out, listed, tell_shared
from cnnlab.data.options import Decoding, LabelledCut
from cnnlab.data.sources import Listing
from cnnlab.data.splits import Fraction, assemble, digest, require_fractions
from cnnlab.data.whole import as_seen
from cnnlab.errors import DataError
from cnnlab.protocols import DataSpec, Split
from cnnlab.schema import PositiveInt

_LAYOUT = "ROOT/JPEGImages/<id>.jpg, ROOT/Annotations/<id>.xml, ROOT/ImageSets/Main/{train,val,test}.txt"


_SIDES = ("xmin", "ymin", "xmax", "ymax")


@dataclass(eq=False)
class VocBoxes(Decoding, LabelledCut):
    """Classification and localization: each image's largest object, its class and its box.

    The files' boxes are pixels counted from 1, both ends included, as VOC's are: a box over the whole of a W
    x H image is (1, 1, W, H) there and (0, 0, 1, 1) here.

    Args:
        root: the folder.
        size: side of the images.
        fit: `letterbox` keeps the aspect ratio and fills with black; `stretch` does not.
        classes: their names in the order of the labels; `None` takes those that occur, by name.
        val_as_test: whether `val.txt` lists the test split, as VOC's own is used (nobody has the annotations of
            its test images); the checkpoint is then selected on a part of train.
        val, test: fractions of the training images for a split without a list in ImageSets/Main, by class.
        on_error: whether an unreadable image or annotation, or a listed image without one of them, ends the run or is
            left out.
    """

    root: str
    size: PositiveInt = 128
    fit: Literal["letterbox", "stretch"] = "letterbox"
    classes: tuple[str, ...] | None = None
    val_as_test: bool = False
    val: Fraction = 0.1
    test: Fraction = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fractions(self.val, self.test)
        self._root = Path(self.root).expanduser()
        self._recipe = self.recipe(3, self.size, self.size, self.fit)
        self._told = Findings()
        self._unusable: dict[str, str] = {}

    def spec(self) -> DataSpec:
        """Reads the annotations, where they alone name the classes, but no image. Raises `DataError`."""
        size = (self._recipe.height, self._recipe.width)
        return DataSpec(3, size, self._classes, targets=frozenset({"label", "box"}))

    def load(self) -> dict[str, Split]:
        folder = Folder.of(self._root, "JPEGImages")
        every = [*dict.fromkeys(name for names in self._lists.values() for name in names)]
        objects = self._objects
        self.findings = Findings([*self._told.notices])
        folder.tell_unlisted(every, self.findings)
        lacking = [*self._unusable.items(), *folder.lacking([name for name in every if name in objects])]
        out = leave_out(lacking, len(every), self.on_error, self.findings, "mend them")
        ids, given = kept(self._lists, out, folder, self.findings)
        labels = torch.tensor([self._label(name) for name in ids])
        parts = self.parted(given, labels, len(self._classes), val=self.val, test=self.test)
        pixels = torch.tensor([self._objects[name][1] for name in ids])
        splits: dict[str, Split] = {}
        for used, rows, recipe in self.by_recipe(parts, len(ids), self._recipe, self.whole(self._recipe)):
            chosen = [ids[row] for row in used.tolist()]
            listing = Listing(self._root, [folder.of_id(name) for name in chosen])
            splits |= self._decoded(listing, chosen, rows, recipe, labels[used], pixels[used])
        return splits

    def _decoded(
        self, listing: Listing, ids: list[str], parts: dict[str, Tensor], recipe: Recipe, labels: Tensor, pixels: Tensor
    ) -> dict[str, Split]:
        """Raises `DataError` for a box outside its image."""
        store = decoded(listing, recipe, **self.decoding)
        self.findings.leave_out(listing, store.failures)
        boxes = fitted_boxes(pixels, store.sizes, recipe)
        parts = store.readable(parts)
        for rows in parts.values():
            outside = rows[(boxes[rows, 2:] <= boxes[rows, :2]).any(1)].tolist()
            if outside:
                raise DataError(
                    f"expected boxes that lie in their images, received {len(outside)} that do not, "
                    f"the first {pixels[outside[0]].tolist()} of {ids[outside[0]]}; repair its annotation"
                )
        self.findings.record(parts, listing)
        source, targets = digest(store.fingerprint, labels, boxes), {"label": labels, "box": boxes}
        return assemble(store.images, *as_seen(targets, source, store.sizes, self._recipe, recipe), parts, mapped=True)

    @cached_property
    def _lists(self) -> dict[str, list[str]]:
        """Image ids by split, from ImageSets/Main."""
        folder = self._root / "ImageSets" / "Main"
        lists: dict[str, list[str]] = {}
        for split in ("train", "val", "test"):
            path = folder / f"{split}.txt"
            if path.is_file():
                named = "test" if split == "val" and self.val_as_test else split
                if named in lists:
                    self._told.notices.append(
                        f"data: {path} is not used, as data.val_as_test=true takes val.txt for it"
                    )
                    continue
                lists[named] = [*listed(path, self._told)]
        if not lists.get("train"):
            what = "an empty list" if "train" in lists else "nothing"
            raise DataError(
                f"expected the ids of the training images in {folder / 'train.txt'}, received {what}; "
                f"type data.root=FOLDER, laid out as {_LAYOUT}"
            )
        tell_shared(lists, self._told)
        return lists

    @cached_property
    def _objects(self) -> dict[str, tuple[str, tuple[float, float, float, float]]]:
        """Class and box (x1, y1, x2, y2; pixels from 0) of each listed image's largest object.

        Raises `DataError` for an annotation that cannot be used, unless it is left out.
        """
        folder = self._root / "Annotations"
        found = {}
        for name in dict.fromkeys(name for names in self._lists.values() for name in names):
            try:
                found[name] = _largest(folder / f"{name}.xml")
            except DataError as error:
                if self.on_error == "raise":
                    raise
                self._unusable[name] = str(error)
        return found

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        return self.classes or tuple(sorted({kind for kind, _ in self._objects.values()}))

    def _label(self, name: str) -> int:
        kind, _ = self._objects[name]
        if kind not in self._classes:
            path = self._root / "Annotations" / f"{name}.xml"
            raise DataError(
                f"expected an object of {', '.join(self._classes)} in {path}, received {kind!r}; repair it, "
                "or complete data.classes"
            )
        return self._classes.index(kind)


def _largest(path: Path) -> tuple[str, tuple[float, float, float, float]]:
    """Class and box of the annotation's object with the largest box."""
    try:
        require_file(str(path))
        objects = ElementTree.parse(path).getroot().findall("object")
        found = []
        for item in objects:
            xmin, ymin, xmax, ymax = (float(item.findtext(f"bndbox/{side}", "nan")) for side in _SIDES)
            box = (xmin - 1, ymin - 1, xmax, ymax)
            area = max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])
            found.append((area, item.findtext("name", "").strip(), box))
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise DataError(f"expected a VOC annotation in {path}, received: {error}; repair it") from error
    whole = [entry for entry in found if entry[0] > 0 and entry[1]]
    if not whole:
        raise DataError(
            f"expected an object with a name and a box in {path}, received {len(found)} objects "
            f"and none such; remove the image from ImageSets/Main or repair the annotation"
        )
    _, kind, box = max(whole, key=lambda entry: entry[0])
    return kind, box


def fitted_boxes(boxes: Tensor, sizes: Tensor, recipe: Recipe) -> Tensor:
    """Boxes in [0, 1] of the fitted image.

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
