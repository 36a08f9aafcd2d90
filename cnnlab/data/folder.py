"""Any folder of images, one subfolder a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from cnnlab.data.options import Decoding, LabelledCut
from cnnlab.data.places import cache_folder
from cnnlab.data.sources import Listing
from cnnlab.data.splits import Fraction, assemble, digest, require_fractions
from cnnlab.data.stream import StreamSplit, streamed, streams
from cnnlab.data.whole import as_seen, only_used
from cnnlab.errors import DataError
from cnnlab.protocols import DataSpec, Split
from cnnlab.schema import DataPath, PositiveInt

_LAYOUT = "ROOT/<class>/<image> or ROOT/{train,val,test}/<class>/<image>"


@dataclass(frozen=True)
class _Found:
    """Files relative to the root, their labels (M,), and the rows of each split that the folder has."""

    files: list[str]
    labels: Tensor
    given: dict[str, Tensor]


@dataclass(frozen=True)
class _Piece:
    """Splits that are stored alike: their files, labels (M,), rows and recipe."""

    listing: Listing
    labels: Tensor
    parts: dict[str, Tensor]
    recipe: Recipe

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded images."""
        return len(self.listing) * self.recipe.channels * self.recipe.height * self.recipe.width


@dataclass(eq=False)
class ImageFolder(Decoding, LabelledCut):
    """Classification of the images in `root/<class>/` or `root/{train,val,test}/<class>/`.

    Images may have any size, format and mode that Pillow decodes by itself; subfolders of a class are searched too, and
    links are followed, each file once. What is hidden is not read; what is found and not used is told in `findings`.
    The shorter side is resized to `resize` (bilinear, antialiased), and the middle `size` x `size` cut out.
    Augmentation works on that, or on the whole photo, where it crops (`stored`). Images are decoded once, into a cache,
    or anew each epoch (`loading.path`), to the same pixels.

    Args:
        root: the folder.
        size: side of the images; `None` takes their own where all of them are square and alike (at most 256), by
            their headers, else 64.
        resize: length of the shorter side before the crop; `None` takes `size`.
        channels: 3 (colour) or 1 (grey).
        val, test: fractions of the training images for a split that the folder does not have, by class.
        val_as_test: makes the folder's val the test split, and takes val from train: where the published test
            labels are secret and val is what is reported (ImageNet).
        on_error: whether an unreadable file ends the run or is left out. A stream meets it when its batch is
            due; to leave it out, all files are tried first, once.
    """

    streams = True

    root: str
    size: PositiveInt | None = None
    resize: PositiveInt | None = None
    channels: Literal[1, 3] = 3
    val: Fraction = 0.1
    test: Fraction = 0.2
    val_as_test: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resize is not None and self.size is not None and self.resize < self.size:
            raise ValueError(
                f"expected data.resize >= data.size, received {self.resize} < {self.size}; type data.resize=null"
            )
        require_fractions(self.val, self.test)
        self._root = Path(self.root).expanduser()

    def spec(self) -> DataSpec:
        """Lists folders and, where no size is given, reads the images' headers. Raises `DataError`."""
        walk, ignored = Walk(self._root), Findings()
        layout = self._layout(walk, ignored)
        size = self.size
        if size is None:
            found = self._listed(layout, walk, ignored)
            size = own_size(Listing(self._root, found.files), self.cache).taken()
        recipe = self._recipe(size)
        return DataSpec(recipe.channels, (recipe.height, recipe.width), tuple(sorted(layout["train"])))

    def _recipe(self, size: int) -> Recipe:
        resize = size if self.resize is None else self.resize
        if resize < size:
            raise ValueError(
                f"expected data.resize >= the images' size, received {resize} < {size}; type data.resize=null"
            )
        return self.recipe(self.channels, size, size, "crop", resize)

    def train_samples(self) -> int:
        """Lists the files. Raises `DataError`."""
        walk, ignored = Walk(self._root), Findings()
        layout = self._layout(walk, ignored)
        found = self._listed(layout, walk, ignored)
        return len(self.parted(found.given, found.labels, len(layout["train"]), val=self.val, test=self.test)["train"])

    def load(self) -> dict[str, Split]:
        self.findings = Findings()
        walk = Walk(self._root)
        layout = self._layout(walk, self.findings)
        classes = sorted(layout["train"])
        found = self._listed(layout, walk, self.findings)
        files, labels, given = found.files, found.labels, found.given
        size, beyond = self.size, True
        if size is None:
            own = own_size(Listing(self._root, files), self.cache)
            size, beyond = own.taken(), own.side is None
            self.findings.notices += own.notices()
        recipe = self._recipe(size)
        parts = self.parted(given, labels, len(classes), val=self.val, test=self.test)
        # Nothing lies beyond images that are taken as they are.
        stored = self.whole(recipe) if beyond or self.stored is not None else None
        used, parts = only_used(parts) if self.limit is not None else (torch.arange(len(files)), parts)
        files, labels = [files[row] for row in used.tolist()], labels[used]
        pieces = self._pieces(files, labels, parts, recipe, stored)
        needed = sum(piece.nbytes for piece in pieces)
        cached = all(is_cached(piece.listing, piece.recipe, self.cache) for piece in pieces)
        if streams(self._loading, needed, cache_folder(self.cache), cached=cached):
            return self._streamed(files, recipe, stored, labels, parts)
        splits: dict[str, Split] = {}
        left_out = len(self.findings.left_out)
        try:
            for piece in pieces:
                splits |= self._decoded(piece, recipe)
        except UnwritableCache:
            if self._loading.path is not DataPath.auto:
                raise
            del self.findings.left_out[left_out:]
            return self._streamed(files, recipe, stored, labels, parts)
        return splits

    def _pieces(
        self, files: Sequence[str], labels: Tensor, parts: Mapping[str, Tensor], seen: Recipe, stored: Recipe | None
    ) -> list[_Piece]:
        pieces = []
        for used, rows, recipe in self.by_recipe(parts, len(files), seen, stored):
            listing = Listing(self._root, [files[row] for row in used.tolist()])
            pieces.append(_Piece(listing, labels[used], rows, recipe))
        return pieces

    def _decoded(self, piece: _Piece, seen: Recipe) -> dict[str, Split]:
        store = decoded(piece.listing, piece.recipe, **self.decoding)
        self.findings.leave_out(piece.listing, store.failures)
        parts = store.readable(piece.parts)
        self.findings.record(parts, piece.listing)
        source, targets = digest(store.fingerprint, piece.labels), {"label": piece.labels}
        return assemble(store.images, *as_seen(targets, source, store.sizes, seen, piece.recipe), parts, mapped=True)

    def _streamed(
        self, files: Sequence[str], seen: Recipe, stored: Recipe | None, labels: Tensor, parts: dict[str, Tensor]
    ) -> dict[str, Split]:
        listing = Listing(self._root, files)
        if self.on_error == "skip":
            failures = unreadable(
                listing, seen, cache=self.cache, workers=self.workers, patience=self._loading.patience
            )
            self.findings.leave_out(listing, failures)
            parts = without(failures, parts)
        self.findings.record(parts, listing)
        return streamed(StreamSplit, listing, seen, labels, parts, self._loading, stored)

    def _layout(self, walk: Walk, findings: Findings) -> Layout:
        return class_folders(self._root, walk, _LAYOUT, self.val_as_test, findings)

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
                findings.notices.append(f"data: no image of {first_names(lacking)} in {split} of {self._root}")
        return _Found(files, torch.tensor(labels, dtype=torch.int64), given)
