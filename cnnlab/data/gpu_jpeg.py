"""JPEG files decoded and resized by the GPU."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cnnlab.data.decode import Item, Recipe, contents, cropped, decode, hush, name_of, reason_of
from cnnlab.data.pixels import MAX_PIXELS
from cnnlab.data.pool import PATIENCE
from cnnlab.data.threads import Threads
from cnnlab.errors import DataError
from cnnlab.machine.copies import pinned

Failures = list[tuple[int, str]]
_Pixels = tuple[np.ndarray[Any, Any], tuple[int, int]]

# Of the markers FFC0..FFCF these three begin no frame; 8 is reserved.
_NO_FRAME = (0xC4, 0xC8, 0xCC)
_BASELINE_OR_PROGRESSIVE = (0xC0, 0xC1, 0xC2)
_LONG = 16
"""Sides' ratio from which Pillow resizes a strip, of which it resizes only what is kept."""


class GpuJpegs:
    """Decodes batches of image files on a GPU: JPEG by nvJPEG, what it does not take by Pillow on the CPU.

    The pixels differ from Pillow's by rounding (another inverse DCT, another resampling in fixed point), and at the
    edges of colours that the file has at half the resolution, so a run keeps to one of the two.

    Args:
        recipe: with `fit="crop"` or `"whole"`.
        device: where images come out; the CPU too, by torchvision's own decoder.
        threads: that read the files.
        patience: seconds that a file may take to be read; `None` waits for ever.
    """

    def __init__(self, recipe: Recipe, device: torch.device, threads: int, patience: float | None = PATIENCE) -> None:
        assert recipe.fit in ("crop", "whole") and not recipe.mask
        self.recipe = recipe
        self.device = device
        self.patience = patience
        self._readers = Threads(threads, "cnnlab-read")
        hush()

    def begin(self, items: Sequence[Item]) -> Callable[[], tuple[Tensor, Tensor, Failures]]:
        """Starts to read the files; what is returned decodes them, on the current stream, without waiting for it.

        It gives the images (n, C, H, W) uint8 on the device, the files' own (height, width) (n, 2) on the CPU, and
        position and reason of those that failed.
        """
        read = [self._readers.submit(_prepared, item, self.recipe) for item in items]

        def finish() -> tuple[Tensor, Tensor, Failures]:
            recipe, failures = self.recipe, []
            shape = (len(items), recipe.channels, recipe.height, recipe.width)
            images = torch.zeros(shape, dtype=torch.uint8, device=self.device)
            sizes = torch.zeros((len(items), 2), dtype=torch.int64)
            encoded: dict[int, bytes] = {}
            for number, future in enumerate(read):
                ready = _awaited(future, items[number], self.patience)
                if isinstance(ready, bytes):
                    encoded[number] = ready
                elif isinstance(ready, str):
                    failures.append((number, ready))
                else:
                    self._put(ready, images[number], sizes[number])
            failures += self._decode(encoded, images, sizes)
            return images, sizes, sorted(failures)

        return finish

    def _put(self, ready: _Pixels, image: Tensor, size: Tensor) -> None:
        pixels, own = ready
        read = torch.from_numpy(np.ascontiguousarray(pixels))
        image.copy_(pinned(read) if self.device.type == "cuda" else read, non_blocking=True)
        size.copy_(torch.tensor(own))

    def _decode(self, encoded: dict[int, bytes], images: Tensor, sizes: Tensor) -> Failures:
        if not encoded:
            return []
        if self.device.type == "cuda":
            # nvJPEG writes on a stream of its own, to memory of the current one: what the last batch's kernels still
            # read there, it would overwrite.
            done = torch.cuda.Event()
            done.record()
            done.synchronize()
        try:
            decoded = self._jpegs(list(encoded.values()))
        except RuntimeError:  # one of them is broken, and it is not said which
            return self._one_by_one(encoded, images, sizes)
        for number, picture in zip(encoded, decoded, strict=True):
            images[number].copy_(fitted(picture, self.recipe))
            sizes[number] = torch.tensor(picture.shape[1:])
        return []

    def _jpegs(self, files: Sequence[bytes]) -> list[Tensor]:
        return decode_jpegs(files, "GRAY" if self.recipe.channels == 1 else "RGB", self.device)

    def _one_by_one(self, encoded: dict[int, bytes], images: Tensor, sizes: Tensor) -> Failures:
        """By Pillow, which says what is wrong with a file, and reads some that nvJPEG does not."""
        failures = []
        for number, file in encoded.items():
            ready = _by_pillow(file, self.recipe)
            if isinstance(ready, str):
                failures.append((number, ready))
            else:
                self._put(ready, images[number], sizes[number])
        return failures


