"""The image formats that are read, and how files of each are named."""

from __future__ import annotations

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


def opened(source: str | BinaryIO) -> Image:
    """The image with its header read, of one of these formats by its content, whatever its name says.

    An EPS file that is named .png is no image here.

    Raises what Pillow raises, which may be anything for a damaged file: `OSError` for what is of no format.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(source, formats=_AT_HAND)
    except UnidentifiedImageError:
        if not isinstance(source, str):
            source.seek(0)
        return Image.open(source, formats=_all())


@cache
def _all() -> tuple[str, ...]:
    """Those formats that the installed Pillow has."""
    from PIL import Image

    Image.init()
    return tuple(name for name in _SUFFIXES if name in Image.OPEN)
