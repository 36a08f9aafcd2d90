"""The size that a folder's images have by themselves, from their headers."""

from __future__ import annotations

import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from statistics import median_low

from cnnlab.data.decode import Recipe
from cnnlab.data.formats import opened
from cnnlab.data.places import cache_folder
from cnnlab.data.sources import Listing
from cnnlab.runs.folder import write_json

_log = logging.getLogger(__name__)

DEFAULT_SIZE = 64
LARGEST_OWN_SIZE = 256
_ENOUGH = 500
"""Files that tell the median of all."""
_MANY = 100_000
"""Headers that are worth a line: 3 s from a local disk."""
_PIECE = 1000
_STEP = 32
_USUAL = 224
_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)
"""Orientations in EXIF that swap the sides."""


@dataclass(frozen=True)
class OwnSize:
    """What the images' headers say.

    `side`: of the images, where all are square, alike, and at most `LARGEST_OWN_SIZE`; `width` and `height` at the
    median, as the images are shown; `odd`: a file of another size, where most are of one.
    """

    side: int | None
    width: int
    height: int
    odd: str | None = None

    def taken(self) -> int:
        """The side that they are read at."""
        return DEFAULT_SIZE if self.side is None else self.side

    def notices(self) -> list[str]:
        """A line where a larger size would see more, or where a few files decide."""
        if self.side is not None or self.width == 0:
            return []
        taken = f"are taken at {DEFAULT_SIZE}x{DEFAULT_SIZE}"
        if self.odd is not None:
            if self.width == DEFAULT_SIZE:
                return []
            return [
                f"data: most images are {self.width}x{self.height} and {taken}, as {self.odd} has another size; "
                f"data.size={self.width} takes them as they are"
            ]
        better = min(_USUAL, min(self.width, self.height) // _STEP * _STEP)
        if better <= DEFAULT_SIZE:
            return []
        return [f"data: photos are {self.width}x{self.height} at the median and {taken}; data.size={better} sees more"]


def own_size(listing: Listing, cache: str | None) -> OwnSize:
    """Reads the headers of all files, or of as many as decide, and remembers the answer in the cache.

    A file whose header cannot be read decides nothing: it is reported when it is decoded.
    """
    known = cache_folder(cache) / f"{listing.key(Recipe(0, 0, 0, 'crop'))}.headers.json"
    try:
        return OwnSize(**json.loads(known.read_text()))
    except (OSError, ValueError, TypeError):
        found = _read(listing)
    with suppress(OSError):  # they are read again the next time; decoding says what is wrong with the cache
        write_json(known, asdict(found))
    return found


def _read(listing: Listing) -> OwnSize:
    count = len(listing)
    if count > _MANY:
        _log.info("reading the headers of %s image files", f"{count:,}")
    spread = range(0, count, max(1, count // _ENOUGH))
    first = [size for _, size in _sizes(listing, spread)]
    if not first:
        return OwnSize(None, 0, 0)
    (width, height), times = Counter(first).most_common(1)[0]
    if width == height <= LARGEST_OWN_SIZE and 2 * times > len(first):
        odd = next((row for row, size in _sizes(listing, range(count)) if size != (width, height)), None)
        return OwnSize(width, width, height) if odd is None else OwnSize(None, width, height, listing.name(odd))
    return OwnSize(None, median_low(size[0] for size in first), median_low(size[1] for size in first))


def _sizes(listing: Listing, rows: range) -> Iterator[tuple[int, tuple[int, int]]]:
    """Row, and (width, height) as it is shown, of each file whose header can be read."""
    for start in range(0, len(rows), _PIECE):
        piece = rows[start : start + _PIECE]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a large image, or of a damaged one: decoding tells
            found = [_size(str(item)) for item in listing.items(piece)]
        yield from ((row, size) for row, size in zip(piece, found) if size is not None)


def _size(path: str) -> tuple[int, int] | None:
    try:
        with opened(path) as image:
            width, height = image.size
            turned = width != height and image.getexif().get(_ORIENTATION, 1) in _TURNED
            return (height, width) if turned else (width, height)
    except Exception:  # each of Pillow's parsers raises what it stumbles on
        return None
