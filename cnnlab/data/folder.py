"""Any folder of images, one subfolder a class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cnnlab.data.cache import UnwritableCache, decoded, is_cached, unreadable, without
from cnnlab.data.decode import Recipe
from cnnlab.data.found import Findings, Walk, first_names, require_one_place
from cnnlab.data.headers import own_size
from cnnlab.data.layout import Layout, class_folders
from cnnlab.data.pixels import MAX_PIXELS, checked_range
from cnnlab.data.places import cache_folder
from cnnlab.data.sources import Listing
from cnnlab.data.splits import Fraction, Imbalance, Limit, assemble, digest, partitioned, require_fractions
from cnnlab.data.stream import StreamSplit, streamed, streams
from cnnlab.errors import DataError
from cnnlab.protocols import DataSpec, Split
from cnnlab.schema import DataPath, Loading, NonNegativeInt, PositiveInt

_LAYOUT = "ROOT/<class>/<image> or ROOT/{train,val,test}/<class>/<image>"


@dataclass(frozen=True)
class _Found:
    """Files relative to the root, their labels (M,), and the rows of each split that the folder has."""

    files: list[str]
    labels: Tensor
    given: dict[str, Tensor]


class ImageFolder:
    """Classification of the images in `root/<class>/` or `root/{train,val,test}/<class>/`.

    Images may have any size, format and mode that Pillow decodes by itself; subfolders of a class are searched too, and
    links are followed, each file once. What is hidden is not read; what is found and not used is told in `findings`.
    Training and evaluation get the same pixels: the shorter side resized to `resize` (bilinear, antialiased),
    the middle `size` x `size` cut out; augmentation works on that. Images are decoded once, into a cache, or
    anew each epoch (`loading.path`), to the same pixels.

    Args:
        root: the folder.
        size: side of the images; `None` takes their own where all of them are square and alike (at most 256), by
            their headers, else 64.
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
        max_pixels: that an image may have, fewer where decoding its format takes more than 4 bytes of memory a pixel;
            a JPEG or JPEG 2000 beyond it is decoded at half its size where that fits (see `cnnlab.data.bounds`).
        value_range: what becomes black and white of an image of more than 8 bits a pixel; `None`: 0 and 65,535.
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
        max_pixels: PositiveInt = MAX_PIXELS,
        value_range: tuple[float, ...] | None = None,
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
        self.max_pixels = max_pixels
        self.value_range = checked_range(value_range)
        self.loading = loading or Loading()
        self.findings = Findings()

    def spec(self) -> DataSpec:
        """Lists folders and, where no size is given, reads the images' headers. Raises `DataError`."""
        walk, ignored = Walk(self.root), Findings()
        layout = self._layout(walk, ignored)
        size = self.size
        if size is None:
            found = self._listed(layout, walk, ignored)
            size = own_size(Listing(self.root, found.files), self.cache).taken()
        recipe = self._recipe(size)
        return DataSpec(recipe.channels, (recipe.height, recipe.width), tuple(sorted(layout["train"])))

    def _recipe(self, size: int) -> Recipe:
        resize = size if self.resize is None else self.resize
        if resize < size:
            raise ValueError(
                f"expected data.resize >= the images' size, received {resize} < {size}; type data.resize=null"
            )
        return Recipe(
            self.channels, size, size, "crop", resize, value_range=self.value_range, max_pixels=self.max_pixels
        )

    def load(self) -> dict[str, Split]:
        self.findings = Findings()
        walk = Walk(self.root)
        layout = self._layout(walk, self.findings)
        classes = sorted(layout["train"])
        found = self._listed(layout, walk, self.findings)
        files, labels, given = found.files, found.labels, found.given
        size = self.size
        if size is None:
            own = own_size(Listing(self.root, files), self.cache)
            size = own.taken()
            self.findings.notices += own.notices()
        recipe = self._recipe(size)
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
        listing = Listing(self.root, files)
        needed = len(files) * recipe.channels * recipe.height * recipe.width
        cached = is_cached(listing, recipe, self.cache)
        if streams(self.loading, needed, cache_folder(self.cache), cached=cached):
            return self._streamed(listing, recipe, labels, parts)
        try:
            store = decoded(
                listing,
                recipe,
                on_error=self.on_error,
                cache=self.cache,
                workers=self.workers,
                patience=self.loading.patience,
            )
        except UnwritableCache:
            if self.loading.path is not DataPath.auto:
                raise
            return self._streamed(listing, recipe, labels, parts)
        self.findings.leave_out(listing, store.failures)
        parts = store.readable(parts)
        self.findings.record(parts, listing)
        source = digest(store.fingerprint, labels)
        return assemble(store.images, {"label": labels}, source, parts, mapped=True)

    def _streamed(self, listing: Listing, recipe: Recipe, labels: Tensor, parts: dict[str, Tensor]) -> dict[str, Split]:
        if self.on_error == "skip":
            failures = unreadable(
                listing, recipe, cache=self.cache, workers=self.workers, patience=self.loading.patience
            )
            self.findings.leave_out(listing, failures)
            parts = without(failures, parts)
        self.findings.record(parts, listing)
        return streamed(StreamSplit, listing, recipe, labels, parts, self.loading)

    def _layout(self, walk: Walk, findings: Findings) -> Layout:
        return class_folders(self.root, walk, _LAYOUT, self.val_as_test, findings)

    def _listed(self, layout: Layout, walk: Walk, findings: Findings) -> _Found:
        """Raises `DataError` where a class has no images, or one image two classes."""
        classes = sorted(layout["train"])
        places = {
            (split, name): walk.images(folders[name]) for split, folders in layout.items() for name in sorted(folders)
        }
        walk.settle(self.on_error, findings)
        for (split, name), found in places.items():
            if not found and split == "train":
                raise DataError(
                    f"expected images in every class folder, received none in {layout[split][name]}; put some there "
                    "(.jpg, .png, or what else Pillow reads) or remove the folder"
                )
        findings.notices += require_one_place(places)
        files: list[str] = []
        labels: list[int] = []
        given = {}
        for split in layout:
            start = len(files)
            for label, name in enumerate(classes):
                found = places.get((split, name), {})
                files += found
                labels += [label] * len(found)
            given[split] = torch.arange(start, len(files))
            lacking = [name for name in classes if not places.get((split, name))]
            if lacking and len(files) > start:
                findings.notices.append(f"data: no image of {first_names(lacking)} in {split} of {self.root}")
        return _Found(files, torch.tensor(labels, dtype=torch.int64), given)
