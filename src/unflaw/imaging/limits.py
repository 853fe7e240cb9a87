"""What makes a small image file long to read or large in memory, found before a decoder sees it.

Decoders check that a file is whole, not that it is reasonable. Each function here looks at one way in which a few
megabytes can take minutes or gigabytes, and says what is wrong, or nothing. Limits are far above what cameras and
programs write.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from unflaw.errors import ImageError

BLOCKS = 10_000  # of any image; decoders take some microseconds for each
PER_BLOCK = {b"\x89P": 1024, b"\xff\xd8": 1024, b"GI": 128, b"II": 32, b"MM": 32}  # and one more for so many bytes
SCANS, SCANNED = 16, 2_000_000_000  # of a progressive JPEG; and pixels that the scans beyond may pass
RUNS = 4_000_000  # pixels, and bytes, of a run-length compressed BMP, which Pillow decodes in Python


def crowded(data: bytes) -> str:
    """PNG chunks, JPEG segments, GIF blocks and TIFF strips of next to nothing, millions of them."""
    walk = _WALKS.get(data[:2])
    if walk is None:
        return ""
    limit, total = BLOCKS + len(data) // PER_BLOCK[data[:2]], 0
    for count in walk(data):
        total += count
        if total > limit:
            return f"consists of more than {limit:,} blocks; save it again without comments and the like"
    return ""


def slow(data: bytes, size: tuple[int, int]) -> str:
    """A JPEG whose every scan passes all pixels, and a BMP that is decoded run by run.

    Args:
        data: The file.
        size: (width, height), pixels.
    """
    pixels = size[0] * size[1]
    if data[:2] == b"\xff\xd8" and (scans := data.count(b"\xff\xda")) > SCANS + SCANNED // max(pixels, 1):
        return f"has {scans} scans over {pixels:,} pixels; save it again, not progressive"
    if data[:2] == b"BM" and data[30:34] in (b"\1\0\0\0", b"\2\0\0\0") and max(pixels, len(data)) > RUNS:
        return f"is a run-length compressed BMP of over {RUNS:,} pixels or bytes; save it as PNG"
    return ""


def _png(data: bytes) -> Iterator[int]:
    place = 8
    while place < len(data):
        yield 1
        place += 12 + int.from_bytes(data[place : place + 4], "big")


def _jpeg(data: bytes) -> Iterator[int]:
    """Segments before the first scan."""
    place = 2
    while place + 4 <= len(data) and data[place + 1] != 0xDA:
        yield 1
        alone = data[place] != 0xFF or data[place + 1] in (0, 0xFF) or 0xD0 <= data[place + 1] <= 0xD8
        place += 1 if alone else 2 + max(2, int.from_bytes(data[place + 2 : place + 4], "big"))


def _gif(data: bytes) -> Iterator[int]:
    """Blocks and the blocks within."""

    def palette(flags: int) -> int:
        return 3 * 2 ** ((flags & 7) + 1) if flags & 128 else 0

    place = 13 + palette(data[10]) if len(data) > 13 else len(data)
    while place + 10 < len(data):
        yield 1
        kind = data[place]
        place += 2 if kind == 0x21 else 11 + palette(data[place + 9]) if kind == 0x2C else 1
        while kind in (0x21, 0x2C) and place < len(data) and data[place]:
            yield 1
            place += 1 + data[place]
        place += kind in (0x21, 0x2C)


def _tiff(data: bytes) -> Iterator[int]:
    """Numbers in the first directory; those of one byte are notes, which stay as they are."""
    order, long = _order(data)
    start = int.from_bytes(data[8:16] if long else data[4:8], order)
    size, place = (20, start + 8) if long else (12, start + 2)
    for _ in range(int.from_bytes(data[start:place], order)):
        entry = data[place : place + size]
        if int.from_bytes(entry[2:4], order) not in (1, 2, 6, 7):
            yield int.from_bytes(entry[4 : 12 if long else 8], order)
        place += size


def paged(data: bytes) -> bool:
    """Whether a TIFF names a second page."""
    order, long = _order(data)
    start = int.from_bytes(data[8:16] if long else data[4:8], order)
    place, size, width = (start + 8, 20, 8) if long else (start + 2, 12, 4)
    place += size * int.from_bytes(data[start:place], order)
    return any(data[place : place + width])


def _order(data: bytes) -> tuple[Literal["little", "big"], bool]:
    """Of bytes, and whether the file is a BigTIFF."""
    order: Literal["little", "big"] = "little" if data[:1] == b"I" else "big"
    return order, int.from_bytes(data[2:4], order) == 43


_WALKS = {b"\x89P": _png, b"\xff\xd8": _jpeg, b"GI": _gif, b"II": _tiff, b"MM": _tiff}


SIDEWAYS = (5, 6, 7, 8)


def check(size: tuple[int, int], several: bool, max_pixels: int) -> None:
    """Refuses, by ImageError, what is too large and what is several images."""
    if size[0] * size[1] > max_pixels:
        raise ImageError(f"has {size[0]} × {size[1]} pixels, over the limit of {max_pixels:,}; scale it down or cut it")
    if several:
        raise ImageError("has several frames or pages; save the one that counts as an image of its own")


AT_ONCE = 2**24  # pixels that are converted at once: above, in strips


TRANSPARENT = "is transparent everywhere: its alpha channel is 0, as if never filled; save it without an alpha channel"


def visible(alpha: np.ndarray) -> bool:
    """Whether an alpha channel, of uint8, uint16 or floats in [0, 1], is more than 1/255 anywhere."""
    full = 1 if np.issubdtype(alpha.dtype, np.floating) else np.iinfo(alpha.dtype).max
    return not alpha.max() <= 1.5 / 255 * full  # so written, NaN is left to the check of values
