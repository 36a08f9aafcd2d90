"""Images with masks, in two folder trees of equal names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cnnlab.data.cache import Store, decoded
from cnnlab.data.decode import Recipe, letterbox
from cnnlab.data.found import Findings, Walk, class_names, first_names
from cnnlab.data.layout import SPLITS, split_folders
from cnnlab.data.pixels import MAX_PIXELS, checked_range
from cnnlab.data.sources import Listing
from cnnlab.data.splits import Fraction, Limit, assemble, digest, partitioned, require_fractions
from cnnlab.errors import DataError
from cnnlab.protocols import VOID, DataSpec, Split
from cnnlab.schema import NonNegativeInt, PositiveInt

_LAYOUT = "ROOT/images/{train,val,test}/<image>, ROOT/masks/{train,val,test}/<same name>.png, ROOT/classes.txt"

_PIECE = 64
"""Masks that are renumbered at a time."""


class MaskFolder:
    """Semantic segmentation of `root/images/<split>/` with `root/masks/<split>/`.

    A mask is a greyscale or palette image whose values are class numbers, in the order of `root/classes.txt`
    (one name a line), or 255 for void. There is no label: `classes` of the spec are the mask's.

    Args:
        root: the folder.
        size: (height, width) of images and masks.
        fit: `letterbox` keeps the aspect ratio and fills with black, in masks with void; `stretch` does not.
        channels: 3 (colour) or 1 (grey).
        val, test: fractions of the training images for a split that the folder does not have.
        split_seed: seed of the split, apart from the run's.
        limit: thins the training split (see `cnnlab.data.splits`).
        on_error: whether an unreadable file ends the run or is left out.
        cache, workers: see `cnnlab.data.cache.decoded`.
        max_pixels, value_range: see `cnnlab.data.folder.ImageFolder`; masks hold numbers, and have no range.
    """

    def __init__(
        self,
        root: str,
        size: tuple[PositiveInt, ...] = (180, 240),
        fit: Literal["letterbox", "stretch"] = "letterbox",
        channels: Literal[1, 3] = 3,
        val: Fraction = 0.1,
        test: Fraction = 0.2,
        split_seed: NonNegativeInt = 0,
        limit: Limit = None,
        on_error: Literal["raise", "skip"] = "raise",
        cache: str | None = None,
        workers: NonNegativeInt | None = None,
        max_pixels: PositiveInt = MAX_PIXELS,
        value_range: tuple[float, ...] | None = None,
    ) -> None:
        if len(size) != 2:
            raise ValueError(f"expected data.size=[height,width], received {list(size)}")
        require_fractions(val, test)
        self.findings = Findings()
        self.root = Path(root).expanduser()
        self.recipe = Recipe(
            channels, size[0], size[1], fit, value_range=checked_range(value_range), max_pixels=max_pixels
        )
        self.val = val
        self.test = test
        self.split_seed = split_seed
        self.limit = limit
        self.on_error: Literal["raise", "skip"] = on_error
        self.cache = cache
        self.workers = workers

    def spec(self) -> DataSpec:
        """Reads classes.txt only. Raises `DataError`."""
        classes = self._classes()
        size = (self.recipe.height, self.recipe.width)
        return DataSpec(self.recipe.channels, size, classes, frozenset({"mask"}), mask_classes=classes)

    def load(self) -> dict[str, Split]:
        self.findings = Findings()
        classes = self._classes()
        images, masks, given = self._pairs()
        parts = partitioned(
            given,
            None,
            len(classes),
            val=self.val,
            test=self.test,
            limit=self.limit,
            imbalance=None,
            seed=self.split_seed,
        )
        pairs = decoded_pairs(
            self.root,
            images,
            masks,
            self.recipe,
            parts,
            {number: number for number in range(len(classes))},
            on_error=self.on_error,
            cache=self.cache,
            workers=self.workers,
        )
        present = frozenset[int]().union(*pairs.present.values())
        if len(classes) == 2 and present == {0, VOID}:
            raise DataError(
                f"expected class numbers 0 and 1 in the masks of {self.root}, received 0 and {VOID} alone, and {VOID} "
                f"is void: no pixel would be `{classes[1]}`; save them with 1 in the place of {VOID}"
            )
        self.findings.left_out += pairs.left_out
        self.findings.notices += _untaught(classes, pairs.present)
        source = digest(pairs.fingerprint, classes)
        return assemble(pairs.images, {"mask": pairs.masks}, source, pairs.parts, mapped=True)

    def _classes(self) -> tuple[str, ...]:
        path = self.root / "classes.txt"
        if not path.exists():
            raise DataError(
                f"expected class names, one a line, in {path}, received no such file; "
                f"type data.root=FOLDER, laid out as {_LAYOUT}"
            )
        names = class_names(path)
        if not 2 <= len(names) <= VOID:
            raise DataError(f"expected 2 to {VOID} class names in {path}, received {len(names)}")
        return names

    def _pairs(self) -> tuple[list[str], list[str], dict[str, Tensor]]:
        """Images and masks relative to the root, pair by pair, and the rows of each split that there is."""
        images: list[str] = []
        masks: list[str] = []
        given = {}
        walk = Walk(self.root)
        all_pictures, all_numbers = self._by_split("images", walk), self._by_split("masks", walk)
        walk.settle(self.on_error, self.findings)
        gone = {_key(name) for name, _ in walk.broken}
        for split in SPLITS:
            pictures, numbers = all_pictures.get(split, {}), all_numbers.get(split, {})
            for key in gone:
                pictures.pop(key, None)
                numbers.pop(key, None)
            single = sorted(set(pictures) ^ set(numbers))
            if single:
                raise DataError(
                    f"expected an image and a mask of every name in {self.root}, {split}, received only one "
                    f"of them for {len(single)} names, the first {single[0]}; lay them out as {_LAYOUT}"
                )
            if pictures:
                given[split] = torch.arange(len(images), len(images) + len(pictures))
                images += [pictures[name] for name in sorted(pictures)]
                masks += [numbers[name] for name in sorted(pictures)]
        if "train" not in given:
            raise DataError(
                f"expected images in {self.root / 'images' / 'train'}, received none; lay them out as {_LAYOUT}"
            )
        return images, masks, given

    def _by_split(self, kind: str, walk: Walk) -> dict[str, dict[str, str]]:
        """The files of each split, by path and name without the suffix. Raises `DataError` for two of one name."""
        folder = self.root / kind
        if not folder.is_dir():
            return {}
        splits = split_folders(folder, walk.subfolders(folder, _LAYOUT), _LAYOUT, self.findings)
        files: dict[str, dict[str, str]] = {}
        for split, path in splits.items():
            files[split] = {}
            for name in walk.images(path, once=False):  # many images may share one mask, by links
                other = files[split].setdefault(_key(name), name)
                if other != name:
                    raise DataError(
                        f"expected one file of each name in {path}, whatever the suffix, received {other} and {name}; "
                        "rename or remove one of them"
                    )
        return files


def _key(name: str) -> str:
    """`images/train/sub/a.jpg` -> `sub/a`, which is the mask's, too."""
    below = name.split("/", 2)[-1]
    return below[: -len(Path(below).suffix)] if Path(below).suffix else below


