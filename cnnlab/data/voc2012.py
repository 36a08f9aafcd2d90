"""Pascal VOC 2012 (Everingham et al. 2012), in torchvision's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from cnnlab.data.decode import Recipe
from cnnlab.data.fetch import from_torchvision
from cnnlab.data.found import Findings
from cnnlab.data.lists import Folder, leave_out, listed, tell_shared
from cnnlab.data.mask_pixels import Meaning
from cnnlab.data.pairs import decoded_pairs, untaught
from cnnlab.data.pixels import MAX_PIXELS, checked_range
from cnnlab.data.splits import Fraction, Imbalance, Limit, assemble, partitioned
from cnnlab.data.voc import VocBoxes
from cnnlab.errors import DataError
from cnnlab.protocols import VOID, DataSpec, Split
from cnnlab.schema import Loading, NonNegativeInt, PositiveInt

CLASSES = tuple(
    """aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep
    sofa train tvmonitor""".split()
)
_MEANING: Meaning = (*((number, number) for number in range(len(CLASSES) + 1)), (VOID, VOID))
_FOLDER = Path("VOCdevkit") / "VOC2012"
_REMEDY = f"remove {_FOLDER} from data.root and type data.download=true"


class Voc2012:
    """VOC 2012's training images, and its validation images as the test split, for nobody has the annotations of its
    test images.

    Args:
        target: `box` has the largest object of each of the 11,540 images of the detection task, with its class and
            box (as `cnnlab.data.voc.VocBoxes`); `mask` has the 2,913 images of the segmentation task, with a class or
            void a pixel, the first class being the background.
        root: folder with, or for, torchvision's `VOCdevkit/VOC2012`, or its archive.
        size: side of the images.
        fit: `letterbox` keeps the aspect ratio and fills with black (masks: with void); `stretch` does not.
        download: whether missing files are fetched (2 GB).
        val: fraction of the training images that selects the checkpoint, by class where there are labels.
        split_seed: seed of the split, apart from the run's.
        limit, imbalance: thin the training split (see `cnnlab.data.splits`).
        on_error: whether an unreadable file, or a listed image without its files, ends the run or is left out.
        cache, workers: see `cnnlab.data.cache.decoded`.
        max_pixels, value_range: see `cnnlab.data.folder.ImageFolder`.
        loading: the config's section; `None` takes its defaults.

    Raises:
        ValueError: `imbalance` with masks, which have no label to count.
    """

    streams = False

    def __init__(
        self,
        target: Literal["box", "mask"] = "box",
        root: str = "data",
        size: PositiveInt = 128,
        fit: Literal["letterbox", "stretch"] = "letterbox",
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
        loading: Loading | None = None,
    ) -> None:
        if target == "mask" and imbalance is not None:
            raise ValueError(
                f"expected images with a label each for data.imbalance={imbalance:g}, received masks; "
                "type data.imbalance=null"
            )
        self.target = target
        self.root = Path(root).expanduser()
        self.size = size
        self.fit: Literal["letterbox", "stretch"] = fit
        self.download = download
        self.val = val
        self.split_seed = split_seed
        self.limit = limit
        self.imbalance = imbalance
        self.on_error: Literal["raise", "skip"] = on_error
        self.decoding: dict[str, Any] = {"on_error": on_error, "cache": cache, "workers": workers}
        self.loading = loading or Loading()
        self.findings = Findings()
        self.max_pixels = max_pixels
        self.value_range = checked_range(value_range)

    def spec(self) -> DataSpec:
        size = (self.size, self.size)
        if self.target == "box":
            return DataSpec(3, size, CLASSES, frozenset({"label", "box"}))
        classes = ("background", *CLASSES)
        return DataSpec(3, size, classes, frozenset({"mask"}), mask_classes=classes)

    def load(self) -> dict[str, Split]:
        base = self.root / _FOLDER
        kind = "VOCDetection" if self.target == "box" else "VOCSegmentation"
        if not base.is_dir():
            wanted = f"{_FOLDER}/{{JPEGImages,Annotations,ImageSets,SegmentationClass}} of VOC 2012"
            from_torchvision(kind, self.root, wanted, download=self.download, image_set="train")
        if self.target == "mask":
            return self._masks(base)
        boxes = VocBoxes(
            str(base),
            self.size,
            self.fit,
            classes=CLASSES,
            val_as_test=True,
            val=self.val,
            split_seed=self.split_seed,
            limit=self.limit,
            imbalance=self.imbalance,
            max_pixels=self.max_pixels,
            value_range=self.value_range,
            loading=self.loading,
            **self.decoding,
        )
        splits = boxes.load()
        self.findings = boxes.findings
        return splits

    def _masks(self, base: Path) -> dict[str, Split]:
        self.findings = Findings()
        lists = {}
        for split, image_set in (("train", "train"), ("test", "val")):
            path = base / "ImageSets" / "Segmentation" / f"{image_set}.txt"
            lists[split] = [*listed(path, self.findings)]
            if not lists[split]:
                raise DataError(f"expected the ids of images in {path}, received an empty file; {_REMEDY}")
        tell_shared(lists, self.findings)
        every = [*dict.fromkeys(name for names in lists.values() for name in names)]
        folders = [Folder.of(base, below) for below in ("JPEGImages", "SegmentationClass")]
        folders[0].tell_unlisted(every, self.findings)
        lacking = [item for folder in folders for item in folder.lacking(every)]
        out = leave_out(lacking, len(every), self.on_error, self.findings, _REMEDY)
        ids: list[str] = []
        given = {}
        for split, names in lists.items():
            start = len(ids)
            ids += [name for name in names if name not in out]
            given[split] = torch.arange(start, len(ids))
        parts = partitioned(
            given,
            None,
            len(CLASSES) + 1,
            val=self.val,
            test=0.0,
            limit=self.limit,
            imbalance=None,
            seed=self.split_seed,
        )
        images, masks = [[folder.of_id(name) for name in ids] for folder in folders]
        recipe = Recipe(3, self.size, self.size, self.fit, value_range=self.value_range, max_pixels=self.max_pixels)
        patience = self.loading.patience
        pairs = decoded_pairs(base, images, masks, recipe, parts, _MEANING, patience=patience, **self.decoding)
        self.findings.left_out += pairs.left_out
        self.findings.notices += [*pairs.notices, *untaught(("background", *CLASSES), pairs.present())]
        self.findings.record(pairs.parts, *pairs.sources)
        return assemble(pairs.images, {"mask": pairs.masks}, pairs.fingerprint, pairs.parts, mapped=True)
