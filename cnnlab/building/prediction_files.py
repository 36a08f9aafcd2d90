"""Masks and boxes that a network predicted, as files beside each other: for programs, and to look at."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnnlab.building.opened import Opened
from cnnlab.building.prediction import Predicted
from cnnlab.data.decode import decode
from cnnlab.data.pixels import Recipe
from cnnlab.errors import DataError, UsageError
from cnnlab.protocols import VOID
from cnnlab.runs.folder import write_atomically
from cnnlab.sinks.picture import shortened
from cnnlab.tasks.pictures import palette

if TYPE_CHECKING:
    from PIL.Image import Image

Array = np.ndarray[Any, Any]
_QUALITY = 90


class PredictionFiles:
    """Writes `masks/NAME.png`, class numbers with the classes' colours as palette (255 is void: the network did not
    look there), as `data=masks` reads them; and `overlays/NAME.jpg`, the image with its mask or its box.

    Each is of the size of the upright file. `NAME` is the file's, below the folder that was named.

    Args:
        folder: new, or empty.

    Raises:
        UsageError: there is something in the folder, it cannot be made, or the task has nothing to write.
    """

    def __init__(self, folder: Path, network: Opened) -> None:
        self.folder = folder
        self._recipe = network.recipe
        self._taken = set[str]()
        reads = network.task.reads
        if not {"mask", "box"} & set(reads):
            raise UsageError(f"--out: expected a network that gives masks or boxes, received one of {', '.join(reads)}")
        classes = len(network.classes)
        self._colours = (palette(min(classes, VOID)).numpy() * 255).round().astype(np.uint8)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            occupied = any(folder.iterdir())
        except OSError as error:
            raise UsageError(f"--out {folder}: expected a folder to write to, received: {error}") from error
        if occupied:
            raise UsageError(f"--out {folder}: expected a new or an empty folder, received one with files in it")

    def write(self, found: Predicted) -> dict[str, str]:
        """The paths of what was written of a file, by `mask` and `overlay`.

        Raises `DataError` where the file cannot be read again, `DiskError` where the disk refuses.
        """
        name, written = self._free(found.file.name), dict[str, str]()
        if found.mask is not None:
            written["mask"] = self._save("masks", f"{name}.png", self._mask(found.mask), format="PNG")
        image = self._drawn(found)
        written["overlay"] = self._save("overlays", f"{name}.jpg", image, format="JPEG", quality=_QUALITY)
        return written

    def _free(self, name: str) -> str:
        """The name without its suffix, or with a number where another file has it."""
        stem = str(Path(name).with_suffix(""))
        chosen, number = stem, 1
        while chosen.casefold() in self._taken:  # a file system may not tell A from a
            number += 1
            chosen = f"{stem}-{number}"
        self._taken.add(chosen.casefold())
        return chosen

    def _save(self, kind: str, name: str, image: Image, **options: Any) -> str:
        path, content = self.folder / kind / name, io.BytesIO()
        image.save(content, **options)
        write_atomically(path, content.getvalue(), "type another --out")
        return str(path)

    def _mask(self, mask: Array | None) -> Image:
        from PIL import Image as pillow

        assert mask is not None
        image = pillow.fromarray(mask)
        colours = np.zeros((VOID + 1, 3), np.uint8)
        colours[: len(self._colours) - 1] = self._colours[:-1]
        image.putpalette(colours.tobytes())
        return image

    def _drawn(self, found: Predicted) -> Image:
        from PIL import Image as pillow
        from PIL import ImageDraw, ImageFont

        height, width = found.size
        whole = Recipe(
            3, height, width, "stretch", value_range=self._recipe.value_range, max_pixels=self._recipe.max_pixels
        )
        try:
            pixels = decode(found.file.path, whole)[0].transpose(1, 2, 0)
        except Exception as error:  # each of Pillow's parsers raises what it stumbles on
            raise DataError(f"{found.file.path}: {error}") from error
        if found.mask is not None:
            seen = found.mask != VOID
            paint = self._colours[np.minimum(found.mask, len(self._colours) - 1)]
            mixed = ((pixels.astype(np.uint16) + paint) // 2).astype(np.uint8)
            pixels = np.where(seen[..., None], mixed, pixels // 2)
        image = pillow.fromarray(np.ascontiguousarray(pixels))
        if "box" in found.answer:
            draw, thick = ImageDraw.Draw(image), max(1, min(height, width) // 100)
            corners = found.answer["box"]
            draw.rectangle(corners, outline=(255, 255, 255), width=thick)
            letters = max(10, min(height, width) // 24)
            text = f"{found.answer['probability']:.2f} {shortened(found.answer['class'])}"
            at = (corners[0] + 2 * thick, corners[1] + 2 * thick)
            font = ImageFont.load_default(letters)
            draw.text(
                at, text, fill=(255, 255, 255), stroke_width=max(1, letters // 10), stroke_fill=(0, 0, 0), font=font
            )
        return image
