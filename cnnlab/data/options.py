"""The options that data sets have in common, each written once. A set is a dataclass that inherits those it takes."""

# No postponed annotations: the heirs' constructors show them in other modules, where their names mean nothing.
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cnnlab.data.found import Findings
from cnnlab.data.pixels import MAX_PIXELS, Recipe, checked_range
from cnnlab.data.splits import Fraction, Imbalance, Limit, partitioned, require_fractions, require_samples
from cnnlab.data.whole import only_used, usual_side, whole
from cnnlab.schema import Loading, NonNegativeInt, PositiveInt


@dataclass(kw_only=True, eq=False)
class Cut:
    """How samples are cut into splits, and how many of them train.

    Args:
        split_seed: seed of the split, apart from the run's.
        limit: training samples to keep, by class where there are labels (see `cnnlab.data.splits`). Of files, only
            those that are used are then decoded.
    """

    split_seed: NonNegativeInt = 0
    limit: Limit = None

    def parted(
        self, given: Mapping[str, Tensor], labels: Tensor | None, num_classes: int, *, val: float, test: float = 0.0
    ) -> dict[str, Tensor]:
        """The rows of each split; see `cnnlab.data.splits.partitioned`. A fraction that was chosen for a split which
        is there already is told in the `findings` of a set that has such."""
        findings = getattr(self, "findings", None)
        chosen = {option.name: getattr(self, option.name) != option.default for option in fields(self)}
        for split in ("val", "test"):
            if findings is not None and split in given and chosen.get(split):
                findings.notices.append(
                    f"data: `data.{split}={getattr(self, split):g}` has no effect, as there is a {split} split"
                )
        return partitioned(
            given,
            labels,
            num_classes,
            val=val,
            test=test,
            limit=self.limit,
            imbalance=self.imbalanced(),
            seed=self.split_seed,
        )

    def imbalanced(self) -> Imbalance:
        """How uneven the classes are made."""
        return None


@dataclass(kw_only=True, eq=False)
class LabelledCut(Cut):
    """`Cut`, of samples that have a class each.

    Args:
        imbalance: makes the training split long-tailed (see `cnnlab.data.splits.long_tailed`).
    """

    imbalance: Imbalance = None

    def imbalanced(self) -> Imbalance:
        return self.imbalance


@dataclass(kw_only=True, eq=False)
class Reading:
    """How image files become pixels.

    Args:
        on_error: whether an unreadable file ends the run or is left out.
        cache: folder of what is kept of the files from run to run; `None` takes `$CNNLAB_CACHE` or `~/.cache/cnnlab`.
        max_pixels: that an image may have, fewer where decoding its format takes more than 4 bytes of memory a pixel;
            a JPEG or JPEG 2000 beyond it is decoded at half its size where that fits (see `cnnlab.data.bounds`).
        value_range: what becomes black and white of an image of more than 8 bits a pixel; `None`: 0 and 65,535. Masks
            hold numbers, and have no range.
        stored: shorter side at which training photos are stored whole, for crops to be taken of them; `input` stores
            what the network sees. `None`: 256/224 of the input's shorter side (`resize`, if that is more) where the
            augmentation crops, or shifts what is the middle of a larger photo (`resize`), else `input`.
        loading: the config's section; `None` takes its defaults.
        crops, shifts: whether the augmentation cuts pieces out of whole photos, or moves in what lies beside the image;
            a run is told so where its config has `stored`, as those of earlier versions have not.

    `findings` is what a person should know of the data, once it is loaded.

    Raises:
        ValueError: `value_range` is no range.
    """

    on_error: Literal["raise", "skip"] = "raise"
    cache: str | None = None
    max_pixels: PositiveInt = MAX_PIXELS
    value_range: tuple[float, ...] | None = None
    stored: PositiveInt | Literal["input"] | None = None
    loading: Loading | None = None
    crops: bool = False
    shifts: bool = False

    streams: ClassVar[bool] = False
    """Whether `loading.path=stream` can be asked for."""

    def __post_init__(self) -> None:
        checked_range(self.value_range)
        self._loading = self.loading or Loading()
        self.findings = Findings()
        self.seen: Recipe | None = None
        """How the network sees a file; known after `spec`."""

    def recipe(
        self, channels: int, height: int, width: int, fit: Literal["crop", "letterbox", "stretch"], resize: int = 0
    ) -> Recipe:
        """How a file becomes an image of this size."""
        bounds: Any = {"value_range": checked_range(self.value_range), "max_pixels": self.max_pixels}
        self.seen = Recipe(channels, height, width, fit, resize, **bounds)
        return self.seen

    def whole(self, seen: Recipe) -> Recipe | None:
        """How training photos are stored, where they are stored whole.

        Args:
            seen: how the network sees a photo without augmentation.
        """
        beside = self.shifts and seen.resize > min(seen.height, seen.width)
        if self.stored == "input" or (self.stored is None and not self.crops and not beside):
            return None
        return whole(seen, usual_side(seen) if self.stored is None else self.stored)

    def by_recipe(
        self, parts: Mapping[str, Tensor], count: int, seen: Recipe, stored: Recipe | None
    ) -> list[tuple[Tensor, dict[str, Tensor], Recipe]]:
        """The splits by the way that their images are stored: the rows of the data that each needs, where among them
        each split's rows are, and the recipe. Evaluation gets what the network sees.

        Args:
            parts: rows by split, of `count`; all are needed where there is one way, so that thinning makes no other.
        """
        if stored is None:
            return [(torch.arange(count), {**parts}, seen)]
        require_samples(parts)
        others = {name: rows for name, rows in parts.items() if name != "train"}
        return [(*only_used({"train": parts["train"]}), stored), (*only_used(others), seen)]


@dataclass(kw_only=True, eq=False)
class Decoding(Reading):
    """`Reading`, of files that are decoded once, into a cache (see `cnnlab.data.cache.decoded`).

    Args:
        workers: processes that decode into the cache; `None` starts one a core where it pays, 0 none.
    """

    workers: NonNegativeInt | None = None

    @property
    def decoding(self) -> dict[str, Any]:
        """What `decoded` is told."""
        patience = self._loading.patience
        return {"on_error": self.on_error, "cache": self.cache, "workers": self.workers, "patience": patience}


@dataclass(eq=False)
class ObjectOptions(Decoding, LabelledCut):
    """Of sets with a class and a box an image, those of its largest object.

    Args:
        root: the folder.
        size: side of the images.
        fit: `letterbox` keeps the aspect ratio and fills with black; `stretch` does not.
        classes: their names in the order of the labels; `None` takes those that occur.
        val_as_test: whether the list of val is the test split, as VOC's and COCO's own is used (nobody has the
            annotations of their test images); the checkpoint is then selected on a part of train.
        val, test: fractions of the training images for a split without a list of its own, by class.
        on_error: whether an image that cannot be read, is not there, or whose annotation cannot be used ends the run
            or is left out.
    """

    root: str
    size: PositiveInt = 128
    fit: Literal["letterbox", "stretch"] = "letterbox"
    classes: tuple[str, ...] | None = None
    val_as_test: bool = False
    val: Fraction = 0.1
    test: Fraction = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fractions(self.val, self.test)
        self._root = Path(self.root).expanduser()


def shared(own: Reading | Cut, kind: type[Reading] | type[Cut]) -> dict[str, Any]:
    """The values of `kind`'s options, for another set of the same options."""
    return {option.name: getattr(own, option.name) for option in fields(kind)}