def decode_jpegs(files: Sequence[bytes], mode: Literal["GRAY", "RGB"], device: torch.device) -> list[Tensor]:
    """Each file as (C, height, width) uint8 on `device`, by torchvision, or by torchcodec where torchvision has it no
    more: 0.29 announces so.

    Raises:
        RuntimeError: one of them is broken, and it is not said which; or the library cannot do it on this device.
        ImportError: neither library is there.
    """
    data = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
    try:
        from torchvision.io import ImageReadMode
        from torchvision.io import decode_jpeg as by_torchvision
    except ImportError:
        from torchcodec.decoders import decode_jpeg as by_torchcodec

        return list(by_torchcodec(data, mode=mode, device=device))
    # For good, not around the call: the filters belong to all threads.
    warnings.filterwarnings("ignore", message="The image decoding and encoding capabilities of TorchVision")
    decoded: Any = by_torchvision(data, mode=ImageReadMode[mode], device=device)
    return decoded


def _awaited(future: Future[Any], item: Item, patience: float | None) -> Any:
    """What a reader has read. Raises `DataError` where it does not come."""
    try:
        return future.result(patience)
    except TimeoutError as error:
        raise DataError(
            f"expected {name_of(item)} to be read within {patience:g} seconds, received nothing: its disk does not "
            "answer; try again, or type loading.patience=SECONDS to wait longer"
        ) from error


def works(device: torch.device) -> bool:
    """Whether this torchvision decodes JPEG files on `device`: it may be built without, or the driver too old."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 40, 10)).save(file, "JPEG")
    try:
        (image,) = GpuJpegs(Recipe(3, 8, 8, "crop", 8), device, 1)._jpegs([file.getvalue()])
    except (ImportError, RuntimeError):
        return False
    return abs(int(image[0, 4, 4]) - 200) < 10


def _prepared(item: Item, recipe: Recipe) -> bytes | _Pixels | str:
    """A JPEG file for the GPU, undecoded; the pixels of any other, and its own size; or why there are none."""
    try:
        file = contents(item)
    except OSError as error:
        return reason_of(error)
    return file if is_plain_jpeg(file, recipe.max_pixels) else _by_pillow(file, recipe)


def _by_pillow(file: bytes, recipe: Recipe) -> _Pixels | str:
    try:
        return decode(io.BytesIO(file), recipe)
    except MemoryError:
        raise
    except Exception as error:  # each of Pillow's parsers raises what it stumbles on
        return reason_of(error)


def is_plain_jpeg(file: bytes, max_pixels: int = MAX_PIXELS) -> bool:
    """Whether nvJPEG reads the file as Pillow does: JPEG of 8 bits, grey or YCbCr, not turned by EXIF or XMP, neither
    too large nor a long strip.

    Reads the markers up to the frame's header (ITU-T T.81, B.1.1 and B.2.2).
    """
    if file[:2] != b"\xff\xd8":
        return False
    at = 2
    while at + 10 <= len(file) and file[at] == 0xFF:
        marker, length = file[at + 1], int.from_bytes(file[at + 2 : at + 4], "big")
        if marker == 0xE1 and _may_turn(file[at + 4 : at + 2 + length]):
            return False  # which Pillow knows how to
        if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME:
            precision, components = file[at + 4], file[at + 9]
            height, width = (int.from_bytes(file[start : start + 2], "big") for start in (at + 5, at + 7))
            small = 0 < height * width <= max_pixels and max(height, width) <= _LONG * min(height, width)
            return small and marker in _BASELINE_OR_PROGRESSIVE and precision == 8 and components in (1, 3)
        if marker == 0xEE and file[at + 4 : at + 9] == b"Adobe":
            return False  # its three channels may be RGB
        at += 2 + length
    return False


def _may_turn(segment: bytes) -> bool:
    """Whether an APP1 segment may ask for the image to be turned: any EXIF, and XMP that speaks of it."""
    return segment.startswith(b"Exif") or b"Orientation" in segment


def fitted(picture: Tensor, recipe: Recipe) -> Tensor:
    """(C, H, W) uint8 at the recipe's size, as `cnnlab.data.decode` has it."""
    _, height, width = picture.shape
    if recipe.fit == "whole" and height > width:
        return fitted(picture.transpose(1, 2), recipe)
    whole = ((recipe.width, recipe.height), 0, 0)
    scaled, left, top = whole if recipe.fit == "whole" else cropped(width, height, recipe)
    if (width, height) != scaled:
        resized = functional.interpolate(
            picture[None].float(), (scaled[1], scaled[0]), mode="bilinear", antialias=True, align_corners=False
        )
        picture = resized[0].round_().clamp_(0, 255).to(torch.uint8)
    return picture[:, top : top + recipe.height, left : left + recipe.width]
