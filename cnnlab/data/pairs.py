"""Images and their masks, decoded alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cnnlab.data.cache import Store, decoded, without
from cnnlab.data.decode import Recipe, letterbox
from cnnlab.data.entries import sealed, unsealed
from cnnlab.data.found import first_lines, first_names
from cnnlab.data.mask_pixels import Meaning
from cnnlab.data.places import cache_folder
from cnnlab.data.sources import FittedListing, Listing
from cnnlab.data.splits import assemble, digest
from cnnlab.data.whole import as_seen
from cnnlab.errors import DataError
from cnnlab.protocols import VOID, Split
from cnnlab.runs.folder import write_atomically


@dataclass
class Pairs:
    """`images` (M, C, H, W) and `masks` (M, H, W), uint8, mapped; `parts`: the rows of each split whose files could be
    read; `fingerprint` of the pixels; `left_out`: the files that could not be read, with the reason."""

    images: Tensor
    masks: Tensor
    parts: dict[str, Tensor]
    fingerprint: str
    left_out: list[tuple[str, str]]
    sources: tuple[Listing, Listing]
    """The images' files and the masks'."""
    notices: list[str]
    """Of masks that have another size than their images."""
    _inside: _Inside

    @property
    def recipe(self) -> Recipe:
        """Of the images."""
        return self._inside.recipe

    @property
    def sizes(self) -> Tensor:
        """(M, 2) height and width of each image's file; (0, 0) of a pair that cannot be used."""
        return self._inside.sizes

    def first(self) -> dict[int, int]:
        """The values that occur in the masks, each with the first row that has it."""
        found = np.flatnonzero(self._inside.values.any(0)).tolist()
        return {value: int(self._inside.values[:, value].argmax()) for value in found}

    def present(self) -> dict[str, frozenset[int]]:
        """The values that occur in each split's masks, void among them."""
        values = self._inside.values
        return {
            name: frozenset(np.flatnonzero(values[rows.numpy()].any(0)).tolist()) for name, rows in self.parts.items()
        }


@dataclass
class _Inside:
    """The masks without what a letterbox adds, at these (height, width) of their own; (0, 0) for none of it."""

    masks: Tensor
    sizes: Tensor
    recipe: Recipe
    known: Path
    """Where the cache remembers the values: of 100,000 masks of 512 x 512 they take a minute to find."""

    @cached_property
    def values(self) -> np.ndarray[Any, Any]:
        """(M, 256) bool: which values each mask has; none, of one that could not be read."""
        try:
            packed = np.frombuffer(bytes.fromhex(unsealed(self.known)), np.uint8).reshape(len(self.masks), 32)
        except (OSError, ValueError, TypeError):
            packed = np.packbits(self._found(), axis=1)
            with suppress(OSError):  # they are looked for again the next time
                write_atomically(self.known, sealed(packed.tobytes().hex()))
        return np.unpackbits(packed, axis=1).astype(bool)

    def _found(self) -> np.ndarray[Any, Any]:
        found = np.zeros((len(self.masks), 256), bool)
        masks = self.masks.numpy()
        for row, (height, width) in enumerate(self.sizes.tolist()):
            mask = masks[row]
            if self.recipe.fit == "letterbox" and height and width:
                left, top, across, down = letterbox(height, width, self.recipe.height, self.recipe.width)
                mask = mask[top : top + down, left : left + across]
            if height:
                found[row] = np.bincount(mask.ravel(), minlength=256) > 0
        return found


def decoded_pairs(
    root: Path,
    images: Sequence[str],
    masks: Sequence[str],
    recipe: Recipe,
    parts: Mapping[str, Tensor],
    meaning: Meaning | None,
    *,
    scale: bool = False,
    on_error: Literal["raise", "skip"],
    cache: str | None,
    workers: int | None,
    patience: float | None,
) -> Pairs:
    """Images and their masks (files relative to `root`, pair by pair).

    Args:
        recipe: of the images.
        parts: rows by split.
        meaning: the class, or `VOID`, that each value or colour in a mask's file stands for; `None` takes its values.
        scale: whether a mask of another size than its image is scaled to it, rather than refused.
        on_error, cache, workers, patience: see `cnnlab.data.cache.decoded`.

    Raises:
        DataError: an unreadable file, a mask of another size than its image, or with what has no meaning.
    """
    options: dict[str, Any] = {"on_error": on_error, "cache": cache, "workers": workers, "patience": patience}
    pictured = Listing(root, images)
    pictures = decoded(pictured, recipe, **options)
    listing = FittedListing(root, masks, pictures.sizes) if scale else Listing(root, masks)
    mask_recipe = replace(recipe, channels=1, mask=True, value_range=None, meaning=meaning)
    numbers = decoded(listing, mask_recipe, **options)
    parts = numbers.readable(pictures.readable(parts))
    left_out = [(images[row], why) for row, why in pictures.failures]
    left_out += [(masks[row], why) for row, why in numbers.failures]
    misfits, scaled = _of_another_size(parts, pictures, numbers, scale)
    unfit = [(masks[row], why) for row, why in misfits]
    if unfit and on_error == "raise":
        lines = "\n".join(f"  {line}" for line in first_lines([f"{name}: {why}" for name, why in unfit]))
        raise DataError(
            f"expected masks of their images' size, received {len(unfit)} of another:\n{lines}\nrepair them, or type "
            "data.on_error=skip to leave them out"
        )
    readable = (pictures.sizes > 0).all(1) & (numbers.sizes > 0).all(1)
    if not scale:  # what takes another place than its image is not looked into
        readable &= (pictures.sizes == numbers.sizes).all(1)
    sizes = pictures.sizes * readable[:, None]
    known = cache_folder(cache) / f"{digest(listing.key(mask_recipe), sizes)}.values.json"
    inside = _Inside(numbers.images[:, 0], sizes, recipe, known)
    return Pairs(
        pictures.images,
        numbers.images[:, 0],
        without(misfits, parts),
        digest(pictures.fingerprint, numbers.fingerprint),
        left_out + unfit,
        (pictured, listing),
        _notices(unfit, [masks[row] for row in scaled]),
        inside,
    )


