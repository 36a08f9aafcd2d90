"""Oxford-IIIT Pet (Parkhi et al. 2012, "Cats and Dogs"), in torchvision's layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cnnlab.data.cache import decoded
from cnnlab.data.decode import Recipe
from cnnlab.data.fetch import from_torchvision
from cnnlab.data.found import Findings
from cnnlab.data.lists import Folder, kept, leave_out, listed, tell_shared
from cnnlab.data.mask_pixels import Meaning
from cnnlab.data.options import Decoding, LabelledCut
from cnnlab.data.pairs import Pairs, decoded_pairs, untaught, whole_train
from cnnlab.data.shapes import boxes_of
from cnnlab.data.sources import Listing
from cnnlab.data.splits import Fraction, TensorSplit, assemble, digest
from cnnlab.data.whole import as_seen
from cnnlab.errors import DataError
from cnnlab.protocols import VOID, DataSpec, Split
from cnnlab.schema import PositiveInt

BREEDS = tuple(
    """abyssinian american_bulldog american_pit_bull_terrier basset_hound beagle bengal birman bombay boxer
    british_shorthair chihuahua egyptian_mau english_cocker_spaniel english_setter german_shorthaired great_pyrenees
    havanese japanese_chin keeshond leonberger maine_coon miniature_pinscher newfoundland persian pomeranian pug ragdoll
    russian_blue saint_bernard samoyed scottish_terrier shiba_inu siamese sphynx staffordshire_bull_terrier
    wheaten_terrier yorkshire_terrier""".split()
)
MASK_CLASSES = ("pet", "background")
_TRIMAP: Meaning = ((1, 0), (2, 1), (3, VOID), (VOID, VOID))
"""What a trimap's numbers stand for: its third one is "not classified", the border between the two."""
_PIECE = 64
"""Masks whose bounds are found at a time."""
_FOLDER = "oxford-iiit-pet"
_REMEDY = f"remove {_FOLDER} from data.root and type data.download=true"


