"""A trained network's answers for image files: in their order, each the same whatever files are beside it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnnlab.building.opened import Opened
from cnnlab.data.decode import Decoded
from cnnlab.data.inputs import Missing, Named
from cnnlab.data.pool import DecodingPool, cores
from cnnlab.data.seen import box_of_file, mask_of_file
from cnnlab.errors import DataError

_VALUES = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Of a batch: enough to keep the device busy, and few enough that one image does not wait for long."""
_MOST = 256
_AHEAD = 3
"""Batches that are decoded while the network computes."""


@dataclass
class Predicted:
    """What the network says of a file.

    `answer` is the task's (`Task.answers`), of JSON values, its `box` in pixels of the upright file; `size` is that
    file's (height, width); `mask` (height, width) uint8 has a class number a pixel of it, 255 where the network did not
    look.
    """

    file: Named
    size: tuple[int, int]
    answer: dict[str, Any]
    mask: np.ndarray[Any, Any] | None = None


def batch_size_for(network: Opened) -> int:
    """Images that go through the network at once."""
    values = network.spec.channels * network.spec.size[0] * network.spec.size[1]
    return max(1, min(_MOST, _VALUES.get(network.device.type, _VALUES["cuda"]) // values))


def predicted(
    network: Opened, files: Iterator[Named | Missing], *, batch_size: int | None = None, top: int = 3
) -> Iterator[list[Predicted | Missing]]:
    """What the network says of the files, a batch at a time, in their order; with what cannot be read in its place.

    All batches are of one size, the last one filled up: the device computes each image in the same way, alone or not.

    Args:
        batch_size: `None` takes `batch_size_for`.
        top: classes that are named of each image.
    """
    size = batch_size_for(network) if batch_size is None else batch_size
    batches = _batches(files, size)
    first = [batch for batch in (next(batches, None), next(batches, None)) if batch]
    # Processes take 0.3 s to start, in which a core decodes a hundred photos.
    reader = _Reader(network, cores() if len(first) > 1 else 0)
    waiting: deque[_Batch] = deque()
    try:
        for batch in chain(first, batches):
            waiting.append(reader.begin(batch))
            if len(waiting) > _AHEAD:
                yield _answered(network, waiting.popleft(), reader, size, top)
        while waiting:
            yield _answered(network, waiting.popleft(), reader, size, top)
    finally:
        reader.close()


def _batches(files: Iterator[Named | Missing], size: int) -> Iterator[list[Named | Missing]]:
    while batch := list(islice(files, size)):
        yield batch


_Asked = list[tuple[list[str], Future[Decoded]]]
_Batch = tuple[list[Named | Missing], _Asked]


class _Reader:
    """Decodes files of which any may be bad, or the end of the process that reads it.

    Args:
        workers: processes; 0 decodes in this one.
    """

    def __init__(self, network: Opened, workers: int) -> None:
        self.recipe = network.recipe
        patience = network.experiment.loading.patience
        self._make = lambda count: DecodingPool(count, patience)
        self._pools = [self._make(workers)]
        self._alone = self._make(1)

    def begin(self, batch: list[Named | Missing]) -> _Batch:
        pool = self._pools[-1]
        paths = [file.path for file in batch if isinstance(file, Named)]
        share = max(1, -(-len(paths) // max(1, pool.workers)))
        parts = [paths[at : at + share] for at in range(0, len(paths), share)]
        return batch, [(part, pool.ask(part, self.recipe)) for part in parts]

    def images(self, asked: _Asked) -> tuple[Tensor, list[tuple[int, int]], dict[int, str]]:
        """(N, C, H, W) uint8, each file's own (height, width), and by its position why a file cannot be read."""
        decoded = [self._decoded(paths, future) for paths, future in asked]
        images = np.concatenate([part.images for part in decoded])
        sizes = np.concatenate([part.sizes for part in decoded]).tolist()
        reasons, first = dict[int, str](), 0
        for part in decoded:
            reasons |= {first + number: reason for number, reason in part.failures}
            first += len(part.images)
        return torch.from_numpy(images), [(height, width) for height, width in sizes], reasons

    def _decoded(self, paths: list[str], future: Future[Decoded]) -> Decoded:
        try:
            return future.result()
        except DataError as error:
            if len(paths) > 1:
                # The process is gone; which file is to blame shows when each is read by itself.
                self._pools.append(self._make(self._pools[-1].workers))
                parts = [self._decoded([path], self._alone.ask([path], self.recipe)) for path in paths]
                failures = [(number, reason) for number, part in enumerate(parts) for _, reason in part.failures]
                images = np.concatenate([part.images for part in parts])
                return Decoded(images, np.concatenate([part.sizes for part in parts]), failures)
            self._alone.close()
            image = np.zeros((1, self.recipe.channels, self.recipe.height, self.recipe.width), np.uint8)
            return Decoded(image, np.zeros((1, 2), np.int64), [(0, str(error))])

    def close(self) -> None:
        for pool in (*self._pools, self._alone):
            pool.close()


def _answered(network: Opened, batch: _Batch, reader: _Reader, size: int, top: int) -> list[Predicted | Missing]:
    files, asked = batch
    if not asked:
        return [file for file in files if isinstance(file, Missing)]
    images, sizes, reasons = reader.images(asked)
    outputs = network.outputs(filled(images, size)) if len(reasons) < len(images) else {}
    outputs = {name: output[: len(images)].cpu() for name, output in outputs.items()}
    answers = network.task.answers(outputs, top) if outputs else []
    masks = network.task.predictions(outputs).get("mask")
    results, number = list[Predicted | Missing](), -1
    for file in files:
        if isinstance(file, Missing):
            results.append(file)
            continue
        number += 1
        if number in reasons:
            results.append(Missing(file.path, reasons[number]))
            continue
        found = Predicted(file, sizes[number], answers[number])
        if "box" in found.answer:
            corners = box_of_file(np.array(found.answer["box"]), network.recipe, found.size)
            found.answer["box"] = [round(corner, 2) for corner in corners.tolist()]
        if masks is not None:
            found.mask = mask_of_file(masks[number].to(torch.uint8).numpy(), network.recipe, found.size)
        results.append(found)
    return results


def filled(images: Tensor, size: int) -> Tensor:
    """The images (N, C, H, W) and black ones, `size` in all: how many there are decides how a device computes each."""
    short = size - len(images)
    return images if short <= 0 else torch.cat([images, images.new_zeros(short, *images.shape[1:])])
