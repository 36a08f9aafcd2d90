"""Torchvision's small image sets: CIFAR-10, CIFAR-100, MNIST and Fashion-MNIST."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cnnlab.data.fetch import from_torchvision
from cnnlab.data.options import LabelledCut
from cnnlab.data.splits import Fraction, assemble, digest
from cnnlab.errors import DataError
from cnnlab.protocols import DataSpec, Split

_CIFAR100_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark
shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""


@dataclass(frozen=True)
class _Set:
    """What is known of a set before any of its files is there."""

    kind: str
    """Torchvision's class."""
    channels: int
    side: int
    names: str
    """Class names, in the order of the labels, apart by blanks."""
    files: str
    """What torchvision wants below the root."""
    train: tuple[int, ...]
    """Training images of each class, or of all classes alike."""

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.names.split())

    def labels(self) -> Tensor:
        """Those of the training images, (N,) int64, class by class."""
        return torch.arange(len(self.classes)).repeat_interleave(torch.tensor(self.train))


_SETS = {
    "cifar10": _Set(
        "CIFAR10",
        3,
        32,
        "airplane automobile bird cat deer dog frog horse ship truck",
        "cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta}",
        (5_000,),
    ),
    "cifar100": _Set("CIFAR100", 3, 32, _CIFAR100_CLASSES, "cifar-100-python/{train,test,meta}", (500,)),
    "mnist": _Set(
        "MNIST",
        1,
        28,
        "0 1 2 3 4 5 6 7 8 9",
        "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte",
        (5_923, 6_742, 5_958, 6_131, 5_842, 5_421, 5_918, 6_265, 5_851, 5_949),
    ),
    "fashion_mnist": _Set(
        "FashionMNIST",
        1,
        28,
        "T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Ankle_boot",
        "FashionMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte",
        (6_000,),
    ),
}


@dataclass(eq=False)
class TorchvisionSet(LabelledCut):
    """A set that torchvision reads and verifies; the official test images are the test split.

    Args:
        name: which set.
        root: folder with torchvision's files.
        download: whether missing files are fetched (or unpacked from an archive that is in `root` already).
        val: fraction of the training images, stratified by class.
    """

    name: Literal["cifar10", "cifar100", "mnist", "fashion_mnist"]
    root: str = "data"
    download: bool = False
    val: Fraction = 0.1

    def __post_init__(self) -> None:
        if self.name not in _SETS:
            raise ValueError(f"expected data.name to be one of {', '.join(_SETS)}, received {self.name!r}")
        self._set = _SETS[self.name]
        self._root = Path(self.root).expanduser()

    def spec(self) -> DataSpec:
        known = self._set
        return DataSpec(known.channels, (known.side, known.side), known.classes)

    def train_samples(self) -> int:
        labels = self._set.labels()
        given = {"train": torch.arange(len(labels)), "test": torch.arange(0)}
        return len(self.parted(given, labels, len(self._set.classes), val=self.val)["train"])

    def load(self) -> dict[str, Split]:
        pieces = [self._read(train=True), self._read(train=False)]
        images, labels = (torch.cat(tensors) for tensors in zip(*pieces))
        train, total = len(pieces[0][1]), len(labels)
        given = {"train": torch.arange(train), "test": torch.arange(train, total)}
        parts = self.parted(given, labels, len(self._set.classes), val=self.val)
        return assemble(images, {"label": labels}, digest(images, labels), parts)

    def _read(self, train: bool) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) uint8 and labels (N,) int64 of the official training or test part."""
        known = self._set
        wanted = f"{known.files} of {self.name}"
        found = from_torchvision(known.kind, self._root, wanted, download=self.download, train=train)
        pixels = torch.from_numpy(found.data) if isinstance(found.data, np.ndarray) else found.data
        images = pixels.permute(0, 3, 1, 2) if pixels.ndim == 4 else pixels[:, None]
        labels = torch.as_tensor(found.targets, dtype=torch.int64)
        shape = (known.channels, known.side, known.side)
        count = len(known.classes)
        whole = images.shape[1:] == shape and len(images) == len(labels) > 0
        if not whole or not 0 <= int(labels.min()) <= int(labels.max()) < count:
            raise DataError(
                f"expected {count} classes of images {shape} in {self._root}, received images "
                f"{tuple(images.shape)} and {len(labels)} labels; "
                f"remove the files and type data.download=true"
            )
        return images.contiguous(), labels
