"""Pascal VOC 2012 (Everingham et al. 2012), in torchvision's layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cnnlab.data.fetch import from_torchvision
from cnnlab.data.found import Findings
from cnnlab.data.lists import Folder, kept, leave_out, listed, tell_shared
from cnnlab.data.mask_pixels import Meaning
from cnnlab.data.options import Decoding, LabelledCut, shared
from cnnlab.data.pairs import decoded_pairs, untaught, whole_train
from cnnlab.data.splits import Fraction, assemble
from cnnlab.data.voc import VocBoxes
from cnnlab.errors import DataError
from cnnlab.protocols import VOID, DataSpec, Split
from cnnlab.schema import PositiveInt

CLASSES = tuple(
    """aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep
    sofa train tvmonitor""".split()
)
_MEANING: Meaning = (*((number, number) for number in range(len(CLASSES) + 1)), (VOID, VOID))
_FOLDER = Path("VOCdevkit") / "VOC2012"
_REMEDY = f"remove {_FOLDER} from data.root and type data.download=true"


@dataclass(eq=False)
class Voc2012(Decoding, LabelledCut):
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
        on_error: whether an unreadable file, or a listed image without its files, ends the run or is left out.

    Raises:
        ValueError: `imbalance` with masks, which have no label to count.
    """

    target: Literal["box", "mask"] = "box"
    root: str = "data"
    size: PositiveInt = 128
    fit: Literal["letterbox", "stretch"] = "letterbox"
    download: bool = False
    val: Fraction = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target == "mask" and self.imbalance is not None:
            raise ValueError(
                f"expected images with a label each for data.imbalance={self.imbalance:g}, received masks; "
                "type data.imbalance=null"
            )
        self._root = Path(self.root).expanduser()
        self._recipe = self.recipe(3, self.size, self.size, self.fit)

    def spec(self) -> DataSpec:
        size = (self.size, self.size)
        if self.target == "box":
            return DataSpec(3, size, CLASSES, frozenset({"label", "box"}))
        classes = ("background", *CLASSES)
        return DataSpec(3, size, classes, frozenset({"mask"}), mask_classes=classes)

    def load(self) -> dict[str, Split]:
        base = self._root / _FOLDER
        kind = "VOCDetection" if self.target == "box" else "VOCSegmentation"
        if not base.is_dir():
            wanted = f"{_FOLDER}/{{JPEGImages,Annotations,ImageSets,SegmentationClass}} of VOC 2012"
            from_torchvision(kind, self._root, wanted, download=self.download, image_set="train")
        if self.target == "mask":
            return self._masks(base)
        boxes = VocBoxes(
            str(base),
            self.size,
            self.fit,
            classes=CLASSES,
            val_as_test=True,
            val=self.val,
            **shared(self, LabelledCut),
            **shared(self, Decoding),
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
        ids, given = kept(lists, out, folders[0], self.findings)
        parts = self.parted(given, None, len(CLASSES) + 1, val=self.val)
        images, masks = [[folder.of_id(name) for name in ids] for folder in folders]
        pairs = decoded_pairs(base, images, masks, self._recipe, parts, _MEANING, **self.decoding)
        self.findings.left_out += pairs.left_out
        self.findings.notices += [*pairs.notices, *untaught(("background", *CLASSES), pairs.present())]
        self.findings.record(pairs.parts, *pairs.sources)
        splits = assemble(pairs.images, {"mask": pairs.masks}, pairs.fingerprint, pairs.parts, mapped=True)
        return whole_train(splits, pairs, {}, self.whole(self._recipe), _MEANING, **self.decoding)