@dataclass(eq=False)
class OxfordPet(Decoding, LabelledCut):
    """37 breeds of cats and dogs, 3,680 images to train on and 3,669 to test; the label is the breed.

    Args:
        masks: whether each image comes with its trimap as a mask, for segmentation: pet, background, and void where
            the annotators left the border unclassified.
        boxes: whether each image comes with a box for localization: the bounds of the trimap's pixels that are pet, as
            the network sees them (what a crop cuts off is cut off the box). An image without such pixels cannot be
            used.
        root: folder with, or for, torchvision's `oxford-iiit-pet`.
        size: side of the images.
        fit: `crop` resizes the shorter side and cuts the middle out; `letterbox` keeps the whole image and fills with
            black (masks: with void); `stretch` resizes each side by itself.
        download: whether missing files are fetched (800 MB).
        val: fraction of the training images that selects the checkpoint, stratified by breed.
        on_error: whether an unreadable file, or a listed image without its files, ends the run or is left out.
    """

    masks: bool = False
    root: str = "data"
    size: PositiveInt = 128
    fit: Literal["crop", "letterbox", "stretch"] = "crop"
    download: bool = False
    val: Fraction = 0.1
    boxes: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._root = Path(self.root).expanduser()
        self._recipe = self.recipe(3, self.size, self.size, self.fit, resize=self.size if self.fit == "crop" else 0)

    def spec(self) -> DataSpec:
        targets = {"label"} | ({"mask"} if self.masks else set()) | ({"box"} if self.boxes else set())
        size = (self._recipe.height, self._recipe.width)
        return DataSpec(3, size, BREEDS, frozenset(targets), MASK_CLASSES if self.masks else ())

    def load(self) -> dict[str, Split]:
        self.findings = Findings()
        lists = self._lists()
        base = self._root / _FOLDER
        breeds = {name: breed for ids in lists.values() for name, breed in ids.items()}
        folders = [Folder.of(base, "images")]
        if self.masks or self.boxes:
            folders.append(Folder.of(base, "annotations/trimaps"))
        folders[0].tell_unlisted(breeds, self.findings)
        lacking = [item for folder in folders for item in folder.lacking([*breeds])]
        out = leave_out(lacking, len(breeds), self.on_error, self.findings, _REMEDY)
        ids, given = kept(lists, out, folders[0], self.findings)
        labels = torch.tensor([breeds[name] for name in ids], dtype=torch.int64)
        parts = self.parted(given, labels, len(BREEDS), val=self.val)
        images, *masks = [[folder.of_id(name) for name in ids] for folder in folders]
        stored = self.whole(self._recipe)
        splits: dict[str, Split] = {}
        if not masks:
            for used, rows, recipe in self.by_recipe(parts, len(ids), self._recipe, stored):
                listing = Listing(base, [images[row] for row in used.tolist()])
                splits |= self._decoded(listing, recipe, rows, labels[used])
            return splits
        pairs = decoded_pairs(base, images, masks[0], self._recipe, parts, _TRIMAP, **self.decoding)
        self.findings.left_out += pairs.left_out
        self.findings.notices += [*pairs.notices, *untaught(MASK_CLASSES, pairs.present())]
        self.findings.record(pairs.parts, *pairs.sources)
        targets = {"label": labels, "mask": pairs.masks}
        if self.boxes:
            targets["box"] = self._boxes(pairs)
        source = digest(pairs.fingerprint, labels, *(["boxes"] if self.boxes else []))
        splits = assemble(pairs.images, targets, source, pairs.parts, mapped=True)
        splits = whole_train(splits, pairs, {"label": labels}, stored, _TRIMAP, **self.decoding)
        return self._as_asked(splits) if self.boxes else splits

    def _boxes(self, pairs: Pairs) -> Tensor:
        """(M, 4) of all pairs that are used. Those without a pixel of a pet are taken out of the pairs' parts.

        Raises `DataError` for them, unless they are left out.
        """
        boxes, seen = pet_bounds(pairs.masks, torch.cat([*pairs.parts.values()]))
        names = pairs.sources[1].files
        rows = [row for rows in pairs.parts.values() for row in rows[~seen[rows]].tolist()]
        lacking = [(names[row], "no pixel of a pet in what the network sees") for row in rows]
        leave_out(lacking, len(names), self.on_error, self.findings, f"{_REMEDY}, type data.fit=letterbox")
        pairs.parts = {name: rows[seen[rows]] for name, rows in pairs.parts.items()}
        return boxes

    def _as_asked(self, splits: dict[str, Split]) -> dict[str, Split]:
        """Boxes of photos that are stored whole, too; and masks only where they were asked for."""
        for split in splits.values():
            assert isinstance(split, TensorSplit)
            if "box" not in split.targets:
                split.targets["box"], _ = pet_bounds(split.targets["mask"], split.rows)
            if not self.masks:
                del split.targets["mask"]
        return splits

    def _decoded(self, listing: Listing, recipe: Recipe, parts: dict[str, Tensor], labels: Tensor) -> dict[str, Split]:
        store = decoded(listing, recipe, **self.decoding)
        self.findings.leave_out(listing, store.failures)
        parts = store.readable(parts)
        self.findings.record(parts, listing)
        source, targets = digest(store.fingerprint, labels), {"label": labels}
        return assemble(store.images, *as_seen(targets, source, store.sizes, self._recipe, recipe), parts, mapped=True)

    def _lists(self) -> dict[str, dict[str, int]]:
        """The breed of each image, by its id, of `train` and `test`."""
        wanted = f"{_FOLDER}/{{images,annotations}} of Oxford-IIIT Pet"
        there = all((self._root / _FOLDER / name).is_dir() for name in ("images", "annotations"))
        lists = {}
        for split, official in (("train", "trainval"), ("test", "test")):
            if not there:
                from_torchvision("OxfordIIITPet", self._root, wanted, download=self.download, split=official)
            path = self._root / _FOLDER / "annotations" / f"{official}.txt"
            lists[split] = {name: _breed(name, words, path) for name, words in listed(path, self.findings).items()}
        tell_shared(lists, self.findings)
        return lists


def pet_bounds(masks: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(M, 4) boxes of the pet's pixels in some rows of masks (M, H, W), and (M,) whether there are such; of the other
    rows, zeros."""
    boxes, seen = torch.zeros(len(masks), 4), torch.zeros(len(masks), dtype=torch.bool)
    for piece in rows.split(_PIECE):
        pet = masks[piece] == MASK_CLASSES.index("pet")
        seen[piece] = pet.flatten(1).any(1)
        boxes[piece] = torch.where(seen[piece, None], boxes_of(pet), 0.0)
    return boxes, seen


def _breed(name: str, words: Sequence[str], path: Path) -> int:
    """From 0; what follows an id in a list is its breed from 1, its species, and its breed inside it."""
    if not words or not words[0].isdecimal() or not 1 <= int(words[0]) <= len(BREEDS):
        line = " ".join([name, *words])
        raise DataError(f"expected breeds 1..{len(BREEDS)} in {path}, received {line!r}; {_REMEDY}")
    return int(words[0]) - 1
