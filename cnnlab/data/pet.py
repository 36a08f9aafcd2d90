"""Oxford-IIIT Pet (Parkhi et al. 2012, "Cats and Dogs"), in torchvision's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cnnlab.data.cache import decoded
from cnnlab.data.decode import Recipe
from cnnlab.data.fetch import from_torchvision, require_files
from cnnlab.data.masks import decoded_pairs
from cnnlab.data.pixels import MAX_PIXELS, checked_range
from cnnlab.data.sources import Listing
from cnnlab.data.splits import Fraction, Imbalance, Limit, assemble, digest, partitioned
from cnnlab.errors import DataError
from cnnlab.protocols import VOID, DataSpec, Split
from cnnlab.schema import NonNegativeInt, PositiveInt

BREEDS = tuple(
    """abyssinian american_bulldog american_pit_bull_terrier basset_hound beagle bengal birman bombay boxer
    british_shorthair chihuahua egyptian_mau english_cocker_spaniel english_setter german_shorthaired great_pyrenees
    havanese japanese_chin keeshond leonberger maine_coon miniature_pinscher newfoundland persian pomeranian pug ragdoll
    russian_blue saint_bernard samoyed scottish_terrier shiba_inu siamese sphynx staffordshire_bull_terrier
    wheaten_terrier yorkshire_terrier""".split()
)
MASK_CLASSES = ("pet", "background")
_TRIMAP = {1: 0, 2: 1, 3: VOID}
"""What a trimap's numbers stand for: its third one is "not classified", the border between the two."""
_FOLDER = "oxford-iiit-pet"
_REMEDY = f"remove {_FOLDER} from data.root and type data.download=true"


class OxfordPet:
    """37 breeds of cats and dogs, 3,680 images to train on and 3,669 to test; the label is the breed.

    Args:
        masks: whether each image comes with its trimap as a mask, for segmentation: pet, background, and void where
            the annotators left the border unclassified.
        root: folder with, or for, torchvision's `oxford-iiit-pet`.
        size: side of the images.
        fit: `crop` resizes the shorter side and cuts the middle out; `letterbox` keeps the whole image and fills with
            black (masks: with void); `stretch` resizes each side by itself.
        download: whether missing files are fetched (800 MB).
        val: fraction of the training images that selects the checkpoint, stratified by breed.
        split_seed: seed of the split, apart from the run's.
        limit, imbalance: thin the training split (see `cnnlab.data.splits`).
        on_error: whether an unreadable file ends the run or is left out.
        cache, workers: see `cnnlab.data.cache.decoded`.
        max_pixels, value_range: see `cnnlab.data.folder.ImageFolder`.
    """

    def __init__(
        self,
        masks: bool = False,
        root: str = "data",
        size: PositiveInt = 128,
        fit: Literal["crop", "letterbox", "stretch"] = "crop",
        download: bool = False,
        val: Fraction = 0.1,
        split_seed: NonNegativeInt = 0,
        limit: Limit = None,
        imbalance: Imbalance = None,
        on_error: Literal["raise", "skip"] = "raise",
        cache: str | None = None,
        workers: NonNegativeInt | None = None,
        max_pixels: PositiveInt = MAX_PIXELS,
        value_range: tuple[float, ...] | None = None,
    ) -> None:
        self.masks = masks
        self.root = Path(root).expanduser()
        self.recipe = Recipe(
            3,
            size,
            size,
            fit,
            resize=size if fit == "crop" else 0,
            value_range=checked_range(value_range),
            max_pixels=max_pixels,
        )
        self.download = download
        self.val = val
        self.split_seed = split_seed
        self.limit = limit
        self.imbalance = imbalance
        self.decoding: dict[str, Any] = {"on_error": on_error, "cache": cache, "workers": workers}

    def spec(self) -> DataSpec:
        targets = {"label", "mask"} if self.masks else {"label"}
        size = (self.recipe.height, self.recipe.width)
        return DataSpec(3, size, BREEDS, frozenset(targets), MASK_CLASSES if self.masks else ())

    def load(self) -> dict[str, Split]:
        ids, labels, given = self._listed()
        parts = partitioned(
            given,
            labels,
            len(BREEDS),
            val=self.val,
            test=0.0,
            limit=self.limit,
            imbalance=self.imbalance,
            seed=self.split_seed,
        )
        base = self.root / _FOLDER
        require_files(base, "images", [f"{name}.jpg" for name in ids], _REMEDY)
        images = [f"images/{name}.jpg" for name in ids]
        if not self.masks:
            store = decoded(Listing(base, images), self.recipe, **self.decoding)
            source = digest(store.fingerprint, labels)
            return assemble(store.images, {"label": labels}, source, store.readable(parts), mapped=True)
        require_files(base, "annotations/trimaps", [f"{name}.png" for name in ids], _REMEDY)
        masks = [f"annotations/trimaps/{name}.png" for name in ids]
        pairs = decoded_pairs(base, images, masks, self.recipe, parts, _TRIMAP, **self.decoding)
        targets = {"label": labels, "mask": pairs.masks}
        return assemble(pairs.images, targets, digest(pairs.fingerprint, labels), pairs.parts, mapped=True)

    def _listed(self) -> tuple[list[str], Tensor, dict[str, Tensor]]:
        """Image ids, their labels (M,) int64, and the rows of `train` and `test`."""
        wanted = f"{_FOLDER}/{{images,annotations}} of Oxford-IIIT Pet"
        ids: list[str] = []
        labels: list[int] = []
        given = {}
        for split, official in (("train", "trainval"), ("test", "test")):
            from_torchvision("OxfordIIITPet", self.root, wanted, download=self.download, split=official)
            path, start = self.root / _FOLDER / "annotations" / f"{official}.txt", len(ids)
            for line in path.read_text().splitlines():
                name, number, *_ = line.split()  # and species and breed inside it
                if not 1 <= int(number) <= len(BREEDS):
                    raise DataError(f"expected breeds 1..{len(BREEDS)} in {path}, received {line!r}; {_REMEDY}")
                ids.append(name)
                labels.append(int(number) - 1)
            given[split] = torch.arange(start, len(ids))
        return ids, torch.tensor(labels, dtype=torch.int64), given