def _untaught(classes: Sequence[str], present: Mapping[str, frozenset[int]]) -> list[str]:
    """Notices of classes that no training pixel teaches, and of splits that measure nothing.

    Raises `DataError` where there is no target at all.
    """
    missing = [name for number, name in enumerate(classes) if number not in present["train"]]
    if len(missing) == len(classes):
        raise DataError(f"expected class numbers in the training masks, received {VOID} (void) alone; mend the masks")
    notices = []
    if missing:
        notices.append(
            f"data: no pixel of the training masks is {first_names(missing)}, which the network cannot learn; "
            f"{VOID} in a mask is void and counts nowhere"
        )
    return notices + [
        f"data: {split} has no pixel that is not void ({VOID}); its metrics are not defined, and choose no checkpoint"
        for split, found in present.items()
        if found <= {VOID}
    ]


@dataclass
class Pairs:
    """`images` (M, C, H, W) and `masks` (M, H, W), uint8; `parts`: the rows of each split whose files could be read;
    `fingerprint` of the pixels."""

    images: Tensor
    masks: Tensor
    parts: dict[str, Tensor]
    fingerprint: str
    present: dict[str, frozenset[int]]
    """The numbers in each split's files."""
    left_out: list[tuple[str, str]]
    """The files that could not be read, with the reason."""


