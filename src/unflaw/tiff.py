"""Colour TIFF of more than 8 bits, of which Pillow would keep 8."""

from __future__ import annotations

import io
import zlib
from importlib.util import find_spec
from math import prod
from typing import Any

import numpy as np

from unflaw.containers import paged
from unflaw.decoding import SIDEWAYS, ImageError, check

SAMPLES = 16  # of a pixel at most
SPARE = 2**22  # pixels by which strips and tiles may be larger than the picture
_ORIENTATION = 0x0112


def decode_deep(data: bytes, max_pixels: int) -> np.ndarray | None:
    """(H, W, channels), upright; None where Pillow reads as much.

    Raises:
        ImageError: As `images.read`.
    """
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        page: Any = tiff.pages[0]
        if page.bitspersample <= 8 or page.samplesperpixel == 1:
            return None
        check((page.imagewidth, page.imagelength), paged(data), max_pixels)
        if fault := _swollen(page, data, max_pixels):
            raise ImageError(fault)
        if page.photometric.name not in ("RGB", "MINISBLACK"):
            raise ImageError(f"is a {page.photometric.name} TIFF of more than 8 bits; save it as RGB or grey")
        pixels = page.asarray()
        if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
            pixels = np.moveaxis(pixels, 0, -1)
        if page.extrasamples != (tifffile.EXTRASAMPLE.UNASSALPHA,):  # on black already, or no transparency at all
            pixels = pixels[..., : page.samplesperpixel - len(page.extrasamples)]
        orientation = page.tags.valueof(_ORIENTATION, 1)
    if orientation in SIDEWAYS:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]


def _swollen(page: Any, data: bytes, max_pixels: int) -> str:
    """A TIFF page whose strips or tiles hold more than the picture has, or that says so.

    Args:
        page: Of tifffile.
        data: The file.
        max_pixels: As for `images.read`.
    """
    samples, pixels = page.samplesperpixel, page.imagewidth * page.imagelength
    if max(page.imagedepth, page.tiledepth) > 1:
        return f"is {page.imagedepth} pictures deep; save the one that counts as a picture of its own"
    if samples > SAMPLES or samples * page.bitspersample * pixels > 128 * max_pixels:
        return f"has {samples} channels of {page.bitspersample} bits; save it as RGB or grey in 8 or 16 bits"
    if prod(page.chunks) > (pixels + SPARE) * samples or len(page.dataoffsets) > pixels * samples + 1:
        return "is cut into strips or tiles that do not go with its size; save it again"
    unpacked = (1, 8, 32773, 32946, *((5,) if find_spec("imagecodecs") else ()))
    if page.compression not in unpacked:
        return f"is compressed by {page.compression!r} in more than 8 bits; save it with Deflate or uncompressed"
    if page.compression in (8, 32946):
        most = prod(page.chunks) * page.bitspersample // 8 + 1
        for start, length in zip(page.dataoffsets, page.databytecounts, strict=False):
            inflate = zlib.decompressobj()
            if len(inflate.decompress(data[start : start + length], most)) >= most:
                return "holds strips or tiles that are more than its size once decompressed; save it again"
    return ""
