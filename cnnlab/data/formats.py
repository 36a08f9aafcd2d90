"""The image formats that are read, and how files of each are named."""

from __future__ import annotations

import os
import stat
from functools import cache
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from PIL.Image import Image

_SUFFIXES = {
    "JPEG": "jpg jpeg jpe jfif mpo",
    "PNG": "png apng",
    "BMP": "bmp",
    "DIB": "dib",
    "GIF": "gif",
    "PPM": "ppm pgm pbm pnm pfm",
    "TIFF": "tif tiff",
    "WEBP": "webp",
    "JPEG2000": "jp2 j2k j2c jpc jpf jpx",
    "AVIF": "avif avifs",
    "TGA": "tga icb vda vst",
    "PCX": "pcx",
    "DCX": "dcx",
    "ICO": "ico",
    "CUR": "cur",
    "ICNS": "icns",
    "SGI": "sgi rgb rgba bw",
    "SUN": "ras",
    "PSD": "psd",
    "DDS": "dds",
    "QOI": "qoi",
    "XBM": "xbm",
    "XPM": "xpm",
    "IM": "im",
    "MSP": "msp",
    "FLI": "fli flc",
    "BLP": "blp",
    "FTEX": "ftc ftu",
    "GBR": "gbr",
    "PCD": "pcd",
    "PIXAR": "pxr",
    "FITS": "fit fits",
}
"""What Pillow decodes by itself. Not EPS, which it hands to an interpreter, nor what it only writes or recognizes."""

_AT_HAND = ("JPEG", "PNG", "BMP", "DIB", "GIF", "PPM")
"""Pillow has these loaded from the start; all together take 0.05 s."""

EXTENSIONS = frozenset(f".{suffix}" for suffixes in _SUFFIXES.values() for suffix in suffixes.split())
"""Of the files that are taken for images, in lower case."""


def require_file(path: str) -> None:
    """Raises `OSError` for what is no regular file: a pipe or a device is neither opened nor waited for."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116 (pathlib: 3x the time)
        raise OSError("expected a file, received a folder, a pipe or a device")


def opened(source: str | BinaryIO) -> Image:
    """The image with its header read, of one of these formats by its content, whatever its name says.

    An EPS file that is named .png is no image here, nor is a pipe or a device.

    Raises what Pillow raises, which may be anything for a damaged file: `OSError` for what is of no format.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(source, str):
        require_file(source)
    try:
        return Image.open(source, formats=_AT_HAND)
    except UnidentifiedImageError:
        if not isinstance(source, str):
            source.seek(0)
        return Image.open(source, formats=_all())


@cache
def _all() -> tuple[str, ...]:
    """Those that the installed Pillow has, in its order: TGA has no signature, and takes other formats' files."""
    from PIL import Image

    Image.init()
    return tuple(name for name in Image.ID if name in _SUFFIXES)
