"""Batches that hold a frozen backbone's features in the place of images."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cnnlab.data.features import FeatureSplit, as_text, content, entry_name, opened, written
from cnnlab.data.loader import Loader
from cnnlab.errors import DataError, UsageError
from cnnlab.inspect.layers import head_modules
from cnnlab.machine.ranks import Ranks
from cnnlab.protocols import FEATURE, VIEW, Batch
from cnnlab.torch_private import version
from cnnlab.train.forward import Forward
from cnnlab.train.halves import HALF_CLOSE, Halves

_log = logging.getLogger(__name__)

COMPARED = 8
"""Samples of an entry that are made again when it is found, and must be as it has them: whatever a key does not know (a
user's own code, another torch) is seen there."""
TOLERANCE = 1e-3
"""Relative to the largest value, of features found to those made again; of half precision it is `HALF_CLOSE`."""


@dataclass(frozen=True)
class Backbone:
    """What makes features, and what they depend on.

    Args:
        forward: with its halves.
        about: all that the features depend on but weights, split and view: the input's recipe, the precision, the
            network's settings.
        folder: of the cache.
        required: whether what cannot be written ends the run, rather than that the backbone runs in each epoch.
    """

    forward: Forward
    about: Mapping[str, Any]
    folder: Callable[[], Path]
    ranks: Ranks
    required: bool

    @property
    def model(self) -> nn.Module:
        return self.forward.model

    @property
    def halves(self) -> Halves:
        assert self.forward.halves is not None
        return self.forward.halves

    def tensors(self) -> dict[str, Tensor]:
        """What the features depend on of the network: all but its head."""
        head = tuple(f"{name}." for name in head_modules(self.model))
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {name: tensor for name, tensor in named if not name.startswith(head)}

    def versions(self) -> tuple[tuple[int, int], ...]:
        """Others after every change in place."""
        return tuple((id(tensor), version(tensor)) for tensor in self.tensors().values())

    def weights(self) -> str:
        """Names the weights themselves."""
        hasher = blake2b(digest_size=16)
        for name, tensor in self.tensors().items():
            hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            hasher.update(content(tensor))
        return hasher.hexdigest()

    @contextmanager
    def standing(self) -> Iterator[None]:
        """The network in evaluation, for the block."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad(), self.forward.autocast():
                yield
        finally:
            for module, was in modes:
                module.training = was

    def of(self, batch: Batch) -> Batch:
        """The batch with features in the place of its images, and without what nobody needs then."""
        with self.standing():
            made = self.halves.before(batch["image"])
        kept = {name: tensor for name, tensor in batch.items() if name not in ("image", VIEW)}
        return {**{FEATURE + name: tensor for name, tensor in made.items()}, **kept}


class FeatureLoader(Loader):
    """The batches of another loader, the same samples in the same order, with features in the place of images.

    They are made when they are first asked for, one epoch's worth for each of the `views`, and kept in the cache under
    the weights that made them. A backbone that has changed since (a checkpoint that was taken up) makes its own.

    Args:
        images: the loader of the images.
        backbone: what makes features of them.
        views: fixed augmented views of each image: epoch e has those of epoch e modulo `views`.
    """

    def __init__(self, images: Loader, backbone: Backbone, views: int = 1) -> None:
        vars(self).update(vars(images))  # what it serves is another, all else is what it is
        self._images = images
        self.backbone = backbone
        self.views = views
        self._served: dict[int, Loader] = {}
        self._versions: object = None
        self._weights = ""

    @property
    def images(self) -> Loader:
        return self._images

    def route(self) -> str:
        views = f" of {self.views} fixed views" if self.views > 1 else ""
        return f"{self.backbone.halves.describe()}{views}, made once and kept; images: {self._images.route()}"

    def batches(
        self, epoch: int, start: int = 0, stopping: Callable[[], object] | None = None
    ) -> Iterator[tuple[Batch, int]]:
        return self._of_view(epoch % self.views).batches(epoch, start, stopping)

    def first(self) -> tuple[Batch, int]:
        batch, count = self._images.first()
        return self.backbone.of(batch), count

    def some(self, count: int) -> Batch:
        return self.backbone.of(self._images.some(count))

    def alone(self) -> Loader:
        return FeatureLoader(self._images.alone(), self.backbone, self.views)

    def _of_view(self, view: int) -> Loader:
        """The loader of a view's features, which are made where they are not there.

        Raises:
            UsageError: the backbone has changed since it made features that were trained on.
        """
        versions = self.backbone.versions()
        if versions != self._versions:
            weights = self.backbone.weights()
            if self._served and weights != self._weights:
                raise UsageError(
                    "`finetune.cache`: the frozen backbone has changed while its features were in use; type "
                    "finetune.cache=false"
                )
            self._versions, self._weights = versions, weights
        if view not in self._served:
            self._served[view] = self.backbone.ranks.in_turn(lambda: self._made(view))
        return self._served[view]

    def _made(self, view: int) -> Loader:
        images, backbone = self._images, self.backbone
        key = (self._weights, images.split.fingerprint, len(images.split), view, as_text(backbone.about))
        try:
            entry = backbone.folder() / entry_name(*key)
            tensors = self._found(entry, view)
            if tensors is None:
                _log.info("the backbone makes features of %s images", f"{images.length:,}")
                tensors = written(entry, images.length, self._rows(view))
        except (OSError, DataError) as error:
            if backbone.required:
                raise DataError(
                    f"`finetune.cache=true`: expected to write features to the cache, received: {error}; set "
                    "CNNLAB_CACHE to put them elsewhere, or type finetune.cache=false"
                ) from error
            _log.warning("features are not kept (%s): the backbone runs in each epoch", error)
            return images
        split = FeatureSplit(tensors, images.split)
        layouts = {name: _layout(tensor) for name, tensor in self._example(view).items()}

        def laid_out(batch: Batch, epoch: int) -> Batch:
            return {
                name: tensor.contiguous(memory_format=layouts.get(name, torch.contiguous_format))
                for name, tensor in batch.items()
            }

        return Loader(
            split,
            images.batch_size,
            seed=images.seed,
            shuffle=images.shuffle,
            drop_last=images.steps * images.batch_size <= images.length,
            rank=images.rank,
            world=images.world,
            device=images.device,
            transform=laid_out,
            loading=images.loading,
        )

    def _found(self, entry: Path, view: int) -> dict[str, Tensor] | None:
        """The entry's tensors, where they are whole and what the backbone makes."""
        found = opened(entry, self._images.length)
        if isinstance(found, str):
            _log.warning("the cache's entry %s is damaged (%s) and is made again", entry, found)
        if not isinstance(found, dict):
            return None
        made = self._example(view)
        if found.keys() == made.keys() - {"index"}:
            rows = made["index"].cpu()
            if all(_agree(name, found[name].index_select(0, rows), made[name].cpu()) for name in found):
                return found
        _log.warning("the cache's entry %s is of another backbone and is made again", entry)
        shutil.rmtree(entry, ignore_errors=True)  # whole as it is, it would stay
        return None

    def _example(self, view: int) -> Batch:
        """A few samples' features, made now."""
        index = torch.linspace(0, self._images.length - 1, min(COMPARED, self._images.length)).round().long()
        return self.backbone.of(self._images.at(index, view))

    def _rows(self, view: int) -> Iterator[Batch]:
        """All samples' features, in the split's order."""
        size = max(self._images.batch_size // self._images.world, 1)
        for index in torch.arange(self._images.length).split(size):
            batch = self.backbone.of(self._images.at(index, view))
            yield {name: tensor for name, tensor in batch.items() if name != "index"}


def _layout(tensor: Tensor) -> torch.memory_format:
    rows = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if rows and not tensor.is_contiguous() else torch.contiguous_format


def _agree(name: str, found: Tensor, made: Tensor) -> bool:
    if found.dtype != made.dtype or found.shape != made.shape:
        return False
    if not made.is_floating_point():  # where of two nearly equal values the larger one is may change with the kernel
        return name.startswith(FEATURE) or torch.equal(found, made)
    half = made.dtype in (torch.float16, torch.bfloat16)
    bound = (HALF_CLOSE if half else TOLERANCE) * float(made.abs().max())
    return bool((found.float() - made.float()).abs().max() <= bound)
