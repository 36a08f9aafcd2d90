"""Any folder of images, one subfolder a class."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cnnlab.data.cache import Listing, cache_folder, decoded, is_cached, unreadable, without
from cnnlab.data.decode import Recipe
from cnnlab.data.formats import EXTENSIONS
from cnnlab.data.splits import Fraction, Imbalance, Limit, assemble, digest, partitioned, require_fractions
from cnnlab.data.stream import StreamSplit, streamed, streams
from cnnlab.errors import DataError
from cnnlab.protocols import DataSpec, Split
from cnnlab.schema import Loading, NonNegativeInt, PositiveInt

_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_LAYOUT = "ROOT/<class>/<image> or ROOT/{train,val,test}/<class>/<image>"
_DEFAULT_SIZE = 64
_LARGEST_OWN_SIZE = 256
_SHOWN = 5
"""Names in a message before it counts the rest."""


class ImageFolder:
    """Classification of the images in `root/<class>/` or `root/{train,val,test}/<class>/`.

    Images may have any size, format and mode that Pillow reads; subfolders of a class are searched too.
    Training and evaluation get the same pixels: the shorter side resized to `resize` (bilinear, antialiased),
    the middle `size` x `size` cut out; augmentation works on that. Images are decoded once, into a cache, or
    anew each epoch (`loading.path`), to the same pixels.

    Args:
        root: the folder.
        size: side of the images; `None` takes their own where a few of them are square and alike (at
            most 256), else 64.
        resize: length of the shorter side before the crop; `None` takes `size`.
        channels: 3 (colour) or 1 (grey).
        val, test: fractions of the training images for a split that the folder does not have, by class.
        val_as_test: makes the folder's val the test split, and takes val from train: where the published test
            labels are secret and val is what is reported (ImageNet).
        split_seed: seed of the split, apart from the run's.
        limit, imbalance: thin the training split (see `cnnlab.data.splits`). With `limit`, only the images
            that are used are decoded.
        on_error: whether an unreadable file ends the run or is left out. A stream meets it when its batch is
            due; to leave it out, all files are tried first, once.
        cache: folder of the decoded images; `None` takes `$CNNLAB_CACHE` or `~/.cache/cnnlab`.
        workers: processes that decode into the cache; `None` starts one a core where it pays, 0 none.
        loading: the config's section; `None` takes its defaults.
    """

    def __init__(
        self,
        root: str,
        size: PositiveInt | None = None,
        resize: PositiveInt | None = None,
        channels: Literal[1, 3] = 3,
        val: Fraction = 0.1,
        test: Fraction = 0.2,
        val_as_test: bool = False,
        split_seed: NonNegativeInt = 0,
        limit: Limit = None,
        imbalance: Imbalance = None,
        on_error: Literal["raise", "skip"] = "raise",
        cache: str | None = None,
        workers: NonNegativeInt | None = None,
        loading: Loading | None = None,
    ) -> None:
        if resize is not None and size is not None and resize < size:
            raise ValueError(f"expected data.resize >= data.size, received {resize} < {size}; type data.resize=null")
        require_fractions(val, test)
        self.root = Path(root).expanduser()
        self.channels = channels
        self.size = size
        self.resize = resize
        self.val = val
        self.test = test
        self.val_as_test = val_as_test
        self.split_seed = split_seed
        self.limit = limit
        self.imbalance = imbalance
        self.on_error: Literal["raise", "skip"] = on_error
        self.cache = cache
        self.workers = workers
        self.loading = loading or Loading()

    def spec(self) -> DataSpec:
        """Lists folders, and reads the headers of a few images where no size is given. Raises `DataError`."""
        layout = self._layout()
        recipe = self._recipe(layout)
        return DataSpec(recipe.channels, (recipe.height, recipe.width), self._classes(layout))

    def _recipe(self, layout: Mapping[str, Mapping[str, Path]]) -> Recipe:
        size = _own_size(layout["train"]) if self.size is None else self.size
        resize = size if self.resize is None else self.resize
        if resize < size:
            raise ValueError(
                f"expected data.resize >= the images' size, received {resize} < {size}; type data.resize=null"
            )
        return Recipe(self.channels, size, size, "crop", resize)

    def load(self) -> dict[str, Split]:
        layout = self._layout()
        classes = self._classes(layout)
        files, labels, given = self._listed(layout, classes)
        parts = partitioned(
            given,
            labels,
            len(classes),
            val=self.val,
            test=self.test,
            limit=self.limit,
            imbalance=self.imbalance,
            seed=self.split_seed,
        )
        if self.limit is not None:
            used = torch.cat([*parts.values()]).sort().values
            files, labels = [files[row] for row in used.tolist()], labels[used]
            parts = {name: torch.searchsorted(used, rows) for name, rows in parts.items()}
        recipe, listing = self._recipe(layout), Listing(self.root, files)
        needed = len(files) * recipe.channels * recipe.height * recipe.width
        cached = is_cached(listing, recipe, self.cache)
        if streams(self.loading, needed, cache_folder(self.cache), cached=cached):
            if self.on_error == "skip":
                parts = without(unreadable(listing, recipe, cache=self.cache, workers=self.workers), parts)
            return streamed(StreamSplit, listing, recipe, labels, parts, self.loading)
        store = decoded(listing, recipe, on_error=self.on_error, cache=self.cache, workers=self.workers)
        source = digest(store.fingerprint, labels)
        return assemble(store.images, {"label": labels}, source, store.readable(parts), mapped=True)

    def _layout(self) -> dict[str, dict[str, Path]]:
        """Class folders by split; a folder without splits has `train` only."""
        found = subfolders(self.root, _LAYOUT)
        splits = {_SPLIT_NAMES[name.lower()]: path for name, path in found.items() if name.lower() in _SPLIT_NAMES}
        if "train" not in splits:
            if splits and len(splits) == len(found):
                raise DataError(
                    f"expected a folder `train` beside {', '.join(sorted(found))} in {self.root}; "
                    f"lay the images out as {_LAYOUT}"
                )
            return {"train": found}
        if self.val_as_test:
            if "val" not in splits:
                raise DataError(
                    f"expected a folder `val` in {self.root} for data.val_as_test=true, "
                    f"received {', '.join(sorted(found))}; type data.val_as_test=false"
                )
            splits["test"] = splits.pop("val")
        return {name: subfolders(path, _LAYOUT) for name, path in splits.items()}

    def _classes(self, layout: Mapping[str, Mapping[str, Path]]) -> tuple[str, ...]:
        classes = tuple(sorted(layout["train"]))
        for split, folders in layout.items():
            unknown = sorted(set(folders) - set(classes))
            if unknown:
                raise DataError(
                    f"expected the classes of train ({_first(classes)}) in {split} of {self.root}, "
                    f"received {_first(unknown)} besides; rename or remove those folders"
                )
        if len(classes) == 1:
            folder = layout["train"][classes[0]].parent
            raise DataError(
                f"expected two classes at least in {folder}, received {classes[0]} alone; "
                f"lay the images out as {_LAYOUT}"
            )
        return classes

    def _listed(
        self, layout: Mapping[str, Mapping[str, Path]], classes: tuple[str, ...]
    ) -> tuple[list[str], Tensor, dict[str, Tensor]]:
        """Files relative to the root, their labels (M,), and the rows of each split that the folder has."""
        files: list[str] = []
        labels: list[int] = []
        given = {}
        for split, folders in layout.items():
            start = len(files)
            for name in sorted(folders):
                found = images_in(folders[name], self.root)
                if not found and split == "train":
                    raise DataError(
                        f"expected images in every class folder, received none in {folders[name]}; "
                        f"put some there ({', '.join(sorted(EXTENSIONS))}) or remove the folder"
                    )
                files += found
                labels += [classes.index(name)] * len(found)
            given[split] = torch.arange(start, len(files))
        return files, torch.tensor(labels, dtype=torch.int64), given


def _own_size(classes: Mapping[str, Path]) -> int:
    """The side that the first image of each of the first classes has, or `_DEFAULT_SIZE`."""
    from PIL import Image

    sizes = set()
    for name in sorted(classes)[:_SHOWN]:
        for path in sorted(classes[name].iterdir()):
            if path.suffix.lower() in EXTENSIONS and not path.name.startswith("."):
                try:
                    with Image.open(path) as image:
                        sizes.add(image.size)
                except OSError:
                    return _DEFAULT_SIZE  # what is unreadable is reported when the images are decoded
                break
    if len(sizes) != 1:
        return _DEFAULT_SIZE
    width, height = sizes.pop()
    return width if width == height <= _LARGEST_OWN_SIZE else _DEFAULT_SIZE


def subfolders(folder: Path, layout: str) -> dict[str, Path]:
    """The visible folders in `folder`, by name. Raises `DataError` where there is none."""
    if not folder.is_dir():
        what = "a file" if folder.exists() else "nothing"
        raise DataError(f"expected a folder at {folder}, received {what}; type data.root=FOLDER, laid out as {layout}")
    with os.scandir(folder) as entries:
        found = {
            entry.name: folder / entry.name
            for entry in entries
            if entry.is_dir() and not entry.name.startswith((".", "__MACOSX"))
        }
    if not found:
        loose = sum(path.suffix.lower() in EXTENSIONS for path in folder.iterdir())
        received = f"{loose} image{'s' if loose > 1 else ''} in none" if loose else "none"
        raise DataError(f"expected one folder a class in {folder}, received {received}; lay the images out as {layout}")
    return found


def images_in(folder: Path, root: Path) -> list[str]:
    """The image files below `folder`, relative to `root`, sorted; other files are passed over."""
    found = []
    for base, _, names in os.walk(folder, followlinks=True):
        relative = os.path.relpath(base, root)
        found += [
            f"{relative}/{name}"
            for name in names
            if os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")  # noqa: PTH122
        ]
    return sorted(found)


def _first(names: Sequence[str]) -> str:
    """The first few names, and how many there are."""
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown}, ... ({len(names)} in all)"
