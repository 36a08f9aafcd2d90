"""Which part of a file the network saw, and how what it says goes back to the file's own pixels."""

from __future__ import annotations

from typing import Any

import numpy as np

from cnnlab.data.pixels import Recipe, cropped, letterbox
from cnnlab.protocols import VOID

Array = np.ndarray[Any, Any]


def window(recipe: Recipe, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The input's frame, (left, top, right, bottom), in pixels of the upright file; of a letterboxed one it reaches
    beyond the file.

    Args:
        size: (height, width) of the file.
    """
    height, width = size
    if recipe.fit == "crop":
        scaled, left, top = cropped(width, height, recipe)
        across, down = width / scaled[0], height / scaled[1]
    elif recipe.fit == "letterbox":
        left, top, shown_width, shown_height = letterbox(height, width, recipe.height, recipe.width)
        across, down, left, top = width / shown_width, height / shown_height, -left, -top
    else:
        return 0.0, 0.0, float(width), float(height)
    return left * across, top * down, (left + recipe.width) * across, (top + recipe.height) * down


def mask_of_file(mask: Array, recipe: Recipe, size: tuple[int, int]) -> Array:
    """Class numbers (H, W) uint8 of the input as those of the file (height, width): each pixel has the class of the
    place that it has in the input; void (255) where the network did not look."""
    left, top, right, bottom = window(recipe, size)
    rows, seen_rows = _places(size[0], top, bottom, mask.shape[0])
    columns, seen_columns = _places(size[1], left, right, mask.shape[1])
    placed = mask[rows[:, None], columns[None]]
    placed[~seen_rows] = VOID
    placed[:, ~seen_columns] = VOID
    return placed


def _places(count: int, low: float, high: float, cells: int) -> tuple[Array, Array]:
    """For each of `count` pixels the cell that its centre lies in, and whether it lies in one."""
    cell = np.floor((np.arange(count) + 0.5 - low) / (high - low) * cells).astype(np.int64)
    return cell.clip(0, cells - 1), (cell >= 0) & (cell < cells)


def box_of_file(box: Array, recipe: Recipe, size: tuple[int, int]) -> Array:
    """A box (4,), (x1, y1, x2, y2) in [0, 1] of the input, in pixels of the file, cut at its edges."""
    left, top, right, bottom = window(recipe, size)
    corners = np.array([left, top, left, top]) + box * np.array([right - left, bottom - top] * 2)
    return corners.clip(0, np.array([size[1], size[0]] * 2))
