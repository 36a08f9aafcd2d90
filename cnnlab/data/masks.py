"""Images with masks, in two folder trees of equal names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cnnlab.data.found import Findings, Walk, class_names, first_lines, first_names, require_one_place
from cnnlab.data.layout import SPLIT_NAMES, SPLITS, split_folders
from cnnlab.data.mask_reading import MaskOptions, Reading, Value, decided
from cnnlab.data.options import Cut, Decoding
from cnnlab.data.pairs import Pairs, decoded_pairs, untaught, whole_train
from cnnlab.data.splits import Fraction, assemble, digest, require_fractions
from cnnlab.errors import DataError
from cnnlab.protocols import VOID, DataSpec, Split
from cnnlab.schema import PositiveInt

_LAYOUT = "ROOT/images/{train,val,test}/<image>, ROOT/masks/{train,val,test}/<same name>.png, ROOT/classes.txt"
_TRIED = 20
"""Names that are looked at to find out what masks are called."""


@dataclass(eq=False)
class MaskFolder(Decoding, Cut):
    """Semantic segmentation of `root/images/<split>/` with `root/masks/<split>/`, or without folders for splits.

    Splits are called as in `cnnlab.data.folder`, subfolders are searched, and an image's mask has its path and name,
    but for the suffix. There is no label: `classes` of the spec are the mask's, in the order of `root/classes.txt`
    (one name a line).

    A mask is a greyscale or palette image of class numbers (a palette's indices, whatever its colours), 255 for void.
    Masks of as many other values as there are classes are read in their order, which is told; `values`, `colours` and
    `ignore` say otherwise. What can be read in several ways is refused, and so are formats that smear values.

    Args:
        root: the folder.
        size: (height, width) of images and masks.
        fit: `letterbox` keeps the aspect ratio and fills with black, in masks with void; `stretch` does not.
        values: the value in the masks of each class, in the classes' order (`[0, 255]`), or that of the first one, from
            which the others count on (`1`). A 255 that is named is no void.
        colours: masks hold colours: that of each class, in the classes' order (`[[0, 0, 0], [128, 0, 0]]`), or a file
            with a line `RED GREEN BLUE NAME` or `NAME,RED,GREEN,BLUE` for each colour. Names that are no classes are
            void; without a classes.txt, all of them are classes.
        ignore: values (`[0]`), or colours, that are void.
        scale_masks: whether a mask of another size than its image is scaled to it, by nearest neighbour.
        mask_name: what a mask is called, `*` being the name of its image (`*_L`), both without their suffixes.
        channels: 3 (colour) or 1 (grey).
        val, test: fractions of the training images for a split that the folder does not have.
        on_error: whether an unreadable file, an image without a mask, or a mask of another size ends the run or is
            left out.
    """

    root: str
    size: tuple[PositiveInt, ...] = (180, 240)
    fit: Literal["letterbox", "stretch"] = "letterbox"
    values: Value | tuple[Value, ...] | None = None
    colours: str | tuple[tuple[Value, ...], ...] | None = None
    ignore: tuple[Value | tuple[Value, ...], ...] | None = None
    scale_masks: bool = False
    mask_name: str = "*"
    channels: Literal[1, 3] = 3
    val: Fraction = 0.1
    test: Fraction = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.size) != 2:
            raise ValueError(f"expected data.size=[height,width], received {list(self.size)}")
        require_fractions(self.val, self.test)
        if self.mask_name.count("*") != 1 or "/" in self.mask_name:
            raise ValueError(
                f"expected data.mask_name='*_mask' with one * for the image's name, received {self.mask_name!r}"
            )
        self._root = Path(self.root).expanduser()
        self._recipe = self.recipe(self.channels, self.size[0], self.size[1], self.fit)
        self._masks = MaskOptions(self.values, self.colours, self.ignore)

    def spec(self) -> DataSpec:
        """Reads the names of the classes only. Raises `DataError`."""
        classes = self._classes()
        self._masks.reading(classes)  # which refuses what does not fit them
        size = (self._recipe.height, self._recipe.width)
        return DataSpec(self._recipe.channels, size, classes, frozenset({"mask"}), mask_classes=classes)

    def train_samples(self) -> int:
        """Lists the files. Raises `DataError`."""
        given = replace(self)._pairs()[2]  # what it finds is told when the images are loaded
        return len(self.parted(given, None, len(self._classes()), val=self.val, test=self.test)["train"])

    def load(self) -> dict[str, Split]:
        self.findings = Findings()
        classes = self._classes()
        reading = self._masks.reading(classes)
        images, masks, given = self._pairs()
        parts = self.parted(given, None, len(classes), val=self.val, test=self.test)

        def read(reading: Reading) -> Pairs:
            self.findings.notices += reading.notices
            return decoded_pairs(
                self._root, images, masks, self._recipe, parts, reading.meaning, scale=self.scale_masks, **self.decoding
            )

        pairs = read(reading)
        if reading.meaning is None:
            reading = decided(self._root, classes, {value: masks[row] for value, row in pairs.first().items()})
            pairs = pairs if reading.meaning is None else read(reading)
        self.findings.left_out += pairs.left_out
        self.findings.notices += [*pairs.notices, *untaught(classes, pairs.present())]
        self.findings.record(pairs.parts, *pairs.sources)
        source = digest(pairs.fingerprint, classes)
        splits = assemble(pairs.images, {"mask": pairs.masks}, source, pairs.parts, mapped=True)
        options = {"scale": self.scale_masks, **self.decoding}
        return whole_train(splits, pairs, {}, self.whole(self._recipe), reading.meaning, **options)

    def _classes(self) -> tuple[str, ...]:
        path = self._root / "classes.txt"
        if path.exists():
            names = class_names(path)
        elif self._masks.names:
            path, names = Path(str(self._masks.file)), self._masks.names
        else:
            raise DataError(
                f"expected class names, one a line, in {path}, received no such file; "
                f"type data.root=FOLDER, laid out as {_LAYOUT}"
            )
        if not 2 <= len(names) <= VOID:
            raise DataError(f"expected 2 to {VOID} class names in {path}, received {len(names)}")
        return names

    def _pairs(self) -> tuple[list[str], list[str], dict[str, Tensor]]:
        """Images and masks relative to the root, pair by pair, and the rows of each split that there is."""
        walk = Walk(self._root)
        pictures, numbers = self._by_split("images", walk), self._by_split("masks", walk)
        walk.settle(self.on_error, self.findings)
        if not pictures.get("train"):
            raise DataError(
                f"expected images in {self._root / 'images' / 'train'}, received none; lay them out as {_LAYOUT}"
            )
        self._tell_pairless(pictures, numbers)
        images: list[str] = []
        masks: list[str] = []
        given = {}
        for split, found in pictures.items():
            keys = sorted(found.keys() & numbers.get(split, {}).keys())
            given[split] = torch.arange(len(images), len(images) + len(keys))
            images += [found[key] for key in keys]
            masks += [numbers[split][key] for key in keys]
        return images, masks, given

    def _tell_pairless(self, pictures: Mapping[str, Mapping[str, str]], masks: Mapping[str, Mapping[str, str]]) -> None:
        """Masks without an image are told. Raises `DataError` for images without a mask, unless they are left out."""
        lone = [
            (found[key], f"no mask of its name in masks, for {split}")
            for split, found in pictures.items()
            for key in sorted(found.keys() - masks.get(split, {}).keys())
        ]
        surplus = [
            found[key]
            for split, found in masks.items()
            for key in sorted(found.keys() - pictures.get(split, {}).keys())
        ]
        if surplus:
            self.findings.notices.append(f"data: {len(surplus):,} masks have no image ({surplus[0]}); not used")
        if not lone:
            return
        total = sum(map(len, pictures.values()))
        if self.on_error == "raise" or len(lone) == total:
            lines = "\n".join(f"  {line}" for line in first_lines([f"{name}: {why}" for name, why in lone]))
            there = f" (there is {first_names(surplus)} without an image)" if surplus else ""
            called = _called([name for name, _ in lone], surplus, total)
            raise DataError(
                f"expected a mask of each image's name in {self._root / 'masks'}, received none for {len(lone)} of "
                f"{total}:\n{lines}\nadd or rename them{there}, as {_LAYOUT}{called}, or type data.on_error=skip to "
                "leave such images out"
            )
        self.findings.left_out += lone
        self.findings.notices.append(f"data: {len(lone):,} images have no mask, and are left out ({lone[0][0]})")

    def _by_split(self, kind: str, walk: Walk) -> dict[str, dict[str, str]]:
        """The files of each split, by path and name without the suffix. Raises `DataError` for two of one name."""
        folder = self._root / kind
        if not folder.is_dir():
            return {}
        splits = {"train": folder}
        if walk.has_folder(folder, SPLIT_NAMES, _LAYOUT):
            splits = split_folders(folder, walk.subfolders(folder, _LAYOUT), _LAYOUT, self.findings, classes=False)
        # Of two names of an image one is enough, but many images may share one mask, by links.
        found = {split: walk.images(path, once=kind == "images") for split, path in splits.items()}
        if kind == "images":
            self.findings.notices += require_one_place({(split, ""): files for split, files in found.items()})
        files: dict[str, dict[str, str]] = {}
        for split in [name for name in SPLITS if name in splits]:
            files[split] = {}
            below = splits[split].relative_to(self._root)
            before, behind = self.mask_name.split("*") if kind == "masks" else ("", "")
            for name in found[split]:
                key = _key(Path(name).relative_to(below), before, behind) or name  # which no image has
                other = files[split].setdefault(key, name)
                if other != name:
                    raise DataError(
                        f"expected one file of each name in {splits[split]}, whatever the suffix, received {other} and "
                        f"{name}; rename or remove one of them"
                    )
        return files


def _key(path: Path, before: str, behind: str) -> str | None:
    """The name of the image that a file belongs to; `None` where it is not called so."""
    name = path.stem
    if not (name.startswith(before) and name.endswith(behind)) or len(name) <= len(before) + len(behind):
        return None
    return path.with_name(name[len(before) : len(name) - len(behind)]).as_posix()


def _called(images: Sequence[str], masks: Sequence[str], total: int) -> str:
    """What to type where most images would have a mask if masks were called otherwise."""
    names = {Path(image).stem for image in images}
    for mask in masks[:_TRIED]:
        stem = Path(mask).stem
        for name in sorted((name for name in names if name in stem), key=len, reverse=True)[:_TRIED]:
            before, _, behind = stem.partition(name)
            matched = names & {key for other in masks if (key := _key(Path(Path(other).name), before, behind))}
            if 2 * len(matched) >= total:
                return f", or type data.mask_name='{before}*{behind}'"
    return ""