def decoded_pairs(
    root: Path,
    images: Sequence[str],
    masks: Sequence[str],
    recipe: Recipe,
    parts: Mapping[str, Tensor],
    numbers: Mapping[int, int],
    *,
    on_error: Literal["raise", "skip"],
    cache: str | None,
    workers: int | None,
) -> Pairs:
    """Images and their masks (files relative to `root`, pair by pair), decoded alike.

    Args:
        recipe: of the images.
        parts: rows by split.
        numbers: the class, or `VOID`, that each number in the files stands for; `VOID` always is itself.
        on_error, cache, workers: see `cnnlab.data.cache.decoded`.

    Raises:
        DataError: an unreadable file, a mask of another size than its image, or an unknown number in it.
    """
    mask_recipe = replace(recipe, channels=1, mask=True)
    options: dict[str, Any] = {"on_error": on_error, "cache": cache, "workers": workers}
    picture_store = decoded(Listing(root, images), recipe, **options)
    mask_store = decoded(Listing(root, masks), mask_recipe, **options)
    parts = mask_store.readable(picture_store.readable(parts))
    present = {}
    for split, rows in parts.items():
        _require_fit(rows, picture_store.sizes, mask_store.sizes, masks)
        present[split] = _numbers_in(rows, mask_store, recipe, numbers, masks)
    left_out = [(images[row], why) for row, why in picture_store.failures]
    left_out += [(masks[row], why) for row, why in mask_store.failures]
    fingerprint = digest(picture_store.fingerprint, mask_store.fingerprint)
    classes = _renumbered(mask_store.images[:, 0], numbers)
    return Pairs(picture_store.images, classes, parts, fingerprint, present, left_out)


def _renumbered(masks: Tensor, numbers: Mapping[int, int]) -> Tensor:
    """The masks (M, H, W) with each number's class in its place; as they are where that changes nothing."""
    if all(number == meant for number, meant in numbers.items()):
        return masks
    table = torch.full((256,), VOID, dtype=torch.uint8)
    for number, meant in numbers.items():
        table[number] = meant
    classes = torch.empty(masks.shape, dtype=torch.uint8)
    for into, piece in zip(classes.split(_PIECE), masks.split(_PIECE)):  # an index takes eight bytes a pixel
        into.copy_(table[piece.long()])
    return classes


def _require_fit(rows: Tensor, image_sizes: Tensor, mask_sizes: Tensor, masks: Sequence[str]) -> None:
    """Raises `DataError` where a mask has another size than its image."""
    other = rows[(image_sizes[rows] != mask_sizes[rows]).any(1)].tolist()
    if other:
        first = other[0]
        raise DataError(
            f"expected masks of their images' (height, width), received {len(other)} of another; "
            f"{masks[first]} has {tuple(mask_sizes[first].tolist())}, "
            f"its image {tuple(image_sizes[first].tolist())}; repair them"
        )


def _numbers_in(
    rows: Tensor, store: Store, recipe: Recipe, numbers: Mapping[int, int], files: Sequence[str]
) -> frozenset[int]:
    """The numbers in the masks, but for what a letterbox adds. Raises `DataError` for one that stands for nothing."""
    known = np.zeros(256, bool)
    known[[*numbers, VOID]] = True
    present = np.zeros(256, bool)
    masks = store.images.numpy()
    for row in rows.tolist():
        mask = masks[row, 0]
        if recipe.fit == "letterbox":
            height, width = store.sizes[row].tolist()
            left, top, width, height = letterbox(height, width, recipe.height, recipe.width)
            mask = mask[top : top + height, left : left + width]
        found = np.bincount(mask.ravel(), minlength=256) > 0
        if (found & ~known).any():
            raise DataError(
                f"expected class numbers {min(numbers)}..{max(numbers)} or {VOID} (void) in the masks, received "
                f"{np.flatnonzero(found & ~known)[0]} in {files[row]}; repair the mask, or complete the list of classes"
            )
        present |= found
    return frozenset(np.flatnonzero(present).tolist())
