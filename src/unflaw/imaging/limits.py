"""Limits on image files, checked before a decoder reads them.

Decoders check that a file is complete, not that it is reasonable: a file of a few megabytes can take minutes to decode,
or gigabytes of memory. The limits are far above what cameras and programs write.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from unflaw.errors import ImageError

BLOCKS = 10_000  # blocks of any image; decoders take some microseconds for each
PER_BLOCK = {b"\x89P": 1024, b"\xff\xd8": 1024, b"GI": 128, b"II": 32, b"MM": 32}  # and one more for so many bytes
SCANS, SCANNED = 16, 2_000_000_000  # scans of a progressive JPEG; pixels that further scans may process in total
RUNS = 4_000_000  # pixels, and bytes, of a run-length compressed BMP, which Pillow decodes in Python
AT_ONCE = 2**24  # pixels that are processed at once; larger images are processed in strips
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
TRANSPARENT = "is transparent everywhere: its alpha channel is 0, as if never filled; save it without an alpha channel"


def check_size(size: tuple[int, int], several: bool, max_pixels: int) -> None:
    """Raise ImageError for an image (width, height) that is too large, and for a file of several images."""
    if size[0] * size[1] > max_pixels:
        raise ImageError(
            f"has {size[0]} × {size[1]} pixels, over the limit of {max_pixels:,}; scale it down or crop it"
        )
    if several:
        raise ImageError("has several frames or pages; save the one to inspect as a separate image")


def check_blocks(data: bytes) -> None:
    """Raise ImageError for a file of too many tiny PNG chunks, JPEG segments, GIF blocks or TIFF strips."""
    if (walk := _WALKS.get(data[:2])) is None:
        return
    limit, total = BLOCKS + len(data) // PER_BLOCK[data[:2]], 0
    for count in walk(data):
        total += count
        if total > limit:
            raise ImageError(f"consists of more than {limit:,} blocks; save it again without comments and the like")


def check_decoding(data: bytes, size: tuple[int, int]) -> None:
    """Raise ImageError for a JPEG of too many scans and for a large run-length compressed BMP, of (width, height)."""
    pixels = size[0] * size[1]
    if data[:2] == b"\xff\xd8" and (scans := data.count(b"\xff\xda")) > SCANS + SCANNED // max(pixels, 1):
        raise ImageError(f"has {scans} scans over {pixels:,} pixels; save it again, not progressive")
    if data[:2] == b"BM" and data[30:34] in (b"\1\0\0\0", b"\2\0\0\0") and max(pixels, len(data)) > RUNS:
        raise ImageError(f"is a run-length compressed BMP of over {RUNS:,} pixels or bytes; save it as PNG")


def visible(alpha: np.ndarray) -> bool:
    """Return True if an alpha channel, of uint8, uint16 or floats in [0, 1], is more than 1/255 anywhere."""
    full = 1 if np.issubdtype(alpha.dtype, np.floating) else np.iinfo(alpha.dtype).max
    return not alpha.max() <= 1.5 / 255 * full  # written so that NaN is left to the check of values


def has_pages(data: bytes) -> bool:
    """Return True if a TIFF has a second page."""
    _, long, place, entries = _directory(data)
    place += entries * (20 if long else 12)
    return any(data[place : place + (8 if long else 4)])


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
    """Blocks and their sub-blocks."""

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
    """Numbers of values in the first directory, except of one-byte values, which are not decoded."""
    order, long, place, entries = _directory(data)
    for _ in range(entries):
        entry = data[place : place + (20 if long else 12)]
        if not entry:  # a BigTIFF may announce 2^64 entries
            return
        if int.from_bytes(entry[2:4], order) not in (1, 2, 6, 7):
            yield int.from_bytes(entry[4 : 12 if long else 8], order)
        place += len(entry)


def _directory(data: bytes) -> tuple[Literal["little", "big"], bool, int, int]:
    """Byte order of a TIFF, True for BigTIFF, and of its first directory the start of the entries and their number."""
    order: Literal["little", "big"] = "little" if data[:1] == b"I" else "big"
    long = int.from_bytes(data[2:4], order) == 43
    start = int.from_bytes(data[8:16] if long else data[4:8], order)
    place = start + (8 if long else 2)
    return order, long, place, int.from_bytes(data[start:place], order)


_WALKS = {b"\x89P": _png, b"\xff\xd8": _jpeg, b"GI": _gif, b"II": _tiff, b"MM": _tiff}