def whole_train(
    splits: Mapping[str, Split],
    pairs: Pairs,
    targets: Mapping[str, Tensor],
    stored: Recipe | None,
    meaning: Meaning | None,
    **options: Any,
) -> dict[str, Split]:
    """The splits, `train` with whole photos and their masks where they are stored so (decoded once more: what masks
    hold is known by what the network sees of all of them).

    Args:
        pairs: what the splits were made of.
        targets: those besides the mask, one a row of `pairs`.
        stored: how photos are stored; `None` leaves the splits as they are.
        meaning, options: as `decoded_pairs` was told.
    """
    if stored is None:
        return {**splits}
    rows = pairs.parts["train"]
    pictured, masks = pairs.sources
    images, numbers = ([source.files[row] for row in rows.tolist()] for source in (pictured, masks))
    every = {"train": torch.arange(len(rows))}
    found = decoded_pairs(pictured.root, images, numbers, stored, every, meaning, **options)
    own = {name: target[rows] for name, target in targets.items()}
    source, own = digest(found.fingerprint, *own.values()), {**own, "mask": found.masks}
    train = as_seen(own, source, found.sizes, pairs.recipe, stored)
    return {**splits, **assemble(found.images, *train, found.parts, mapped=True)}


def _of_another_size(
    parts: Mapping[str, Tensor], pictures: Store, masks: Store, scale: bool
) -> tuple[list[tuple[int, str]], list[int]]:
    """The masks that have another size than their images: those that cannot be used, with the reason, and others.

    One whose sides are swapped is no smaller image of the same: one of the two was turned.
    """
    rows = torch.cat([*parts.values()]).sort().values
    other = rows[(pictures.sizes[rows] != masks.sizes[rows]).any(1)].tolist()
    turned = [torch.equal(pictures.sizes[row], masks.sizes[row].flip(0)) for row in other]
    unfit = [
        (row, _misfit(row, pictures, masks, swapped)) for row, swapped in zip(other, turned) if swapped or not scale
    ]
    return unfit, [row for row, swapped in zip(other, turned) if scale and not swapped]


def _misfit(row: int, pictures: Store, masks: Store, turned: bool) -> str:
    has, wanted = (" x ".join(map(str, store.sizes[row].tolist())) for store in (masks, pictures))
    remedy = "; turn it as its image is shown" if turned else ""
    return f"expected a mask of its image's height and width, {wanted}, received {has}{remedy}"


def _notices(unfit: Sequence[tuple[str, str]], scaled: Sequence[str]) -> list[str]:
    told = []
    for names, what in (([name for name, _ in unfit], "are left out"), (scaled, "are scaled to it")):
        if names:
            told.append(f"data: {len(names):,} masks have another size than their images ({names[0]}), and {what}")
    return told


def untaught(classes: Sequence[str], present: Mapping[str, frozenset[int]]) -> list[str]:
    """Notices of classes that no training pixel teaches, and of splits that measure nothing.

    Raises `DataError` where there is no target at all.
    """
    missing = [name for number, name in enumerate(classes) if number not in present["train"]]
    if len(missing) == len(classes):
        raise DataError("expected classes in the training masks, received void alone; mend the masks")

    notices = []
    if missing:
        notices.append(
            f"data: no pixel of the training masks is {first_names(missing)}, which the network cannot learn; what is "
            f"void ({VOID}, unless told) counts nowhere"
        )
    return notices + [
        f"data: {split} has no pixel that is not void; its metrics are not defined, and choose no checkpoint"
        for split, found in present.items()
        if found <= {VOID}
    ]
